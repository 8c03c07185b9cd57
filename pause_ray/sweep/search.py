"""The trials of a sweep, round by round: points are asked for, made into prepared trials and written to ``sweep.json``.

Knows storage and the search, neither Ray nor who runs the trials. With a grid or random points there is one round.
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

PLACES = ("max_concurrent_trials", "trial_timeout_minutes")
"""Fields of a sweep that change where and how long, not what."""


@dataclass(frozen=True)
class SweepTrial:
    """A trial with its place in the sweep."""

    planned: PlannedTrial
    prepared: PreparedTrial


class Search(Protocol):
    """Chooses points by what came of those before (``sweep.tpe``)."""

    def ask(self) -> list[JsonObject] | None:
        """The points to run next, whose values it must be told before it is asked again; None at the end.

        Raises:
            SpecError: no valid point is left to ask for.
        """

    def tell(self, point: JsonObject, value: float | None) -> None:
        """The objective's value at a point that was asked for, or None where there is none as its trial failed."""


class Rounds:
    """The trials that are known so far, and the way to the next ones."""

    def __init__(self, sweep: SweepSpec, *, storage: Storage, command: str, showing: Callable[[int, int], None]) -> None:
        """Prepare the trials that are known before anything runs.

        Args:
            sweep: What to run.
            storage: Where models and trials are.
            command: How the user started this, for the report.
            showing: Told how many trials of how many are prepared.

        Raises:
            UserError: a trial cannot be prepared, or two are the same.
        """
        self._sweep = sweep
        self._storage = storage
        self._command = command
        self._showing = showing
        self._seen = PrepareCache()
        self.trials: dict[str, SweepTrial] = {}
        """By digest, in the order in which they are to be run."""
        self.are_known = sweep.algorithm.kind != "tpe"
        """Whether these are all trials of the sweep."""
        self._add(expand(sweep))
        self._digest = digest([sweep.name, sweep.reference_arm, sweep.control, self._identity()])
        self.folder: Path = storage.sweeps / f"{sweep.name}-{self._digest}"
        self._search: Search | None = None
        self._asked: list[JsonObject] = []

    def begin(self, search: Search | None) -> dict[str, SweepTrial]:
        """Write down what is known, take further points from ``search``, and give the trials that are missing now.

        The sweep's folder must be this process's alone.

        Raises:
            UserError: as for the constructor.
        """
        self._search = search
        self._write()
        return self._missing(self.trials) | self.advance()

    def advance(self) -> dict[str, SweepTrial]:
        """Tell what came of the points asked last, whose trials must have ended, and ask on until one is missing; {} at the end.

        Raises:
            UserError: as for the constructor.
            StorageError: a trial's ledger is damaged.
        """
        while self._search is not None:
            for point in self._asked:
                self._search.tell(point, self._value(point))
            self._asked = self._search.ask() or []
            if not self._asked:
                break
            known = set(self.trials)
            self._add(expand(self._sweep, points=self._asked))
            self._write()
            if missing := self._missing(self.trials.keys() - known):
                return missing
        return {}

    def num_finished(self) -> int:
        """Of the trials that are known."""
        return sum(map(self.is_finished, self.trials))

    def left_out(self) -> set[str]:
        """Trials that will not be finished, since the scheduler stopped them or all that they depend on."""
        left_out = SearchRecord.read(self.folder).left_out(self.description()["trials"], governed_arm=self._sweep.arm)
        return {key for key in left_out if not self.is_finished(key)}

    def is_finished(self, key: str) -> bool:
        """Whether a trial came to its end, in this command or another."""
        return is_complete(self._storage.trials / key)

    def _missing(self, among: Collection[str]) -> dict[str, SweepTrial]:
        left_out = self.left_out()
        return {key: self.trials[key] for key in self.trials if key in among and key not in left_out and not self.is_finished(key)}

    def description(self) -> JsonObject:
        """What ``sweep.json`` holds."""
        sweep = self._sweep
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
                for key, trial in self.trials.items()
            ],
            "command": self._command,
            "version": __version__,
        }

    def _write(self) -> None:
        write_json(self.folder / "sweep.json", self.description())

    def _add(self, planned: Sequence[PlannedTrial]) -> None:
        for number, each in enumerate(planned):
            self._showing(number, len(planned))
            prepared = prepare(each.spec, cache=self._storage.cache, shared=self._seen)
            there = self.trials.setdefault(prepared.digest, SweepTrial(each, prepared))
            same_point = there.planned.point == each.point or not self.are_known  # an estimator may ask for one trial in several ways
            if there.planned.arm != each.arm or not same_point:
                raise SpecError(f"sweep {self._sweep.name}: {there.planned.label} and {each.label} are the same trial; drop one")
        self._showing(len(planned), len(planned))

    def _identity(self) -> Any:
        """What makes this the same sweep: its trials, and who ends them early.

        Where trials are not known, what they will be drawn from and a trial of that kind.
        """
        places = sorted([key, trial.planned.arm, trial.planned.point] for key, trial in self.trials.items())
        if self.are_known:
            scheduler = self._sweep.scheduler  # its stops and rungs are in the folder, and mean nothing to another one
            return [places, scheduler.resolved(), self._sweep.objective.mode] if scheduler is not None else places
        spec = {name: value for name, value in self._sweep.resolved().items() if name not in PLACES}
        del spec["trial"]
        ours = arms_of(self._sweep)[0]
        drawn = (ours.trial(ours.applied(point), replicate=0) for point in corners(self._sweep.search))
        example = next((trial for trial in drawn if trial is not None), None)
        return [spec, places, prepare(example, cache=self._storage.cache).digest if example else None]

    def _value(self, point: JsonObject) -> float | None:
        """The objective of the unchanged trial's arm at a point, over its replicates; None if one is not finished, or too little scored."""
        planned = [trial.spec for trial in expand(self._sweep, points=[point]) if trial.arm == self._sweep.arm]
        digests = [prepare(spec, cache=self._storage.cache, shared=self._seen).digest for spec in planned]
        if not digests or not all(map(self.is_finished, digests)):
            return None
        return self._sweep.objective.comparable_value(
            [row for key in digests for row in Ledger(self._storage.trials / key / "cells.jsonl").rows()]
        )
