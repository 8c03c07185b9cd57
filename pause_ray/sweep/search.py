"""The trials of a sweep, the search that adds more of them, and its log ``search.jsonl``.

With a grid or random points all trials are known at once; a TPE search adds them round by round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_ray import __version__
from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import Storage, is_complete, read_json_lines, space_errors, write_json
from pause_ray.evaluation.ledger import Ledger
from pause_ray.sweep.search_space import Domain, IntDomain, LogUniformDomain, QuantisedDomain, UniformDomain, corners, drawn_points
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, TpeAlgorithm, allows, arms_of, expand
from pause_ray.trial.prepare import PrepareCache, PreparedTrial, prepare

if TYPE_CHECKING:
    import optuna

NOT_IDENTIFYING = ("max_concurrent_trials", "trial_timeout_minutes")
"""Fields of a sweep that change where and how long it runs, not its results."""
SEARCH_LOG = "search.jsonl"
SUGGESTIONS = 50
"""Suggestions in a row that are invalid or known, after which the next point is drawn at random: in a small space the estimator suggests
its best point again and again."""


class SearchLog:
    """The events of one sweep's search: points, their values, scores at rungs, and stops."""

    def __init__(self, folder: Path) -> None:
        """Name the log of the sweep in ``folder``; neither has to exist yet."""
        self.path = folder / SEARCH_LOG

    def events(self) -> list[JsonObject]:
        """Return the events, oldest first; none if there is no log yet.

        Raises:
            StorageError: a line is not an event.
        """
        return read_json_lines(self.path)

    def append(self, event: JsonObject) -> None:
        """Add an event; on return it is on disk.

        Raises:
            StorageError: disk full or not writable; a line that was half written does not count.
        """
        with space_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # an interrupted run leaves half a line
                file.write((json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())


@dataclass(frozen=True, kw_only=True)
class RungScore:
    """The proxy score of an adapter in the middle of its training."""

    trial: str
    """The digest of the trial."""
    rung: int
    """The number of the rung, from 0."""
    step: int
    """The number of optimizer steps that the adapter was trained for."""
    proxy_score: float | None
    """The mean of the proxy's cells, 0 to 1; None if none could be scored."""
    num_cells: int
    seconds: float
    prefilled_tokens: int

    def as_event(self, *, point: JsonObject) -> JsonObject:
        """Return the event for the log; ``point`` is the trial's."""
        event = {"event": "rung", "point": point, **asdict(self)}
        return event | {"cells": event.pop("num_cells")}


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The early stop of a trial."""

    trial: str
    rung: int
    """The rung at which the trial was stopped."""
    by: str
    """The scheduler's kind."""

    def as_event(self, *, point: JsonObject) -> JsonObject:
        """Return the event for the log; ``point`` is the trial's."""
        return {"event": "stopped", "point": point, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The rungs and stops of a sweep."""

    rungs: tuple[RungScore, ...] = ()
    """The scores in their recorded order; of a rung that was recorded twice the first score counts."""
    stops: Mapping[str, Stop] = field(default_factory=dict)
    """The stops by the trial's digest."""

    @classmethod
    def read(cls, sweep_folder: Path) -> SearchRecord:
        """Read the log of a sweep; a sweep without a log has an empty record.

        Raises:
            StorageError: a line is not an event.
        """
        rungs: dict[tuple[str, int], RungScore] = {}
        stops: dict[str, Stop] = {}
        for event in SearchLog(sweep_folder).events():
            kind = event.pop("event", None)
            if kind == "rung":
                del event["point"]
                rungs.setdefault((event["trial"], event["rung"]), RungScore(num_cells=event.pop("cells"), **event))
            elif kind == "stopped":
                stops[event["trial"]] = Stop(trial=event["trial"], rung=event["rung"], by=event["by"])
        return cls(rungs=tuple(rungs.values()), stops=stops)

    def left_out(self, sweep: JsonObject) -> set[str]:
        """Return the digests of the trials that will not be finished; ``sweep`` is the content of ``sweep.json``.

        These are the stopped trials, and all trials at points where early stopping left none of those that it compares.
        """
        if not self.stops:
            return set()
        entries, arm = sweep["trials"], sweep["spec"].get("arm", "")
        compared = [entry for entry in entries if entry["arm"] == arm and entry["replicate"] == 0]
        alive = [entry["point"].items() for entry in compared if entry["digest"] not in self.stops]
        return {
            entry["digest"]
            for entry in entries
            if entry["digest"] in self.stops or not any(all(value in point for value in entry["point"].items()) for point in alive)
        }


@dataclass(frozen=True)
class SweepTrial:
    """A trial with its place in the sweep."""

    planned: PlannedTrial
    prepared: PreparedTrial


class SweepTrials:
    """The trials that are known so far, and what storage has of them."""

    def __init__(self, sweep: SweepSpec, *, storage: Storage, command: str, progress: Callable[[int, int], None]) -> None:
        """Prepare the trials that are known before anything runs.

        ``command`` is the command line, for the report; ``progress`` is called with the numbers of prepared trials and of all.

        Raises:
            UserError: a trial cannot be prepared, or two are the same.
        """
        self.sweep, self._storage, self._command, self._progress = sweep, storage, command, progress
        self._seen = PrepareCache()
        self.by_digest: dict[str, SweepTrial] = {}
        """The known trials, in the order in which they are to be run."""
        self.all_known = sweep.algorithm.kind != "tpe"
        """Whether no search will add trials."""
        self.add(expand(sweep))
        self._digest = digest([sweep.name, sweep.reference_arm, sweep.control, self._identity()])
        self.folder: Path = storage.sweeps / f"{sweep.name}-{self._digest}"
        self.log = SearchLog(self.folder)
        self._search: TpeSearch | None = None
        self._asked: list[JsonObject] = []
        """The points of the search's last round."""

    def add(self, planned: Sequence[PlannedTrial]) -> None:
        """Prepare further trials and add those that are not known yet; errors are those of the constructor."""
        for number, each in enumerate(planned):
            self._progress(number, len(planned))
            prepared = prepare(each.spec, cache=self._storage.cache, shared=self._seen)
            known = self.by_digest.setdefault(prepared.digest, SweepTrial(each, prepared))
            same_point = known.planned.point == each.point or not self.all_known  # a search may ask for one trial in several ways
            if known.planned.arm != each.arm or not same_point:
                raise SpecError(f"{self.sweep.origin}: {known.planned.label} and {each.label} are the same trial; drop one")
        self._progress(len(planned), len(planned))

    def write(self) -> None:
        """Write ``sweep.json``; the sweep's folder must belong to this process alone."""
        write_json(self.folder / "sweep.json", self.description())

    def description(self) -> JsonObject:
        """Return the content of ``sweep.json``."""
        sweep = self.sweep
        return {
            "name": sweep.name,
            "digest": self._digest,
            "spec": sweep.resolved(),
            "compare_to": sweep.reference_arm,
            "control": sweep.control,
            "trials": [
                {
                    "digest": key,
                    "arm": trial.planned.arm,
                    "point": trial.planned.point,
                    "replicate": trial.planned.spec.replicate,
                    "seed": trial.planned.spec.seed,
                    "cells": sum(trial.planned.spec.eval.num_positions.values()),
                    "steps": trial.planned.spec.train.max_steps if trial.planned.spec.train else 0,
                }
                for key, trial in self.by_digest.items()
            ],
            "command": self._command,
            "version": __version__,
        }

    def is_finished(self, key: str) -> bool:
        """Return whether a trial is complete, by this command or another."""
        return is_complete(self._storage.trials / key)

    def num_finished(self) -> int:
        """Return how many of the known trials are complete."""
        return sum(map(self.is_finished, self.by_digest))

    def left_out(self) -> set[str]:
        """Return the trials that will not be finished, since early stopping ended them or all that they depend on."""
        left_out = SearchRecord.read(self.folder).left_out(self.description())
        return {key for key in left_out if not self.is_finished(key)}

    def missing(self, among: Collection[str]) -> dict[str, SweepTrial]:
        """Return those of these trials that are to be run."""
        left_out = self.left_out()
        return {key: trial for key, trial in self.by_digest.items() if key in among and key not in left_out and not self.is_finished(key)}

    def next_round(self) -> dict[str, SweepTrial]:
        """Add the trials of the search's next round and return those to be run; none at the end of the search, or without one.

        The trials of the last round must have ended: the search learns their values before it is asked for the next points.

        Raises:
            UserError: a trial cannot be prepared.
            StorageError: the search log or a trial's ledger is damaged.
        """
        algorithm = self.sweep.algorithm
        if not isinstance(algorithm, TpeAlgorithm):
            return {}
        self._search = search = self._search or TpeSearch(self.sweep, algorithm, log=self.log)
        while True:
            for point in self._asked:
                search.tell(point, self.objective(point))
            self._asked = search.ask()
            if not self._asked:
                return {}
            known = set(self.by_digest)
            self.add(expand(self.sweep, points=self._asked))
            self.write()
            if missing := self.missing(self.by_digest.keys() - known):
                return missing

    def objective(self, point: JsonObject) -> float | None:
        """Return the unchanged arm's objective at a point, over its replicates; None if one is unfinished or too few cells have a score."""
        planned = [trial.spec for trial in expand(self.sweep, points=[point]) if trial.arm == self.sweep.arm]
        digests = [prepare(spec, cache=self._storage.cache, shared=self._seen).digest for spec in planned]
        if not digests or not all(map(self.is_finished, digests)):
            return None
        return self.sweep.objective.comparable_value(
            [row for key in digests for row in Ledger(self._storage.trials / key / "cells.jsonl").rows()]
        )

    def _identity(self) -> Any:
        """Return what makes this the same sweep: its trials, and how they are stopped early.

        Where the trials are not known yet, it is what they will be drawn from and one example.
        """
        known = sorted([key, trial.planned.arm, trial.planned.point] for key, trial in self.by_digest.items())
        if self.all_known:
            scheduler = self.sweep.scheduler  # its stops and rungs are in the folder, and mean nothing to another scheduler
            return [known, scheduler.resolved(), self.sweep.objective.mode] if scheduler is not None else known
        spec = {name: value for name, value in self.sweep.resolved().items() if name not in NOT_IDENTIFYING}
        del spec["trial"]
        ours = arms_of(self.sweep)[0]
        drawn = (ours.trial(ours.applied(point), replicate=0) for point in corners(self.sweep.search))
        example = next((trial for trial in drawn if trial is not None), None)
        return [spec, known, prepare(example, cache=self._storage.cache).digest if example else None]


class TpeSearch:
    """Chooses points near good ones with Optuna's tree-structured Parzen estimator.

    The same seed and values always give the same points, so an interrupted search is replayed. A point that was asked for before is asked
    for again, even if the estimator would now choose another.
    """

    def __init__(self, sweep: SweepSpec, algorithm: TpeAlgorithm, *, log: SearchLog) -> None:
        """Begin a search, or prepare to replay the one in ``log``."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._algorithm, self._log = sweep, algorithm, log
        sampler = optuna.samplers.TPESampler(
            seed=algorithm.seed, n_startup_trials=algorithm.random_points, multivariate=True, constant_liar=algorithm.at_a_time > 1
        )
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if sweep.objective.mode == "max" else "minimize")
        self._distributions = {path: _distribution(domain) for path, domain in sweep.search.items()}
        events = log.events()
        self._asked_before = {event["round"]: event["points"] for event in events if event["event"] == "asked"}
        self._values_before = {digest(event["point"]): event["value"] for event in events if event["event"] == "told"}
        self._round = 0
        self._suggestions = 0
        self._trials: dict[str, optuna.Trial | None] = {}
        """Optuna's trial of each point that was asked for, by the point's digest; None if the estimator did not suggest the point."""

    def ask(self) -> list[JsonObject]:
        """Return the points to run next, whose values must be told before the next call; none at the end of the search.

        Raises:
            SpecError: no valid point is left to ask for.
        """
        points = [self._choose() for _ in range(min(self._algorithm.at_a_time, self._algorithm.points - len(self._trials)))]
        if not points:
            return []
        if before := self._asked_before.get(self._round):
            self._replace(points, before)
            points = before
        else:
            self._log.append({"event": "asked", "round": self._round, "points": points})
        self._round += 1
        return points

    def tell(self, point: JsonObject, value: float | None) -> None:
        """Learn the objective's value at a point that was asked for, or None if its trial failed."""
        import optuna

        key = digest(point)
        if trial := self._trials[key]:
            self._end(trial, value)
        elif value is not None:
            params = {path: _suggestion(domain, point[path]) for path, domain in self._sweep.search.items()}
            self._study.add_trial(optuna.create_trial(params=params, distributions=self._distributions, value=value))
        if key not in self._values_before or self._values_before[key] != value:
            self._log.append({"event": "told", "point": point, "value": value})
            self._values_before[key] = value

    def _choose(self) -> JsonObject:
        """Return a new valid point, which from now on counts as asked for."""
        for _ in range(SUGGESTIONS):
            self._suggestions += 1
            trial = self._study.ask(self._distributions)
            point = {path: _value(domain, trial.params[path]) for path, domain in self._sweep.search.items()}
            if self._is_new(point):
                self._trials[digest(point)] = trial
                return point
            self._end(trial, None)
        seed = self._algorithm.seed + self._suggestions
        [point] = drawn_points(self._sweep.search, self._is_new, points=1, seed=seed, origin=self._sweep.origin)
        self._trials[digest(point)] = None
        return point

    def _replace(self, points: Sequence[JsonObject], before: Sequence[JsonObject]) -> None:
        """Count the points of an earlier run as asked for, instead of those that the estimator chose now."""
        kept = {digest(point) for point in before}
        for key in {digest(point) for point in points} - kept:
            if trial := self._trials.pop(key):
                self._end(trial, None)
        for key in kept:
            self._trials.setdefault(key, None)

    def _is_new(self, point: JsonObject) -> bool:
        return digest(point) not in self._trials and allows(self._sweep, point)

    def _end(self, trial: optuna.Trial, value: float | None) -> None:
        from optuna.trial import TrialState

        self._study.tell(trial, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """Return Optuna's distribution of a domain; a listed value is represented by its index."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, UniformDomain):
        return FloatDistribution(*domain.uniform)
    if isinstance(domain, LogUniformDomain):
        return FloatDistribution(*domain.loguniform, log=True)
    if isinstance(domain, IntDomain):
        return IntDistribution(*domain.int, step=domain.step, log=domain.log)
    if isinstance(domain, QuantisedDomain):
        return IntDistribution(0, len(domain.listed()) - 1)
    return CategoricalDistribution(range(len(domain.listed())))


def _value(domain: Domain, suggested: Any) -> Any:
    """Return the value of a domain that a suggestion stands for."""
    if isinstance(domain, UniformDomain | LogUniformDomain):
        return domain.rounded(suggested)
    return suggested if isinstance(domain, IntDomain) else domain.listed()[suggested]


def _suggestion(domain: Domain, value: Any) -> Any:
    """Return the suggestion that stands for a value, the inverse of ``_value``."""
    if isinstance(domain, IntDomain | UniformDomain | LogUniformDomain):
        return value
    return [digest([listed]) for listed in domain.listed()].index(digest([value]))
