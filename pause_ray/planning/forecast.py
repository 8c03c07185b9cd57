"""What a sweep will do and take, before anything is started: every trial and step, what is on storage of it, and what is left.

Builds texts and prompts, and plans shared prefixes; loads no weights and starts no Ray. Times are those of a named GPU
(``plan``), or as fast as the same model was on this storage before (``sweep.pace``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import Storage, is_complete
from pause_ray.data.shards import ShardSet
from pause_ray.data.spec import shards_digest
from pause_ray.evaluation.answer import CellRunner
from pause_ray.evaluation.haystack import check_fits, check_lengths, load_haystack, prompt_builder
from pause_ray.evaluation.ledger import Ledger
from pause_ray.evaluation.prefix_plan import Forecast, PrefixPlan, by_position, forecast, new_tokens, plan_prefixes, split_for_actors
from pause_ray.evaluation.suite import Cell, cells
from pause_ray.inference.engine import EndpointSpec, HfEngineSpec, Reuse, default_chunk_tokens, default_prefix_block_size
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.models.shape import ModelShape
from pause_ray.models.sources import model_limit_tokens, resolve_model, row_limit_tokens
from pause_ray.planning.throughput import Pace
from pause_ray.sweep.search import SweepTrials
from pause_ray.sweep.search_log import SearchLog
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, example_point, expand
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from pause_ray.training.batching import check_corpus
from pause_ray.training.launch import steps_on_storage, train_digest
from pause_ray.training.metrics import known_shape
from pause_ray.trial.needs import Grid, Plan, Rows, Site, grid_of_prompts, make_plan, step_work
from pause_ray.trial.prepare import PrepareCache, PreparedTrial, prepare
from pause_ray.trial.run import training_job
from pause_ray.trial.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class TrialForecast:
    """One trial's scoring, for every way to share prompts."""

    by_reuse: dict[Reuse, Forecast]
    reuse: Reuse
    """What the spec asks for."""
    chunk_tokens: int
    """Prompt tokens per forward pass that were assumed."""
    num_pauses: int
    """Marker groups in all prompts."""
    pause_tokens: int
    """Tokens of them."""
    num_actors: int
    """Among which the prompts are divided; weights, keys and values are in each."""

    def as_json(self) -> JsonObject:
        """Plain data."""
        return {**asdict(self), "by_reuse": {reuse: asdict(found) for reuse, found in self.by_reuse.items()}}


def forecast_trial(spec: TrialSpec, *, cache: Path, tokenizer: ModelTokenizer | None = None) -> TrialForecast:
    """Build the trial's prompts and plan their shared prefixes, for one actor or several.

    Args:
        spec: Any trial.
        cache: Of models and texts.
        tokenizer: The model's, where the caller has it already.

    Raises:
        ModelError: unknown model, a config that does not tell its shape, or a prompt that is too long for the model.
        CheckpointError: no adapter where the spec names one.
        SourceError: a document that cannot be read.
        TextError: a prompt cannot be built.
    """
    model_dir = resolve_model(spec.model, cache=cache, weights=False)
    limit_tokens = model_limit_tokens(model_dir)
    check_lengths(spec.eval, limit_tokens=limit_tokens, origin=spec.model.source)
    if spec.adapter is not None:
        Checkpoint.open(Path(spec.adapter))
    tokenizer = tokenizer or ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, spec.pauses)
    haystack = load_haystack(spec.eval, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
    builder = prompt_builder(haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed)
    reader = CellRunner(builder=builder, tokenizer=tokenizer, policy=spec.pauses, marker=marker, max_new_tokens=spec.eval.max_new_tokens)
    grid = cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed)
    prompts = {cell.id: prompt for cell, prompt in zip(grid, reader.prompts(grid), strict=True)}
    for prompt in prompts.values():
        check_fits(prompt, max_new_tokens=spec.eval.max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
    runs = split_for_actors(grid, num_actors=spec.resources.scoring_bounds[1])
    engine = spec.engine if isinstance(spec.engine, HfEngineSpec) else HfEngineSpec()
    chunk = engine.chunk_tokens or default_chunk_tokens(on_gpu=bool(spec.resources.scoring_gpus_per_actor))
    block = default_prefix_block_size(dtype=spec.model.dtype, quantize=spec.model.quantize, chunk_tokens=chunk)
    shape = ModelShape.load(model_dir)

    def of(reuse: Reuse) -> Forecast:
        plans = [
            plan_prefixes(
                [prompts[cell.id].ids for cell in run],
                reuse=reuse,
                prefix_block_size=block,
                lengths=[cell.context_tokens for cell in run],
            )
            for run in runs
        ]
        return forecast(
            PrefixPlan(tuple(each for plan in plans for each in plan.prompts)),
            shape,
            chunk_tokens=chunk,
            decode_batch=engine.answers_together(dtype=spec.model.dtype, quantize=spec.model.quantize),
            max_new_tokens=spec.eval.max_new_tokens,
            dtype=spec.model.dtype,
            quantize=spec.model.quantize,
        )

    modes: tuple[Reuse, ...] = ("none", "depth", "full")
    num_pauses = sum(prompt.num_pauses for prompt in prompts.values())
    return TrialForecast(
        by_reuse={reuse: of(reuse) for reuse in modes},
        reuse=engine.reuse,
        chunk_tokens=chunk,
        num_actors=len(runs),
        num_pauses=num_pauses,
        pause_tokens=num_pauses * len(marker.group_ids),
    )


def forecast_table(found: TrialForecast) -> Table:
    """For people: one row per way to share prompts."""
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


SFT_LEARNED_TOKENS = 64
"""Of a needle_sft row: the fact as answer and its end."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one trial, from its beginning to its end."""

    training_tokens: int
    training_flops: float
    grid: Grid
    """Of its cells."""


class Plans:
    """Plans trials of a sweep; what they have in common is found out once."""

    def __init__(self, root: Storage) -> None:
        """Find models and texts through the caches of ``root``."""
        self._root = root
        self._folders: dict[str, Path] = {}
        self._tokenizers: dict[Path, ModelTokenizer] = {}
        self._grids: dict[str, tuple[Grid, float]] = {}

    def plan(self, planned: PlannedTrial, *, site: Site) -> Plan:
        """One trial's training and scoring on ``site``.

        Raises:
            UserError: as ``trial.forecast.forecast_trial`` and ``plan.make_plan``.
        """
        trial = planned.spec
        there = {"scoring_actors": site.gpus, "scoring_gpus_per_actor": 1}
        grid, rows = self._checked(trial.model_copy(update={"resources": trial.resources.model_copy(update=there)}))
        scored_here = isinstance(trial.engine, HfEngineSpec)
        return make_plan(
            planned.label, shape=self.shape(trial), train=trial.train, rows=rows, grid=grid if scored_here else None, site=site
        )

    def work(self, trial: TrialSpec) -> Work:
        """One trial's tokens and operations, scored by as many actors as it names.

        Raises:
            UserError: as ``trial.forecast.forecast_trial``.
        """
        grid, rows = self._checked(trial)
        tokens, flops, steps = 0, 0, 0
        if trial.train is not None:
            tokens, flops = step_work(trial.train, shape=self.shape(trial), rows=rows)
            steps = trial.train.max_steps
        return Work(training_tokens=steps * tokens, training_flops=steps * flops, grid=grid)

    def shape(self, trial: TrialSpec) -> ModelShape:
        """Sizes of the trial's model."""
        return ModelShape.load(self.folder(trial))

    def _checked(self, trial: TrialSpec) -> tuple[Grid, Rows]:
        """What is asked and what is trained on."""
        if trial.train is not None and trial.corpus is not None:
            tokens, limit_tokens = trial.corpus.sequence_len, row_limit_tokens(self.folder(trial))
            check_corpus(trial.train, num_rows=trial.corpus.num_sequences, longest_row_tokens=tokens, limit_tokens=limit_tokens)
        grid, paused = self._grid(trial)
        return grid, _rows(trial, paused=paused)

    def folder(self, trial: TrialSpec) -> Path:
        """With the config and tokenizer of the trial's model."""
        key = digest(trial.model)
        if key not in self._folders:
            self._folders[key] = resolve_model(trial.model, cache=self._root.cache, weights=False)
        return self._folders[key]

    def _tokenizer(self, trial: TrialSpec) -> ModelTokenizer:
        folder = self.folder(trial)
        if folder not in self._tokenizers:
            self._tokenizers[folder] = ModelTokenizer.load(folder)
        return self._tokenizers[folder]

    def _grid(self, trial: TrialSpec) -> tuple[Grid, float]:
        """The scoring, and how much longer pauses make a text."""
        asked = trial.resolved()
        key = digest([asked[part] for part in ("model", "pauses", "eval", "engine", "adapter", "seed", "replicate", "resources")])
        if key not in self._grids:
            found = forecast_trial(trial, cache=self._root.cache, tokenizer=self._tokenizer(trial))
            prompts = found.by_reuse[found.reuse]
            on_top = trial.pauses is not None and trial.pauses.budget == "content"
            content = prompts.asked_tokens - found.pause_tokens
            shape = self.shape(trial)
            grid = grid_of_prompts(prompts, shape=shape, answer_tokens=trial.eval.max_new_tokens, dtype=trial.model.dtype)
            self._grids[key] = grid, prompts.asked_tokens / content if on_top else 1.0
        return self._grids[key]


def plan_trials(trials: Sequence[PlannedTrial], *, site: Site, root: Storage) -> list[Plan]:
    """The plan of each trial on ``site``.

    Raises:
        UserError: a trial that cannot be planned.
    """
    plans = Plans(root)
    return [plans.plan(trial, site=site) for trial in trials]


def _rows(trial: TrialSpec, *, paused: float) -> Rows:
    if trial.train is None or trial.corpus is None:
        return Rows(longest_tokens=0, mean_tokens=0, loss_tokens=0)
    longest = trial.corpus.sequence_len * paused
    if trial.corpus.objective == "language_modeling":
        return Rows(longest_tokens=round(longest), mean_tokens=longest, loss_tokens=round(longest))
    mean = (trial.corpus.min_context_tokens * paused + longest) / 2
    return Rows(longest_tokens=round(longest), mean_tokens=mean, loss_tokens=SFT_LEARNED_TOKENS)


StepName = Literal["data", "training", "scoring"]
State = Literal["finished", "stopped", "begun", "not begun"]
Showing = Callable[[int, int], None]
Known = tuple[PlannedTrial, PreparedTrial | None]
"""A trial; prepared where its model's weights are here to tell it by."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What some work takes; None where it cannot be said."""

    tokens: int | None = 0
    """That go through the model."""
    flops: float | None = 0.0
    """With answers of full length."""
    seconds: float | None = 0.0
    """Of computing, one trial after another; starting and loading come on top."""
    cost: float | None = 0.0
    """Of the GPUs, or of an endpoint's answers."""

    def times(self, share: float) -> Effort:
        """So many times as much."""
        tokens = None if self.tokens is None else round(self.tokens * share)
        flops, seconds, cost = (None if value is None else value * share for value in (self.flops, self.seconds, self.cost))
        return Effort(tokens=tokens, flops=flops, seconds=seconds, cost=cost)


NOTHING = Effort()
UNKNOWN = Effort(tokens=None, flops=None, seconds=None, cost=None)


def total(efforts: Iterable[Effort]) -> Effort:
    """The sum; None where one of them is not known."""

    def of(values: Sequence[float | None]) -> float | None:
        return None if None in values else sum(value for value in values if value is not None)

    found = list(efforts)
    tokens = of([effort.tokens for effort in found])
    return Effort(
        tokens=None if tokens is None else round(tokens),
        flops=of([effort.flops for effort in found]),
        seconds=of([effort.seconds for effort in found]),
        cost=of([effort.cost for effort in found]),
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of a trial."""

    name: StepName
    done: int
    """On storage already: training rows, optimizer steps, cells."""
    total: int
    made_by: str | None
    """Label of the trial before it that makes this for both; None where it makes it itself, or it is done."""
    left: Effort
    """Of what is not done, and is not made by another."""


@dataclass(frozen=True, kw_only=True)
class TrialOutlook:
    """One trial and what is left of it."""

    label: str
    arm: str
    point: JsonObject
    replicate: int
    digest: str | None
    """None where the model's weights are not here, which are a part of it."""
    state: State
    steps: tuple[Step, ...]

    @property
    def left(self) -> Effort:
        """Of all steps."""
        return total(step.left for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class SweepForecast:
    """All that is known of a sweep before it runs."""

    trials: tuple[TrialOutlook, ...]
    points_to_come: int
    """That the search will choose by what it learns; their trials are not among ``trials``."""
    example: tuple[TrialOutlook, ...]
    """What one of those points takes; empty where there are none."""
    pace: str
    """Where times come from, for people."""
    misfits: tuple[str, ...]
    """What does not fit on the GPUs, and what would."""

    @property
    def left(self) -> Effort:
        """Of the trials, and of the points to come if each takes as much as the example."""
        return total([*(trial.left for trial in self.trials), total(trial.left for trial in self.example).times(self.points_to_come)])

    def as_json(self) -> JsonObject:
        """Plain data."""
        trials = [asdict(trial) | {"left": asdict(trial.left)} for trial in self.trials]
        example = [asdict(trial) | {"left": asdict(trial.left)} for trial in self.example]
        return asdict(self) | {"trials": trials, "example": example, "left": asdict(self.left)}


def forecast_sweep(sweep: SweepSpec, *, storage: Storage, site: Site | None, showing: Showing) -> SweepForecast:
    """Look at every trial of a sweep.

    Args:
        sweep: The sweep.
        storage: Where it would run; only its caches are written to.
        site: The GPUs that it would run on; None for times as measured on this storage.
        showing: Told how many trials of how many were looked at.

    Raises:
        UserError: the sweep or a trial breaks a rule, or cannot be planned.
    """
    fixed = expand(sweep)
    learns = sweep.algorithm.kind == "tpe"
    example = [trial for trial in expand(sweep, points=[example_point(sweep)]) if trial.point] if learns else []
    known = _known_trials(sweep, [*fixed, *example], storage, showing)
    trials: list[Known] = [(trial.planned, trial.prepared) for trial in known.by_digest.values()] if known else []
    asked = _asked(known.folder) if known and learns else []
    if known is None:
        trials = [(trial, None) for trial in fixed]
    elif asked:
        seen, labels = PrepareCache(), {trial.label for trial in fixed}
        chosen = [trial for trial in expand(sweep, points=asked) if trial.label not in labels]
        trials += [(trial, prepare(trial.spec, cache=storage.cache, shared=seen)) for trial in chosen]
    points_to_come = sweep.algorithm.points - len(asked) if sweep.algorithm.kind == "tpe" else 0
    look = _Look(storage, site, left_out=known.left_out() if known else set())
    found = []
    for number, (planned, prepared) in enumerate(trials):
        showing(number, len(trials))
        found.append(look.at(planned, prepared))
    return SweepForecast(
        trials=tuple(found),
        points_to_come=points_to_come,
        example=tuple(look.at(planned, None) for planned in example) if points_to_come else (),
        pace=look.pace,
        misfits=tuple(look.misfits),
    )


def _known_trials(sweep: SweepSpec, planned: Sequence[PlannedTrial], storage: Storage, showing: Showing) -> SweepTrials | None:
    """The sweep as it would begin; None where weights are not here to tell its trials by."""
    models = {digest(trial.spec.model): trial.spec for trial in planned}
    if not all(_weights_are_here(spec, storage) for spec in models.values()):
        return None
    return SweepTrials(sweep, storage=storage, command="", progress=showing)


def _asked(folder: Path) -> list[JsonObject]:
    """Points that a search that learns has asked for."""
    return [point for event in SearchLog(folder).events() if event["event"] == "asked" for point in event["points"]]


def _weights_are_here(spec: TrialSpec, storage: Storage) -> bool:
    if spec.train is None and isinstance(spec.engine, EndpointSpec):
        return True
    return any(resolve_model(spec.model, cache=storage.cache, weights=False).glob("*.safetensors"))


class _Look:
    """Looks at one trial after another, and remembers what each will leave for those behind it."""

    def __init__(self, storage: Storage, site: Site | None, *, left_out: Collection[str]) -> None:
        self._storage, self._site, self._left_out = storage, site, left_out
        self._plans = Plans(storage)
        self._paces: dict[str, Pace] = {}
        self._makers: dict[str, str] = {}
        self.misfits: dict[str, None] = {}

    @property
    def pace(self) -> str:
        """Where the times came from."""
        if self._site is not None:
            return f"{self._site.gpus} × {self._site.gpu.name}, {self._site.utilization:.0%} of its peak"
        return "; ".join(dict.fromkeys(pace.words for pace in self._paces.values()))

    def at(self, planned: PlannedTrial, prepared: PreparedTrial | None) -> TrialOutlook:
        """One trial."""
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
    ) -> Iterable[Step]:
        spec = planned.spec
        if spec.train is None or spec.corpus is None:
            return
        rows, steps = spec.corpus.num_sequences, spec.train.max_steps
        shards = self._storage.shards / shards_digest(prepared.shards) if prepared and prepared.shards else None
        has_rows = finished or (shards is not None and is_complete(shards))
        texts = digest([spec.corpus.resolved(), spec.eval.resolved(), spec.pauses.resolved() if spec.pauses else None, spec.data_seed])
        maker = None if has_rows or over else self._maker(planned, "data", shards.name if shards else texts)
        yield Step(name="data", done=rows * has_rows, total=rows, made_by=maker, left=NOTHING)
        job = training_job(prepared, ShardSet.open(shards)) if prepared and shards and is_complete(shards) else None
        done = steps if finished else steps_on_storage(job, storage=self._storage) if job else 0
        same = [spec.model.resolved(), spec.train.identity(), shards.name if shards else texts, spec.data_seed]
        maker = None if done == steps or over else self._maker(planned, "training", train_digest(job) if job else digest(same))
        left = NOTHING if maker or over else effort.times(1 - done / steps)
        yield Step(name="training", done=done, total=steps, made_by=maker, left=left)

    def _maker(self, planned: PlannedTrial, step: StepName, key: str) -> str | None:
        """The label of the trial that comes to this before; None for the first one."""
        maker = self._makers.setdefault(f"{step} {key}", planned.label)
        return maker if maker != planned.label else None

    def _scoring_step(self, spec: TrialSpec, prepared: PreparedTrial | None, effort: Effort, *, over: bool) -> Step:
        if prepared is None:
            return Step(name="scoring", done=0, total=sum(spec.eval.num_positions.values()), made_by=None, left=effort)
        answered = Ledger(self._storage.trials / prepared.digest / "cells.jsonl").done_ids()
        missing = [cell for cell in prepared.cells if cell.id not in answered]
        share = 0.0 if over else _work(missing) / _work(prepared.cells)
        total_cells = len(prepared.cells)
        return Step(name="scoring", done=total_cells - len(missing), total=total_cells, made_by=None, left=effort.times(share))

    def _efforts(self, planned: PlannedTrial) -> tuple[Effort, Effort]:
        """Training and scoring, from beginning to end."""
        spec = planned.spec
        if known_shape(self._plans.folder(spec)) is None:
            return (UNKNOWN if spec.train else NOTHING), UNKNOWN
        if self._site is None:
            return self._measured(spec)
        plan = self._plans.plan(planned, site=self._site)
        for remedy in (plan.remedy, _too_large(plan.gpus_per_model, self._site)):
            if remedy is not None:
                self.misfits[remedy] = None
        training, scoring = (
            Effort(tokens=its.tokens, flops=its.flops, seconds=its.seconds, cost=its.cost) if its else None
            for its in (plan.training, plan.evaluation)
        )
        return training or NOTHING, scoring or (UNKNOWN if isinstance(spec.engine, HfEngineSpec) else self._answered(spec))

    def _measured(self, spec: TrialSpec) -> tuple[Effort, Effort]:
        work, key = self._plans.work(spec), digest(spec.model)
        if key not in self._paces:
            self._paces[key] = Pace.measure(self._storage, spec.model, shape=self._plans.shape(spec))
        pace, grid = self._paces[key], work.grid
        training = NOTHING
        if spec.train is not None:
            tokens, flops = work.training_tokens, work.training_flops
            training = Effort(tokens=tokens, flops=flops, seconds=pace.training_seconds(tokens), cost=None)
        if isinstance(spec.engine, EndpointSpec):
            return training, self._answered(spec)
        seconds = pace.scoring_seconds(grid.prompts.prefill_flops)
        actors = spec.resources.scoring_bounds[1]
        scoring = Effort(
            tokens=grid.prompts.prefilled_tokens, flops=grid.flops, seconds=None if seconds is None else seconds / actors, cost=None
        )
        return training, scoring

    def _answered(self, spec: TrialSpec) -> Effort:
        """Scoring by a server: what it charges for prompts and answers of full length, none of them cached."""
        grid = self._plans.work(spec).grid
        prices = spec.engine.prices if isinstance(spec.engine, EndpointSpec) else None
        answers = grid.prompts.num_prompts * grid.answer_tokens
        cost = None
        if prices is not None:
            cost = (grid.prompts.asked_tokens * prices.input_per_million + answers * prices.output_per_million) / 1e6
        return Effort(tokens=grid.prompts.asked_tokens, flops=None, seconds=None, cost=cost)


def _work(cells: Sequence[Cell]) -> float:
    """Prompt tokens of these cells, roughly, what they share counted once."""
    return sum(new_tokens(by_position(cells)))


def _too_large(gpus_per_model: int, site: Site) -> str | None:
    if gpus_per_model <= site.gpus:
        return None
    return f"scoring needs {gpus_per_model} GPUs of this size for one copy of the model, and there are {site.gpus}"
