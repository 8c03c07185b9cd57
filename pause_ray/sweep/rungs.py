"""Which trials a scheduler judges, at which steps and on what clock, and what it has seen of them already. Pure; starts nothing.

Judged are the trials of the unchanged arm at replicate 0. A whole training lasts ``reduction ** rungs`` units on the scheduler's clock
and rung k stands at ``reduction ** k`` of them, however many steps that is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pause_ray.sweep.search_log import Rung, SearchRecord
from pause_ray.sweep.spec import PlannedTrial, SchedulerSpec, SweepSpec


class Planned(Protocol):
    """A trial with its place in the sweep."""

    @property
    def planned(self) -> PlannedTrial:
        """The trial."""


def governed(sweep: SweepSpec, trials: Mapping[str, Planned]) -> list[str]:
    """Digests of the trials that the sweep's scheduler judges, in their order; none without a scheduler."""
    if sweep.scheduler is None:
        return []
    return [
        key
        for key, trial in trials.items()
        if trial.planned.arm == sweep.arm and trial.planned.spec.replicate == 0 and trial.planned.spec.train is not None
    ]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a trial's process has to know of the scheduler. Plain data."""

    scheduler: SchedulerSpec
    context_tokens: tuple[int, ...]
    """Lengths of the proxy, the same for all trials."""
    recorded: Mapping[str, tuple[Rung, ...]] = field(default_factory=dict)
    """Trial → its rungs that were scored before, by number."""
    settled: frozenset[str] = frozenset()
    """Trials that are finished or were stopped before: they only repeat to the scheduler what it has seen of them."""

    @classmethod
    def resume(
        cls,
        scheduler: SchedulerSpec,
        record: SearchRecord,
        *,
        trials: Collection[str],
        finished: Collection[str],
        context_tokens: tuple[int, ...],
    ) -> Schedule:
        """A schedule that goes on from a record.

        Args:
            scheduler: The sweep's.
            record: What was written down in the sweep's folder.
            trials: Those that are judged.
            finished: Those of them whose cells are all scored.
            context_tokens: Of the proxy.
        """
        recorded = {key: tuple(sorted((rung for rung in record.rungs if rung.trial == key), key=lambda rung: rung.rung)) for key in trials}
        settled = frozenset(key for key in trials if key in finished or key in record.stops)
        return cls(scheduler=scheduler, context_tokens=context_tokens, recorded=recorded, settled=settled)

    def known(self, trial: str, rung: int) -> Rung | None:
        """A trial's rung that was scored before."""
        return next((found for found in self.recorded.get(trial, ()) if found.rung == rung), None)

    def time_of(self, rung: int) -> int:
        """Of a rung, on the scheduler's clock."""
        return int(self.scheduler.reduction**rung)

    @property
    def whole_time(self) -> int:
        """Of the end of a training, on the scheduler's clock."""
        return self.time_of(self.scheduler.rungs)
