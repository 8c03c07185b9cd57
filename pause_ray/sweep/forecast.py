"""What a sweep will do and take, before anything is started: every trial and step, what is on storage of it, and what is left.

Builds texts and prompts, and plans walks; loads no weights and starts no Ray. Times are those of a named GPU (``plan``), or as fast
as the same model was on this storage before (``sweep.pace``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pause_ray.corpus.shards import shards_digest
from pause_ray.engines.engine import EndpointSpec, HfEngineSpec
from pause_ray.engines.model_source import resolve_model
from pause_ray.needle.ledger import Ledger
from pause_ray.needle.task import Cell
from pause_ray.needle.walk import by_position, new_tokens
from pause_ray.plan import Site
from pause_ray.rows import ShardSet
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import Storage, is_complete
from pause_ray.sweep.log import SearchLog
from pause_ray.sweep.pace import Pace
from pause_ray.sweep.plans import Plans
from pause_ray.sweep.rounds import Rounds
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, example_point, expand
from pause_ray.train.launch import steps_on_storage, train_digest
from pause_ray.train.telemetry import known_shape
from pause_ray.trial.prepare import PreparedTrial, Seen, prepare
from pause_ray.trial.run import training_job
from pause_ray.trial.spec import TrialSpec

StepName = Literal["text", "training", "scoring"]
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
    rounds = _rounds(sweep, [*fixed, *example], storage, showing)
    trials: list[Known] = [(trial.planned, trial.prepared) for trial in rounds.trials.values()] if rounds else []
    asked = _asked(rounds.folder) if rounds and learns else []
    if rounds is None:
        trials = [(trial, None) for trial in fixed]
    elif asked:
        seen, known = Seen(), {trial.label for trial in fixed}
        chosen = [trial for trial in expand(sweep, points=asked) if trial.label not in known]
        trials += [(trial, prepare(trial.spec, cache=storage.cache, seen=seen)) for trial in chosen]
    points_to_come = sweep.algorithm.points - len(asked) if sweep.algorithm.kind == "tpe" else 0
    look = _Look(storage, site, left_out=rounds.left_out() if rounds else set())
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


def _rounds(sweep: SweepSpec, planned: Sequence[PlannedTrial], storage: Storage, showing: Showing) -> Rounds | None:
    """The sweep as it would begin; None where weights are not here to tell its trials by."""
    models = {digest(trial.spec.model): trial.spec for trial in planned}
    if not all(_weights_are_here(spec, storage) for spec in models.values()):
        return None
    return Rounds(sweep, storage=storage, command="", showing=showing)


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
        begun = any(step.done for step in steps if step.name != "text")  # text is for many trials
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
        rows, steps = spec.corpus.rows, spec.train.steps
        shards = self._storage.shards / shards_digest(prepared.shards) if prepared and prepared.shards else None
        has_rows = finished or (shards is not None and is_complete(shards))
        texts = digest([spec.corpus.resolved(), spec.eval.resolved(), spec.pauses.resolved() if spec.pauses else None, spec.data_seed])
        maker = None if has_rows or over else self._maker(planned, "text", shards.name if shards else texts)
        yield Step(name="text", done=rows * has_rows, total=rows, made_by=maker, left=NOTHING)
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
