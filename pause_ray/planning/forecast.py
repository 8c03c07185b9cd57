"""Forecasts of a trial and of a sweep: every step, how much of it is on storage, and what the rest takes.

It loads no weights and starts no Ray. Times are those of a named GPU, or follow from the throughput measured on this storage.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self

from rich.table import Table

from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import MANIFEST, Storage, is_complete, read_json, read_json_lines
from pause_ray.data.shards import ShardSet
from pause_ray.evaluation.answer import CellRunner
from pause_ray.evaluation.haystack import check_fits, check_lengths, prompt_builder
from pause_ray.evaluation.ledger import Ledger
from pause_ray.evaluation.prefix_plan import (
    PlannedPrompt,
    PrefillForecast,
    by_position,
    forecast_prefill,
    new_tokens,
    plan_prefixes,
    split_for_actors,
)
from pause_ray.evaluation.suite import Cell, cells
from pause_ray.inference.engine import EndpointSpec, HfEngineSpec, Reuse, default_chunk_tokens, default_prefix_block_size
from pause_ray.models.checkpoint import TRAINING_LOG, Checkpoint
from pause_ray.models.shape import ModelShape
from pause_ray.models.sources import model_limit_tokens, resolve_model, row_limit_tokens
from pause_ray.models.spec import ModelSpec
from pause_ray.sweep.search import SweepTrials
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, example_point, expand
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokenizer import resolve_marker
from pause_ray.training.batching import check_corpus
from pause_ray.training.launch import steps_on_storage, train_digest
from pause_ray.training.metrics import known_shape
from pause_ray.trial.needs import Grid, Hardware, Plan, Rows, grid_of_prompts, make_plan, step_work
from pause_ray.trial.prepare import PrepareCache, PreparedTrial
from pause_ray.trial.run import training_job
from pause_ray.trial.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class TrialForecast:
    """The scoring of one trial, for each mode of prefix reuse."""

    by_reuse: dict[Reuse, PrefillForecast]
    reuse: Reuse
    """The mode that the spec asks for."""
    chunk_tokens: int
    """Assumed number of prompt tokens per forward pass."""
    num_pauses: int
    """Number of pauses in all prompts."""
    pause_tokens: int
    """Number of tokens in those pauses."""
    num_actors: int
    """Number of actors that share the prompts; each holds the weights and a KV cache."""


def forecast_trial(spec: TrialSpec, *, cache: Path, shared: PrepareCache | None = None) -> TrialForecast:
    """Build the trial's prompts and plan the order in which one or several actors answer them.

    Args:
        spec: The trial.
        cache: The folder with cached models and texts.
        shared: Texts and tokenizers of other trials, which is added to.

    Raises:
        ModelError: The model is unknown, its config does not tell its shape, or a prompt is too long for it.
        CheckpointError: The adapter cannot be read.
        SourceError: A document cannot be read.
        TextError: A prompt cannot be built.
    """
    shared = shared or PrepareCache()
    model_dir = resolve_model(spec.model, cache=cache, weights=False)
    limit_tokens = model_limit_tokens(model_dir)
    check_lengths(spec.eval, limit_tokens=limit_tokens, origin=spec.model.source)
    if spec.adapter is not None:
        Checkpoint.open(Path(spec.adapter))
    tokenizer, haystack = shared.tokenizer(model_dir), shared.haystack(spec, cache=cache)
    marker = resolve_marker(tokenizer, spec.pauses)
    builder = prompt_builder(haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed)
    max_new_tokens = spec.eval.max_new_tokens
    runner = CellRunner(builder=builder, tokenizer=tokenizer, policy=spec.pauses, marker=marker, max_new_tokens=max_new_tokens)
    grid = cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed)
    prompts = {cell.id: prompt for cell, prompt in zip(grid, runner.prompts(grid), strict=True)}
    for prompt in prompts.values():
        check_fits(prompt, max_new_tokens=max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
    engine = spec.engine if isinstance(spec.engine, HfEngineSpec) else HfEngineSpec()
    dtype, quantize = spec.model.dtype, spec.model.quantize
    chunk = engine.chunk_tokens or default_chunk_tokens(on_gpu=bool(spec.resources.scoring_gpus_per_actor))
    block = default_prefix_block_size(dtype=dtype, quantize=quantize, chunk_tokens=chunk)
    shape = ModelShape.load(model_dir)
    runs = split_for_actors(grid, num_actors=spec.resources.scoring_bounds[1])
    modes: tuple[Reuse, ...] = ("none", "depth", "full")
    by_reuse = {
        reuse: forecast_prefill(
            _planned(runs, prompts, reuse=reuse, block=block),
            shape,
            chunk_tokens=chunk,
            decode_batch=engine.answers_together(dtype=dtype, quantize=quantize),
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            quantize=quantize,
        )
        for reuse in modes
    }
    num_pauses = sum(prompt.num_pauses for prompt in prompts.values())
    return TrialForecast(
        by_reuse=by_reuse,
        reuse=engine.reuse,
        chunk_tokens=chunk,
        num_actors=len(runs),
        num_pauses=num_pauses,
        pause_tokens=num_pauses * len(marker.group_ids),
    )


def _planned(runs: Sequence[Sequence[Cell]], prompts: Mapping[str, BuiltPrompt], *, reuse: Reuse, block: int) -> list[PlannedPrompt]:
    """Return the plans of all actors as one; ``prompts`` has the prompt of each cell by its id."""
    return [
        planned
        for run in runs
        for planned in plan_prefixes(
            [prompts[cell.id].ids for cell in run], reuse=reuse, prefix_block_size=block, lengths=[cell.context_tokens for cell in run]
        )
    ]


def forecast_table(found: TrialForecast) -> Table:
    """Return a table with a row for each mode of prefix reuse."""
    planned = found.by_reuse[found.reuse]
    each = f" in each of {found.num_actors} actors" if found.num_actors > 1 else ""
    table = Table(
        title=f"{planned.num_prompts} prompts, {planned.asked_tokens:,} tokens, {found.num_pauses:,} pauses in them",
        caption=(
            f"answers: up to {planned.answer_flops / 1e12:.3g} TFLOP each · weights {planned.weight_bytes / 2**30:.2f} GiB{each} · "
            f"{found.chunk_tokens} prompt tokens per forward pass · → what the spec asks for"
        ),
    )
    table.add_column("reuse")
    for heading in ("tokens computed", "of all asked", "TFLOP of prefill", "less work", "keys and values"):
        table.add_column(heading, justify="right")
    most = found.by_reuse["none"].prefill_flops
    for reuse, row in found.by_reuse.items():
        table.add_row(
            f"→ {reuse}" if reuse == found.reuse else f"  {reuse}",
            f"{row.prefilled_tokens:,}",
            f"{100 * row.prefilled_tokens / row.asked_tokens:.0f} %",
            f"{row.prefill_flops / 1e12:.2f}",
            f"{most / row.prefill_flops:.2f}x",
            f"{row.kv_bytes / 2**30:.2f} GiB",
        )
    return table


SFT_LOSS_TOKENS = 64
"""Number of tokens with a loss in a row of ``needle_sft``: the needle as the answer, and its end."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The tokens, operations, time and money that some work takes; None for what is not known."""

    tokens: int | None = 0
    """Tokens that go through the model."""
    flops: float | None = 0.0
    """Operations, if every answer has its full length."""
    seconds: float | None = 0.0
    """Time of computing one trial after another, without starting processes and loading weights."""
    cost: float | None = 0.0
    """Price of the GPUs, or of the endpoint's answers."""

    def times(self, share: float) -> Effort:
        """Return the effort multiplied by ``share``."""
        tokens = None if self.tokens is None else round(self.tokens * share)
        flops, seconds, cost = (None if value is None else value * share for value in (self.flops, self.seconds, self.cost))
        return Effort(tokens=tokens, flops=flops, seconds=seconds, cost=cost)


NOTHING = Effort()
UNKNOWN = Effort(tokens=None, flops=None, seconds=None, cost=None)


class TrialPlanner:
    """Plans the trials of a sweep; reads each model, tokenizer and grid of prompts once."""

    def __init__(self, root: Storage) -> None:
        self._root = root
        self._shared = PrepareCache()
        self._folders: dict[str, Path] = {}
        self._grids: dict[str, tuple[Grid, float]] = {}

    def plan(self, planned: PlannedTrial, *, hardware: Hardware) -> Plan:
        """Return the plan of one trial's training and scoring on ``hardware``.

        Raises:
            UserError: See ``forecast_trial`` and ``make_plan``.
        """
        trial = planned.spec
        resources = trial.resources.model_copy(update={"scoring_actors": hardware.gpus, "scoring_gpus_per_actor": 1})
        grid, rows = self._checked(trial.model_copy(update={"resources": resources}))
        scored_here = grid if isinstance(trial.engine, HfEngineSpec) else None
        return make_plan(planned.label, shape=self.shape(trial), train=trial.train, rows=rows, grid=scored_here, hardware=hardware)

    def work(self, trial: TrialSpec) -> tuple[Effort, Grid]:
        """Return the training, without its time, and the scoring, with as many scoring actors as the spec names.

        Raises:
            UserError: See ``forecast_trial``.
        """
        grid, rows = self._checked(trial)
        if trial.train is None:
            return NOTHING, grid
        tokens, flops = step_work(trial.train, shape=self.shape(trial), rows=rows)
        steps = trial.train.max_steps
        return Effort(tokens=steps * tokens, flops=steps * flops, seconds=None, cost=None), grid

    def shape(self, trial: TrialSpec) -> ModelShape:
        """Return the sizes of the trial's model."""
        return ModelShape.load(self.folder(trial))

    def folder(self, trial: TrialSpec) -> Path:
        """Return the folder with the config and the tokenizer of the trial's model."""
        key = digest(trial.model)
        if key not in self._folders:
            self._folders[key] = resolve_model(trial.model, cache=self._root.cache, weights=False)
        return self._folders[key]

    def _checked(self, trial: TrialSpec) -> tuple[Grid, Rows]:
        """Return the scoring and the training rows; raise an error if a row is too long or there are too few."""
        train, corpus = trial.train, trial.corpus
        if train is None or corpus is None:
            return self._grid(trial)[0], Rows(longest_tokens=0, mean_tokens=0, loss_tokens=0)
        limit_tokens = row_limit_tokens(self.folder(trial))
        check_corpus(train, num_rows=corpus.num_sequences, longest_row_tokens=corpus.sequence_len, limit_tokens=limit_tokens)
        grid, lengthening = self._grid(trial)
        longest = corpus.sequence_len * lengthening
        if corpus.objective == "language_modeling":
            return grid, Rows(longest_tokens=round(longest), mean_tokens=longest, loss_tokens=round(longest))
        mean = (corpus.min_context_tokens * lengthening + longest) / 2
        return grid, Rows(longest_tokens=round(longest), mean_tokens=mean, loss_tokens=SFT_LOSS_TOKENS)

    def _grid(self, trial: TrialSpec) -> tuple[Grid, float]:
        """Return the scoring, and the factor by which pauses lengthen a text."""
        fields_ = trial.resolved()
        key = digest([fields_[part] for part in ("model", "pauses", "eval", "engine", "adapter", "seed", "replicate", "resources")])
        if key not in self._grids:
            found = forecast_trial(trial, cache=self._root.cache, shared=self._shared)
            prompts = found.by_reuse[found.reuse]
            on_top = trial.pauses is not None and trial.pauses.budget == "content"
            content = prompts.asked_tokens - found.pause_tokens
            shape = self.shape(trial)
            grid = grid_of_prompts(prompts, shape=shape, answer_tokens=trial.eval.max_new_tokens, dtype=trial.model.dtype)
            self._grids[key] = grid, prompts.asked_tokens / content if on_top else 1.0
        return self._grids[key]


MOST_TRIALS = 20
"""Number of latest trials that are measured; ledgers take time to read."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The measured speed of one model on this storage, over its latest trials."""

    num_steps: int
    trained_tokens: int
    trained_seconds: float
    num_answers: int
    scored_flops: float
    """Operations of the prompts; ``scored_seconds`` includes the time of their answers."""
    scored_seconds: float
    """Time that one actor would have taken."""

    @classmethod
    def measure(cls, storage: Storage, model: ModelSpec, *, shape: ModelShape) -> Self:
        """Measure the latest trials of exactly this model spec."""
        trials = _latest(storage, model)
        rows = [row for folder in trials for row in Ledger(folder / "cells.jsonl").rows() if row.response is not None]
        flops = (
            shape.forward_flops(new_tokens=row.prefilled_tokens, past_tokens=max(0, row.prompt_tokens - row.prefilled_tokens), logit_rows=1)
            for row in rows
        )
        checkpoints = {str(read_json(folder / MANIFEST).get("checkpoint") or "") for folder in trials if is_complete(folder)} - {""}
        steps = [row for checkpoint in sorted(checkpoints) for row in read_json_lines(Path(checkpoint) / TRAINING_LOG)]
        return cls(
            num_steps=len(steps),
            trained_tokens=sum(row["tokens"] for row in steps),
            trained_seconds=math.fsum(row["seconds"] for row in steps),
            num_answers=len(rows),
            scored_flops=math.fsum(flops),
            scored_seconds=math.fsum(row.seconds for row in rows),
        )

    def training_seconds(self, tokens: int) -> float | None:
        """Return the time of training on so many tokens; None if no training was measured."""
        return tokens * self.trained_seconds / self.trained_tokens if self.trained_tokens else None

    def scoring_seconds(self, flops: float) -> float | None:
        """Return the time in which one actor answers prompts of so many operations; None if no answers were measured."""
        return flops * self.scored_seconds / self.scored_flops if self.scored_flops else None

    def __str__(self) -> str:
        measured = [f"{self.num_steps} training steps"] * bool(self.num_steps) + [f"{self.num_answers} answers"] * bool(self.num_answers)
        if not measured:
            return "not known: no trial of this model has run on this storage; name a GPU with --gpu, or run one trial (--max-trials 1)"
        return f"by the speed of {' and '.join(measured)} of this model on this storage"


def _latest(storage: Storage, model: ModelSpec) -> list[Path]:
    """Return the folders of the latest trials of this model, computed by transformers, newest first."""

    def ran_here(folder: Path) -> bool:
        spec = read_json(folder / "spec.json") if (folder / "spec.json").is_file() else {}
        return spec.get("model") == model.resolved() and spec["engine"]["kind"] == "hf"

    begun = [path.parent for path in storage.trials.glob("*/cells.jsonl")]
    newest = heapq.nlargest(10 * MOST_TRIALS, begun, key=lambda folder: (folder / "cells.jsonl").stat().st_mtime)
    return list(itertools.islice(filter(ran_here, newest), MOST_TRIALS))


StepName = Literal["data", "training", "scoring"]
State = Literal["finished", "stopped", "begun", "not begun"]


def total(efforts: Iterable[Effort]) -> Effort:
    """Return the sum of each amount; None where an effort does not know it."""
    known = list(efforts)
    columns = {amount.name: [getattr(effort, amount.name) for effort in known] for amount in fields(Effort)}
    return Effort(**{name: None if None in values else sum(values) for name, values in columns.items()})


@dataclass(frozen=True, kw_only=True)
class StepOutlook:
    """One step of a trial, and what is left of it."""

    name: StepName
    done: int
    """Number of training rows, optimizer steps or cells on storage."""
    total: int
    made_by: str | None
    """Label of the earlier trial that makes this for both trials; None if the trial makes it itself, or if it is done."""
    left: Effort
    """Effort of the part that is neither on storage nor made by another trial."""


@dataclass(frozen=True, kw_only=True)
class TrialOutlook:
    """One trial, its steps, and what is left of them."""

    label: str
    arm: str
    point: JsonObject
    replicate: int
    digest: str | None
    """Digest of the trial; None if the weights of its model, which are part of it, are not on this machine."""
    state: State
    steps: tuple[StepOutlook, ...]

    @property
    def left(self) -> Effort:
        """Effort that is left, over all steps."""
        return total(step.left for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class SweepForecast:
    """The forecast of a sweep."""

    trials: tuple[TrialOutlook, ...]
    points_to_come: int
    """Number of points that the search will choose by earlier results; ``trials`` has no trials of them."""
    example: tuple[TrialOutlook, ...]
    """The trials of one such point; empty if there are no points to come."""
    throughput: str
    """A phrase that says where the times come from."""
    too_large: tuple[str, ...]
    """Sentences that say what does not fit on the GPUs, and what would."""

    @property
    def left(self) -> Effort:
        """Effort that is left, if each point to come takes as much as the example."""
        return total([*(trial.left for trial in self.trials), total(trial.left for trial in self.example).times(self.points_to_come)])

    def as_json(self) -> JsonObject:
        """Return the forecast as plain data."""
        trials = {name: [asdict(each) | {"left": asdict(each.left)} for each in getattr(self, name)] for name in ("trials", "example")}
        return asdict(self) | trials | {"left": asdict(self.left)}


def forecast_sweep(sweep: SweepSpec, *, storage: Storage, hardware: Hardware | None, progress: Callable[[int, int], None]) -> SweepForecast:
    """Return the forecast of every trial of a sweep.

    Args:
        sweep: The sweep.
        storage: The storage root of the sweep; only its caches are written to.
        hardware: The GPUs of the sweep; None for times by the throughput measured on this storage.
        progress: Called with the number of trials that were examined, and the number of all.

    Raises:
        UserError: The sweep or a trial breaks a rule, or cannot be planned.
    """
    fixed = expand(sweep)
    learns = sweep.algorithm.kind == "tpe"
    example = [trial for trial in expand(sweep, points=[example_point(sweep)]) if trial.point] if learns else []
    points_to_come = sweep.algorithm.points if sweep.algorithm.kind == "tpe" else 0
    models = {digest(trial.spec.model): trial.spec for trial in [*fixed, *example]}
    if all(_weights_are_here(spec, storage) for spec in models.values()):
        known = SweepTrials(sweep, storage=storage, command="", progress=progress)
        if learns:
            chosen = [point for event in known.log.events() if event["event"] == "asked" for point in event["points"]]
            known.add(expand(sweep, points=chosen))
            points_to_come -= len(chosen)
        trials: list[tuple[PlannedTrial, PreparedTrial | None]] = [(each.planned, each.prepared) for each in known.by_digest.values()]
        inspector = _TrialInspector(storage, hardware, left_out=known.left_out())
    else:  # the digests of the trials need the weights
        trials, inspector = [(trial, None) for trial in fixed], _TrialInspector(storage, hardware, left_out=set())
    outlooks = []
    for number, (planned, prepared) in enumerate(trials):
        progress(number, len(trials))
        outlooks.append(inspector.outlook(planned, prepared))
    return SweepForecast(
        trials=tuple(outlooks),
        points_to_come=points_to_come,
        example=tuple(inspector.outlook(planned, None) for planned in example) if points_to_come else (),
        throughput=inspector.throughput,
        too_large=tuple(inspector.too_large),
    )


def _weights_are_here(spec: TrialSpec, storage: Storage) -> bool:
    if spec.train is None and isinstance(spec.engine, EndpointSpec):
        return True
    return any(resolve_model(spec.model, cache=storage.cache, weights=False).glob("*.safetensors"))


class _TrialInspector:
    """Examines one trial after another, and keeps record of what each will make for later ones."""

    def __init__(self, storage: Storage, hardware: Hardware | None, *, left_out: Collection[str]) -> None:
        self._storage, self._hardware, self._left_out = storage, hardware, left_out
        self._planner = TrialPlanner(storage)
        self._throughputs: dict[str, Throughput] = {}
        self._makers: dict[str, str] = {}
        self.too_large: dict[str, None] = {}

    @property
    def throughput(self) -> str:
        """A phrase that says where the times came from."""
        if self._hardware is not None:
            return f"{self._hardware.gpus} × {self._hardware.gpu.name}, {self._hardware.utilization:.0%} of its peak"
        return "; ".join(dict.fromkeys(str(measured) for measured in self._throughputs.values()))

    def outlook(self, planned: PlannedTrial, prepared: PreparedTrial | None) -> TrialOutlook:
        """Return the outlook of one trial; call it in the order of the sweep."""
        folder = self._storage.trials / prepared.digest if prepared else None
        finished = folder is not None and is_complete(folder)
        over = finished or (prepared is not None and prepared.digest in self._left_out)
        training, scoring = (NOTHING, NOTHING) if over else self._efforts(planned)
        steps = [*self._training_steps(planned, prepared, training, over=over, finished=finished)]
        steps.append(self._scoring_step(planned.spec, prepared, scoring, over=over))
        begun = any(step.done for step in steps if step.name != "data")  # the data is for many trials
        state: State = "finished" if finished else "stopped" if over else "begun" if begun else "not begun"
        return TrialOutlook(
            label=planned.label,
            arm=planned.arm,
            point=planned.point,
            replicate=planned.spec.replicate,
            digest=prepared.digest if prepared else None,
            state=state,
            steps=tuple(steps),
        )

    def _training_steps(
        self, planned: PlannedTrial, prepared: PreparedTrial | None, effort: Effort, *, over: bool, finished: bool
    ) -> Iterable[StepOutlook]:
        spec = planned.spec
        if spec.train is None or spec.corpus is None:
            return
        rows, steps = spec.corpus.num_sequences, spec.train.max_steps
        shards = self._storage.shards / digest(prepared.shards.identity()) if prepared and prepared.shards else None
        has_rows = finished or (shards is not None and is_complete(shards))
        texts = digest([spec.corpus.resolved(), spec.eval.resolved(), spec.pauses.resolved() if spec.pauses else None, spec.data_seed])
        maker = None if has_rows or over else self._maker(planned, "data", shards.name if shards else texts)
        yield StepOutlook(name="data", done=rows * has_rows, total=rows, made_by=maker, left=NOTHING)
        job = training_job(prepared, ShardSet.open(shards)) if prepared and shards and is_complete(shards) else None
        done = steps if finished else steps_on_storage(job, storage=self._storage) if job else 0
        same = [spec.model.resolved(), spec.train.identity(), shards.name if shards else texts, spec.data_seed]
        maker = None if done == steps or over else self._maker(planned, "training", train_digest(job) if job else digest(same))
        left = NOTHING if maker or over else effort.times(1 - done / steps)
        yield StepOutlook(name="training", done=done, total=steps, made_by=maker, left=left)

    def _maker(self, planned: PlannedTrial, step: StepName, key: str) -> str | None:
        """Return the label of the earlier trial that makes the same thing; None if this trial is the first."""
        maker = self._makers.setdefault(f"{step} {key}", planned.label)
        return maker if maker != planned.label else None

    def _scoring_step(self, spec: TrialSpec, prepared: PreparedTrial | None, effort: Effort, *, over: bool) -> StepOutlook:
        if prepared is None:
            return StepOutlook(name="scoring", done=0, total=sum(spec.eval.num_positions.values()), made_by=None, left=effort)
        answered = Ledger(self._storage.trials / prepared.digest / "cells.jsonl").done_ids()
        missing = [cell for cell in prepared.cells if cell.id not in answered]
        share = 0.0 if over else sum(new_tokens(by_position(missing))) / sum(new_tokens(by_position(prepared.cells)))
        total_cells = len(prepared.cells)
        return StepOutlook(name="scoring", done=total_cells - len(missing), total=total_cells, made_by=None, left=effort.times(share))

    def _efforts(self, planned: PlannedTrial) -> tuple[Effort, Effort]:
        """Return the efforts of the whole training and the whole scoring."""
        spec = planned.spec
        if known_shape(self._planner.folder(spec)) is None:
            return (UNKNOWN if spec.train else NOTHING), UNKNOWN
        if self._hardware is None:
            return self._measured(spec)
        plan = self._planner.plan(planned, hardware=self._hardware)
        self.too_large |= dict.fromkeys(plan.misfits(self._hardware))
        training, scoring = (
            Effort(tokens=work.tokens, flops=work.flops, seconds=work.seconds, cost=work.cost) if work else None
            for work in (plan.training, plan.evaluation)
        )
        return training or NOTHING, scoring or (UNKNOWN if isinstance(spec.engine, HfEngineSpec) else self._endpoint_effort(spec))

    def _measured(self, spec: TrialSpec) -> tuple[Effort, Effort]:
        """Return the efforts by the throughput that was measured with this model on this storage."""
        (training, grid), key = self._planner.work(spec), digest(spec.model)
        if key not in self._throughputs:
            self._throughputs[key] = Throughput.measure(self._storage, spec.model, shape=self._planner.shape(spec))
        throughput = self._throughputs[key]
        if spec.train is not None:
            training = replace(training, seconds=throughput.training_seconds(training.tokens or 0))
        if isinstance(spec.engine, EndpointSpec):
            return training, self._endpoint_effort(spec)
        seconds = throughput.scoring_seconds(grid.prompts.prefill_flops / spec.resources.scoring_bounds[1])
        return training, Effort(tokens=grid.prompts.prefilled_tokens, flops=grid.flops, seconds=seconds, cost=None)

    def _endpoint_effort(self, spec: TrialSpec) -> Effort:
        """Return the effort of scoring by a server: its price of all prompts, none of them cached, and of answers of full length."""
        _, grid = self._planner.work(spec)
        prices = spec.engine.prices if isinstance(spec.engine, EndpointSpec) else None
        answers = grid.prompts.num_prompts * grid.answer_tokens
        cost = None
        if prices is not None:
            cost = (grid.prompts.asked_tokens * prices.input_per_million + answers * prices.output_per_million) / 1e6
        return Effort(tokens=grid.prompts.asked_tokens, flops=None, seconds=None, cost=cost)
