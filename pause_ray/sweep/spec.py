"""The specification of a sweep, and the trials that follow from it: one trial, a search over its dotted paths, arms, replicates.

Every arm is combined with every point of the search, but is not varied along a path that it sets itself, or whose branch it sets: an arm
with ``train: null`` has no LoRA rank. Equal trials are run once.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec, check_path, digest, inline_files, read_yaml, with_overrides
from pause_ray.evaluation.compare import ObjectiveSpec
from pause_ray.evaluation.suite import proxy_suite
from pause_ray.sweep.search_space import ABSENT, DOMAIN_FIELDS, Constraint, Domain, corners, drawn_points, grid_points, value_at
from pause_ray.trial.spec import FILE_FIELDS, TrialSpec


class GridAlgorithm(Spec):
    """Every combination of the listed values."""

    kind: Literal["grid"] = "grid"


class RandomAlgorithm(Spec):
    """Points drawn independently of each other, none twice; all are known before anything runs."""

    kind: Literal["random"]
    points: int = Field(ge=1)
    """Number of points."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; it is no trial's seed."""


class TpeAlgorithm(Spec):
    """Points near those that did well: a tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS), by Optuna."""

    kind: Literal["tpe"]
    points: int = Field(ge=2)
    """Number of points in all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; it is no trial's seed."""
    random_points: int = Field(default=8, ge=1)
    """Number of points that are drawn at random before the estimator is used."""
    at_a_time: int = Field(default=1, ge=1)
    """How many are asked for, and run, before the next are chosen: as many trials can run side by side."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        for name, value, problem in (
            ("random_points", self.random_points, "nothing is left to choose by what was learned"),
            ("at_a_time", self.at_a_time, "all are asked for before the first value is known"),
        ):
            if value >= self.points:
                raise ValueError(f"{name} {value} of points {self.points}: {problem}; lower {name}, or use kind: random")
        return self


AlgorithmSpec = Annotated[GridAlgorithm | RandomAlgorithm | TpeAlgorithm, Field(discriminator="kind")]


class ProxySpec(Spec):
    """A cheap suite for adapters that are still being trained: many keys in one context (task multi_key), with one question for each."""

    facts: int = Field(default=16, ge=2)
    """Facts in the context, evenly spaced; one question for each."""
    context_tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Lengths of the context; null: the suite's longest that fits."""


class SchedulerSpec(Spec):
    """Early stopping: ends trainings whose adapters score worse on the proxy than others did after as many optimizer steps."""

    kind: Literal["asha"]
    """Ray Tune's ASHA goes on with the best 1/``reduction_factor`` at each rung (Li et al. 2020, arXiv 1810.05934)."""
    grace_period: int = Field(ge=1)
    """Optimizer steps before the first rung; no trial is stopped earlier."""
    reduction_factor: int = Field(default=3, ge=2)
    """Each rung is at this many times the optimizer steps of the one before it."""
    proxy: ProxySpec = ProxySpec()
    """The suite that is asked at a rung."""

    def steps(self, max_steps: int) -> tuple[int, ...]:
        """Return the optimizer steps of the rungs, ascending; the end of the training is not a rung."""
        steps = (self.grace_period * self.reduction_factor**rung for rung in itertools.count())
        return tuple(itertools.takewhile(lambda step: step < max_steps, steps))


SAME_FOR_ALL = ("replicate", "resources")
"""Fields of a trial that the sweep sets, or that do not change the result; no search or arm may set them."""
PROBES = 16
"""Most points, and most values of a path, with which a search is checked whose own points are not known yet."""
MOST_VALUE_CHARS = 40
"""Most characters of a searched value that a label shows."""


class SweepSpec(Spec):
    """Which trials to run, and how to compare them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Names the MLflow experiment, the report and the sweep's folder."""
    trial: JsonObject
    """The trial that everything else varies: sparse, its defaults filled in per trial."""
    arm: str = Field(default="pause_tuned", pattern=r"^[a-z0-9][a-z0-9_]*$")
    """Name of the unchanged trial's arm."""
    search: dict[str, Domain] = Field(default_factory=dict)
    """Dotted path of the trial → values, for example ``{grid: [1, 2, 4]}`` (``sweep.search_space``)."""
    constraints: tuple[Constraint, ...] = ()
    """Rules that every trial keeps; points of the search that break one are left out, or drawn again."""
    algorithm: AlgorithmSpec = GridAlgorithm()
    """How points of the search are chosen."""
    objective: ObjectiveSpec = ObjectiveSpec()
    """Number that the search maximises or minimises, and by which the best trial is chosen."""
    scheduler: SchedulerSpec | None = None
    """Ends trainings of the unchanged trial's arm early; null trains all to the end."""
    arms: dict[str, JsonObject] = Field(default_factory=dict)
    """Further conditions: name → dotted paths and their values (a mapping or null replaces the whole branch)."""
    replicates: int = Field(default=1, ge=1)
    """Repetitions of every trial, each with its own haystack order, needle wording and seed."""
    compare_to: str | None = None
    """The arm that the others are compared with; null: the first of ``arms``."""
    control: str | None = None
    """The arm that was tuned the same way without pauses: what pause-tuned arms add to it is the effect of the pauses."""
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """Trials at a time; null: as many as the GPUs allow, one on CPUs."""
    trial_timeout_minutes: float | None = Field(default=None, gt=0)
    """A trial of which nothing was heard for so long is ended and counts as failed; null waits for ever."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.arm in self.arms:
            raise ValueError(f"arms: {self.arm} is the name of the unchanged trial's arm; choose another, or set arm")
        known = [self.arm, *self.arms]
        for field, name in (("compare_to", self.compare_to), ("control", self.control)):
            if name is not None and name not in known:
                raise ValueError(f"{field} {name!r} is none of the arms {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _algorithm_fits_the_space(self) -> Self:
        kind = self.algorithm.kind
        for path, domain in self.search.items():
            if kind == "grid" != domain.key:
                raise ValueError(
                    f"search.{path}: {domain.key} is a domain to draw from, and algorithm grid takes every value; "
                    "list values under grid, or set algorithm, for example {kind: random, points: 20}"
                )
        if kind != "grid" and not self.search:
            raise ValueError(f"algorithm {kind} has nothing to choose: search is empty; give it paths, or leave algorithm out")
        if kind == "tpe" and self.scheduler is not None:
            raise ValueError(
                f"scheduler {self.scheduler.kind} and algorithm tpe exclude each other: the value of a trial that was stopped at a rung "
                "is a proxy's, which does not compare with full scores; leave one of them out, or use algorithm random"
            )
        return self

    @property
    def origin(self) -> str:
        """The name of the sweep in error messages."""
        return f"sweep {self.name}"

    @property
    def reference_arm(self) -> str:
        """The arm that the others are compared with."""
        return self.compare_to or next(iter(self.arms), self.arm)


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One trial of a sweep and its place in it."""

    arm: str
    point: JsonObject
    """Searched paths and their values, those that apply to the arm."""
    spec: TrialSpec

    @property
    def label(self) -> str:
        """The trial's name for people: ``pause_tuned every=2 rank=16 #0``."""
        point = "".join(f" {path.rsplit('.', 1)[-1]}={value}" for path, value in self.point.items())
        return f"{self.arm}{point} #{self.spec.replicate}"


def read_sweep(path: Path, overrides: JsonObject) -> SweepSpec:
    """Read a sweep from its YAML file; ``overrides`` are dotted paths of the sweep, such as ``trial.train.max_steps``.

    Raises:
        SpecError: as for ``SweepSpec.parse``; or the sweep has no such path.
    """
    data = read_yaml(path)
    for dotted in overrides:
        if dotted.startswith("search.") and isinstance(data.setdefault("search", {}), dict):
            searched, _, field = dotted.removeprefix("search.").rpartition(".")
            data["search"].setdefault(searched if field in DOMAIN_FIELDS else f"{searched}.{field}".lstrip("."), {})
        if dotted.startswith("trial."):
            check_path(TrialSpec, dotted.removeprefix("trial."), origin="--set")
        else:
            check_path(SweepSpec, dotted.split(".")[0] if dotted.startswith(("search.", "arms.")) else dotted, origin="--set")
    data = _with_files(with_overrides(_with_files(data, path), overrides), path)
    return SweepSpec.parse(data, origin=str(path))


def _with_files(data: JsonObject, path: Path) -> JsonObject:
    """Return sparse sweep data with the content of every file that its trial or an arm names."""

    def inlined(fields: Any) -> Any:
        return inline_files(fields, FILE_FIELDS, origin=path) if isinstance(fields, dict) else fields

    arms = data.get("arms")
    whole = data | ({"arms": {name: inlined(changes) for name, changes in arms.items()}} if isinstance(arms, dict) else {})
    return whole | ({"trial": inlined(data["trial"])} if "trial" in data else {})


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A condition of a sweep, at any point of the search."""

    sweep: SweepSpec
    name: str
    changes: JsonObject
    """Dotted paths and values; empty for the unchanged trial's arm."""

    @property
    def varied(self) -> list[str]:
        """The searched paths that the arm does not set itself."""
        return [path for path in self.sweep.search if not any(f"{path}.".startswith(f"{changed}.") for changed in self.changes)]

    def applied(self, point: JsonObject) -> JsonObject:
        """Return the values of a point that apply to the arm."""
        return {path: point[path] for path in self.varied}

    def trial(self, applied: JsonObject, *, replicate: int) -> TrialSpec | None:
        """Return the arm's trial at a point, or None if a constraint of the sweep leaves it out.

        Raises:
            SpecError: the trial breaks a rule of its own.
        """
        data = with_overrides(self.sweep.trial, {**self.changes, **applied, "replicate": replicate})
        try:
            spec = TrialSpec.parse(data, origin=f"{self.sweep.origin}: arm {self.name} {applied or ''}".rstrip())
        except SpecError:
            if self._is_left_out(data):
                return None  # a constraint may be there to exclude trials that break a rule
            raise
        return None if self._is_left_out(spec.resolved()) else spec

    def _is_left_out(self, trial: JsonObject) -> bool:
        return any(constraint.holds(trial) is False for constraint in self.sweep.constraints)


def arms_of(sweep: SweepSpec) -> list[Arm]:
    """Return the unchanged trial's arm, then the others."""
    return [Arm(sweep=sweep, name=name, changes=changes) for name, changes in {sweep.arm: {}, **sweep.arms}.items()]


def allows(sweep: SweepSpec, point: JsonObject) -> bool:
    """Return whether the constraints allow the unchanged trial at a point; ``SpecError`` if it breaks a rule and they do not exclude it."""
    return not sweep.constraints or arms_of(sweep)[0].trial(point, replicate=0) is not None


def known_points(sweep: SweepSpec) -> list[JsonObject] | None:
    """Return the points of the search, or None if the algorithm chooses them while the sweep runs.

    Raises:
        SpecError: the constraints allow no point, or fewer than are wanted.
    """
    algorithm = sweep.algorithm
    if isinstance(algorithm, GridAlgorithm):
        return grid_points(sweep.search, functools.partial(allows, sweep), origin=sweep.origin)
    return _drawn(sweep, algorithm.points, seed=algorithm.seed) if isinstance(algorithm, RandomAlgorithm) else None


def example_point(sweep: SweepSpec) -> JsonObject:
    """Return a valid point of a search whose points are not known yet; always the same one."""
    return _drawn(sweep, 1, seed=0)[0]


def _drawn(sweep: SweepSpec, points: int, *, seed: int) -> list[JsonObject]:
    return drawn_points(sweep.search, functools.partial(allows, sweep), points=points, seed=seed, origin=sweep.origin)


def expand(sweep: SweepSpec, points: Sequence[JsonObject] | None = None) -> list[PlannedTrial]:
    """Return every distinct trial of the sweep: arm by arm, point by point, replicate by replicate.

    Args:
        sweep: The sweep.
        points: The points to run. None: check the whole sweep and take those that are known before anything runs, which are none with
            algorithm tpe. Trials that the search does not vary are included in any case.

    Raises:
        SpecError: a trial breaks a rule, two arms are the same trial, or a path, arm, constraint, objective or scheduler has no effect.
    """
    _check_paths(sweep)
    if points is not None:
        return _planned(sweep, points, each_arm=False)
    if not isinstance(sweep.algorithm, GridAlgorithm):
        _check_corners(sweep)
    known = known_points(sweep)
    tried = known or []
    if isinstance(sweep.algorithm, TpeAlgorithm):
        ends = [point for point in corners(sweep.search) if allows(sweep, point)]
        tried = ends + _drawn(sweep, sweep.algorithm.points, seed=0)[:PROBES]
    planned = _planned(sweep, tried)
    _check_search(sweep, tried, planned)
    return _planned(sweep, []) if known is None else planned


def listed_trials(sweep: SweepSpec) -> list[PlannedTrial]:
    """Check the sweep and return the trials that are known before it runs: all, or with a TPE search those of ``example_point``."""
    planned = expand(sweep)
    return expand(sweep, [example_point(sweep)]) if sweep.algorithm.kind == "tpe" else planned


def _planned(sweep: SweepSpec, points: Sequence[JsonObject], *, each_arm: bool = True) -> list[PlannedTrial]:
    """Return the trials at these points; with ``each_arm``, an arm that has no trial at any of them is refused."""
    planned: dict[str, PlannedTrial] = {}
    for arm in arms_of(sweep):
        trials = _trials(arm, points)
        if not trials and ((points and each_arm) or not arm.varied):
            broken = ", ".join(constraint.rule for constraint in sweep.constraints)
            raise SpecError(f"{sweep.origin}: arm {arm.name}: none of its trials keeps the constraints: {broken}; drop it or change them")
        for trial in trials:
            key = digest(trial.spec.defining())
            if key in planned and planned[key].arm != arm.name:
                same = f"{planned[key].arm} and {arm.name}"
                raise SpecError(f"{sweep.origin}: arms {same} are the same trial; change what sets them apart, or drop one")
            planned.setdefault(key, trial)
    return list(planned.values())


def _trials(arm: Arm, points: Sequence[JsonObject]) -> list[PlannedTrial]:
    distinct = {digest(applied): applied for applied in map(arm.applied, points)} if arm.varied else {"": {}}
    found = []
    for applied, replicate in itertools.product(distinct.values(), range(arm.sweep.replicates)):
        spec = arm.trial(applied, replicate=replicate)
        if spec is None:
            continue
        if arm.name == arm.sweep.control and (spec.pauses is not None or (spec.train is None and spec.adapter is None)):
            raise SpecError(f"{arm.sweep.origin}: control {arm.name}: must be tuned, and without pauses, to show what the pauses add")
        found.append(PlannedTrial(arm=arm.name, point=applied, spec=spec))
    return found


def _check_paths(sweep: SweepSpec) -> None:
    """Refuse paths that a trial does not have, or that the sweep sets itself."""
    if "replicate" in sweep.trial:
        replicate = sweep.trial["replicate"]
        raise SpecError(f"{sweep.origin}: trial.replicate {replicate} is set by the sweep, from 0 to replicates - 1; leave it out")
    origin = f"{sweep.origin}: search"
    for path in sweep.search:
        check_path(TrialSpec, path, origin=origin)
        if path.split(".")[0] in SAME_FOR_ALL:
            raise SpecError(f"{origin}: {path} cannot be searched: it is set by the sweep or has no effect on the result")
        if above := [other for other in sweep.search if path.startswith(f"{other}.")]:
            raise SpecError(f"{origin}: {path} is a part of {above[0]}, which is searched too; drop one of them")
        if branch := _null_branch(sweep.trial, path):
            raise SpecError(f"{origin}: no trial reads {path}, as trial.{branch} is null; give trial.{branch}, or drop the path")
    for name, changes in sweep.arms.items():
        for path in changes:
            check_path(TrialSpec, path, origin=f"{sweep.origin}: arms.{name}")
            if path.split(".")[0] in SAME_FOR_ALL:
                raise SpecError(f"{sweep.origin}: arms.{name}: {path} is the same for all arms; set it in trial")
    origin = f"{sweep.origin}: constraints"
    for constraint in sweep.constraints:
        for path in constraint.paths:
            check_path(TrialSpec, path, origin=origin)
            if path == "replicate":
                raise SpecError(f"{origin}: {constraint.rule}: replicate is set by the sweep; constrain another path")


def _null_branch(trial: JsonObject, path: str) -> str | None:
    """Return the branch above ``path`` that is null in the sparse trial, explicitly or by default; None if there is none."""
    nested = with_overrides({}, trial)
    for depth in range(path.count("."), 0, -1):
        branch = path.rsplit(".", depth)[0]
        given = value_at(nested, branch)
        if given is None or (given is ABSENT and branch in TrialSpec.model_fields and TrialSpec.model_fields[branch].default is None):
            return branch
    return None


def _check_corners(sweep: SweepSpec) -> None:
    """Refuse domains with values at which a trial breaks a rule, before any of their points is drawn."""
    for point, arm in itertools.product(corners(sweep.search), arms_of(sweep)):
        try:
            arm.trial(arm.applied(point), replicate=0)
        except SpecError as error:
            raise SpecError(f"{error}; narrow a domain, or add a constraint that leaves such points out") from error


def _check_search(sweep: SweepSpec, points: Sequence[JsonObject], planned: Sequence[PlannedTrial]) -> None:
    """Refuse what has no effect, as points of the search and their trials show; it would otherwise be found after hours."""
    origin = sweep.origin
    for path in sweep.search:
        if not any(_reads(arm, path, points) for arm in arms_of(sweep) if path in arm.varied):
            raise SpecError(
                f"{origin}: search: {path} changes no result: no trial reads it, or it only decides how one is computed; drop it"
            )
    for constraint in sweep.constraints:
        if all(constraint.holds(trial.spec.resolved()) is None for trial in planned):
            raise SpecError(f"{origin}: constraints: {constraint.rule}: no trial has both values; correct it, or drop it")
    ours = [trial.spec for trial in planned if trial.arm == sweep.arm]
    metric = sweep.objective.metric
    if not any(sweep.objective.is_measured_by(spec.eval, replicate=spec.replicate, seed=spec.data_seed) for spec in ours):
        raise SpecError(
            f"{origin}: objective.metric {metric}: no task of arm {sweep.arm} asks cells that count for it; choose another metric, or "
            "other depths in eval"
        )
    if sweep.scheduler is not None:
        _check_scheduler(sweep.scheduler, [spec for spec in ours if spec.replicate == 0], origin=f"{origin}: scheduler")


def _reads(arm: Arm, path: str, points: Sequence[JsonObject]) -> bool:
    """Return whether two values of ``path`` make different trials of the arm at one of the first points."""
    domain = arm.sweep.search[path]
    values = list(itertools.islice(domain.listed() or domain.ends(), PROBES))
    compared = False
    for point in itertools.islice(points, PROBES):
        trials = [trial for value in values if (trial := arm.trial(arm.applied(point | {path: value}), replicate=0))]
        if len({digest(trial.defining()) for trial in trials}) > 1:
            return True
        compared = compared or len(trials) > 1
    return not compared


def _check_scheduler(scheduler: SchedulerSpec, compared: Sequence[TrialSpec], *, origin: str) -> None:
    if len(compared) < 2:
        raise SpecError(f"{origin}: {scheduler.kind} compares trials, and the search gives one; widen it, or leave scheduler out")
    for spec in compared:
        if spec.train is None:
            raise SpecError(f"{origin}: {scheduler.kind} ends trainings early, and trials without train have none; leave scheduler out")
        if not scheduler.steps(spec.train.max_steps):
            raise SpecError(
                f"{origin}: grace_period {scheduler.grace_period} is not below train.max_steps {spec.train.max_steps}, so no trial "
                "has a rung; lower grace_period, or train longer"
            )
        proxy_suite(spec.eval, facts=scheduler.proxy.facts, context_tokens=scheduler.proxy.context_tokens or spec.eval.context_tokens)


def condition_labels(entries: Sequence[JsonObject]) -> dict[str, str]:
    """Return arm and point of each of a sweep's trials, as ``sweep.json`` lists them, by trial digest.

    A path is shortened to its last part if that is unique among the sweep's paths, and a value to a few digits or characters; values of
    a path that would look the same get a part of their digest.
    """
    values: dict[str, dict[str, str]] = {}
    for entry in entries:
        for path, value in entry["point"].items():
            values.setdefault(path, {})[digest([value])] = _short(value)
    leaves = Counter(path.rsplit(".", 1)[-1] for path in values)
    names = {path: leaf if leaves[leaf := path.rsplit(".", 1)[-1]] == 1 else path for path in values}
    for path, texts in values.items():
        counts = Counter(texts.values())
        values[path] = {key: text if counts[text] == 1 else f"{text}~{key[:6]}" for key, text in texts.items()}
    return {
        entry["digest"]: " ".join(
            [entry["arm"], *(f"{names[path]}={values[path][digest([value])]}" for path, value in entry["point"].items())]
        )
        for entry in entries
    }


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MOST_VALUE_CHARS else f"{text[: MOST_VALUE_CHARS - 1]}…"
