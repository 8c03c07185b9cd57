"""The trials of a sweep: those that are known, prepared and written to ``sweep.json``, and the search that asks for more.

Knows storage and the search algorithm, neither Ray nor where trials run. With a grid or random points all trials are known at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pause_ray import __version__
from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import Storage, is_complete, write_json
from pause_ray.evaluation.ledger import Ledger
from pause_ray.sweep.search_log import SearchRecord
from pause_ray.sweep.search_space import corners
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, arms_of, expand
from pause_ray.trial.prepare import PrepareCache, PreparedTrial, prepare

NOT_IDENTIFYING = ("max_concurrent_trials", "trial_timeout_minutes")
"""Fields of a sweep that change where and how long it runs, not its results."""


@dataclass(frozen=True)
class SweepTrial:
    """A trial with its place in the sweep."""

    planned: PlannedTrial
    prepared: PreparedTrial


class SweepTrials:
    """The trials that are known so far, and what storage has of them."""

    def __init__(self, sweep: SweepSpec, *, storage: Storage, command: str, progress: Callable[[int, int], None]) -> None:
        """Prepare the trials that are known before anything runs.

        Args:
            sweep: What to run.
            storage: Where models and trials are.
            command: How the user started this, for the report.
            progress: Called with how many trials of how many are prepared.

        Raises:
            UserError: a trial cannot be prepared, or two are the same.
        """
        self.sweep = sweep
        self._storage = storage
        self._command = command
        self._progress = progress
        self._seen = PrepareCache()
        self.by_digest: dict[str, SweepTrial] = {}
        """The known trials, in the order in which they are to be run."""
        self.all_known = sweep.algorithm.kind != "tpe"
        """Whether no search will add trials."""
        self.add(expand(sweep))
        self._digest = digest([sweep.name, sweep.reference_arm, sweep.control, self._identity()])
        self.folder: Path = storage.sweeps / f"{sweep.name}-{self._digest}"

    def add(self, planned: Sequence[PlannedTrial]) -> None:
        """Prepare further trials; those that are known already are not added twice.

        Raises:
            UserError: as for the constructor.
        """
        for number, each in enumerate(planned):
            self._progress(number, len(planned))
            prepared = prepare(each.spec, cache=self._storage.cache, shared=self._seen)
            known = self.by_digest.setdefault(prepared.digest, SweepTrial(each, prepared))
            same_point = known.planned.point == each.point or not self.all_known  # a search may ask for one trial in several ways
            if known.planned.arm != each.arm or not same_point:
                raise SpecError(f"sweep {self.sweep.name}: {known.planned.label} and {each.label} are the same trial; drop one")
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
        left_out = SearchRecord.read(self.folder).left_out(self.description()["trials"], arm=self.sweep.arm)
        return {key for key in left_out if not self.is_finished(key)}

    def missing(self, among: Collection[str]) -> dict[str, SweepTrial]:
        """Return those of these trials that are to be run."""
        left_out = self.left_out()
        return {key: trial for key, trial in self.by_digest.items() if key in among and key not in left_out and not self.is_finished(key)}

    def objective(self, point: JsonObject) -> float | None:
        """Return the objective of the unchanged arm at a point, over its replicates.

        It is None if a replicate is not finished or too few cells could be scored.
        """
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


class Search(Protocol):
    """Chooses points by the values of earlier ones (``sweep.tpe``)."""

    def ask(self) -> list[JsonObject] | None:
        """Return the points to run next, whose values must be told before the next call; None at the end.

        Raises:
            SpecError: no valid point is left to ask for.
        """

    def tell(self, point: JsonObject, value: float | None) -> None:
        """Learn the objective's value at a point that was asked for, or None where its trial failed."""


class SearchLoop:
    """Adds trials round by round: the values of a round's points go to the search before the next points are asked for."""

    def __init__(self, trials: SweepTrials, search: Search | None) -> None:
        """Create a loop that adds to ``trials``; without a search it adds nothing."""
        self._trials = trials
        self._search = search
        self._asked: list[JsonObject] = []

    def next_round(self) -> dict[str, SweepTrial]:
        """Tell the search the values of the last round, whose trials must have ended, and add trials until one of them is to be run.

        Returns:
            The trials to be run; empty at the end of the search.

        Raises:
            UserError: as for ``SweepTrials``.
            StorageError: a trial's ledger is damaged.
        """
        while self._search is not None:
            for point in self._asked:
                self._search.tell(point, self._trials.objective(point))
            self._asked = self._search.ask() or []
            if not self._asked:
                break
            known = set(self._trials.by_digest)
            self._trials.add(expand(self._trials.sweep, points=self._asked))
            self._trials.write()
            if missing := self._trials.missing(self._trials.by_digest.keys() - known):
                return missing
        return {}
