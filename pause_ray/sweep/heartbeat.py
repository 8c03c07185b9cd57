"""Every few seconds, what runs: to ``status.json`` for people on any machine, and to Ray's metrics for Prometheus.

A thread of the driver puts together what the display, the watch and the fleet know anyway, so trials and actors say nothing twice. What
cannot be written or asked for a moment is left out; a sweep never waits for it, nor ends because of it. Knows Ray and no trial's steps.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ray.exceptions import RayError

from pause_ray.core import ray_cluster
from pause_ray.core.errors import StorageError, UserError
from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, is_complete
from pause_ray.evaluation.cell_scheduler import PoolState
from pause_ray.evaluation.ledger import Ledger
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.reporter import Reason
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.search import Rounds, SweepTrial
from pause_ray.sweep.status import (
    Cells,
    FleetSize,
    LiveStatus,
    RunningTrial,
    Speedometer,
    States,
    StepCounter,
    TrainingProgress,
    Work,
    idle_share,
)


@dataclass(frozen=True)
class Metric:
    """One series, or one for each value of its labels."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    """Beside ``sweep``."""
    counts: bool = False
    """It only rises; Prometheus takes its rate."""

    @property
    def exported(self) -> str:
        """What Ray makes of the name."""
        return f"ray_{self.name}" + ("_total" if self.counts else "")


CELLS = Metric(
    "pause_ray_cells", "Cells answered; asked: for the ledger (grid), again in other shapes (recheck), by a proxy", ("asked",), counts=True
)
UNSCORED_CELLS = Metric("pause_ray_unscored_cells", "Of the answered cells, those that could not be scored", ("asked",), counts=True)
PREFILLED_TOKENS = Metric("pause_ray_prefilled_tokens", "Prompt tokens that went through the model", ("asked",), counts=True)
DECODED_TOKENS = Metric("pause_ray_decoded_tokens", "Tokens of answers", ("asked",), counts=True)
TRAINED_STEPS = Metric("pause_ray_trained_steps", "Optimizer steps, each step of a trial once", counts=True)
TRAINED_TOKENS = Metric("pause_ray_trained_tokens", "Tokens of those steps, without padding", counts=True)
CELLS_LEFT = Metric("pause_ray_cells_left", "Cells that trials to come and running ones have not answered yet")
TRIALS = Metric("pause_ray_trials", "Trials by state", ("state",))
SCORING_ACTORS = Metric("pause_ray_scoring_actors", "Scoring actors: busy, idle, or coming (starting, or without room)", ("state",))
GPUS = Metric("pause_ray_gpus", "GPUs of the cluster as Ray counts them")
GPU_IDLE_SHARE = Metric("pause_ray_gpu_idle_share", "Share of the GPUs, 0 to 1, that nobody holds or whose holder waits")
METRICS = (
    CELLS,
    UNSCORED_CELLS,
    PREFILLED_TOKENS,
    DECODED_TOKENS,
    TRAINED_STEPS,
    TRAINED_TOKENS,
    CELLS_LEFT,
    TRIALS,
    SCORING_ACTORS,
    GPUS,
    GPU_IDLE_SHARE,
)


class RayMetrics:
    """All metrics of one sweep. Ray must be initialised; it sends them on every ten seconds, and when the driver leaves."""

    def __init__(self, sweep: str) -> None:
        """``sweep`` is the label of all of them."""
        from ray.util.metrics import Counter, Gauge

        self._labels = {"sweep": sweep}
        self._series = {
            metric: (Counter if metric.counts else Gauge)(metric.name, metric.meaning, ("sweep", *metric.labels)) for metric in METRICS
        }
        self._counted: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}

    def show(self, metric: Metric, value: float, **labels: str) -> None:
        """What is so now; must be told again at least every twenty seconds, or Ray forgets it."""
        self._series[metric].set(value, tags=self._labels | labels)

    def count(self, metric: Metric, total: float, **labels: str) -> None:
        """Let a counter come up to what has been counted; a total that is less than before was begun anew."""
        key = (metric, tuple(sorted(labels.items())))
        before = self._counted.get(key, 0)
        self._counted[key] = total
        more = total - before if total >= before else total
        if more:
            self._series[metric].inc(more, tags=self._labels | labels)


log = logging.getLogger("pause_ray")

BEAT_SECONDS = 3.0
ASK_SECONDS = 10.0
"""Timeout of asking the scoring pool's controller, which is on the driver's node; without an answer it is lost, or being restarted."""
MOST_WORDS = 500
"""Characters of a failure's reason; the whole of it is shown when the sweep ends."""
PENDING_SECONDS = 60.0
"""Time after which pending requests are shown; machines of a cloud take minutes to start, so the line is news and no alarm."""


class PendingNotice:
    """Decides when people see which resource requests wait: when these stay the same for a minute in which no trial makes progress."""

    def __init__(self) -> None:
        """Begin with nothing pending."""
        self._line: str | None = None
        self._shown: str | None = None
        self._active: dict[str, TrialState] = {}
        self._since = 0.0

    def due(self, line: str | None, states: States, *, now: float) -> str | None:
        """Return ``line`` if it is time to show it; the same line is shown once.

        Args:
            line: The pending requests now, as ``cluster.pending_requests`` returns them.
            states: The last state of each trial.
            now: Seconds of the monotonic clock.
        """
        active = {key: state for key, state in states.items() if not state.stage.waits_for_others}
        if (line, active) != (self._line, self._active):
            self._since = now
        if line is None:
            self._shown = None
        self._line, self._active = line, active
        if line == self._shown or now - self._since < PENDING_SECONDS:
            return None
        self._shown = line
        return line


class StatusWriter:
    """Tells from when it is entered until it is left; then once more, that the driver has ended and why."""

    def __init__(
        self,
        rounds: Rounds,
        *,
        storage: Storage,
        placement: Placement,
        fleet: ScoringPool,
        progress: ProgressDisplay,
        failures: Callable[[], Mapping[str, Reason]],
        given_up: Callable[[], Mapping[str, str]],
        ended_by: Callable[[], str | None],
    ) -> None:
        """Prepare; Ray must be initialised.

        Args:
            rounds: The sweep and its trials.
            storage: Where ledgers are.
            placement: What trials and actors hold.
            fleet: Asked how many actors there are and what they have answered.
            progress: Asked what trials have said.
            failures: Trial → why it failed.
            given_up: Arm → why its other trials are not begun.
            ended_by: Why the sweep ends before its end, if it does.
        """
        self._rounds, self._storage, self._places = rounds, storage, placement
        self._fleet, self._progress = fleet, progress
        self._failures, self._given_up, self._ended_by = failures, given_up, ended_by
        self._exported = RayMetrics(rounds.folder.name)
        self._work = Work(settled={Stage.STOPPED: len(rounds.left_out()), Stage.DONE: rounds.num_finished()})
        self._arms: Mapping[str, str] = {}
        """Trial → its arm, of those that are expected."""
        self._steps = StepCounter(_trained_before(rounds))
        self._speedometer = Speedometer()
        self._stages: dict[str, tuple[Stage, float]] = {}
        """Trial → its stage and since when, by the monotonic clock."""
        self._began = time.time()
        self._could_tell = True
        self._pending = PendingNotice()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat_regularly, name="sweep-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()
        reason = self._ended_by()
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
        self._beat(ended=time.time(), ended_by=reason)

    def expect(self, trials: Mapping[str, SweepTrial]) -> None:
        """Count these trials as work to be done."""
        self._work.expect({key: self._cells(key, trial) for key, trial in trials.items()})
        self._arms = {**self._arms, **{key: trial.planned.arm for key, trial in trials.items()}}

    def leave_out(self, trials: Iterable[str]) -> None:
        """The scheduler has seen to it that nothing more comes of these."""
        self._work.leave_out(trials)

    def note_step(self, trial: str, row: JsonObject) -> None:
        """A row of a trial's training log."""
        self._steps.note(trial, row)

    def _cells(self, key: str, trial: SweepTrial) -> Cells:
        answered = len(Ledger(self._storage.trials / key / "cells.jsonl").done_ids())
        return Cells(sum(trial.planned.spec.eval.num_positions.values()), answered)

    def _beat_regularly(self) -> None:
        while True:
            self._beat()
            if self._left.wait(BEAT_SECONDS):
                return

    def _beat(self, *, ended: float | None = None, ended_by: str | None = None) -> None:
        """Tell; what storage or the cluster refuses is said once, and may be possible at the next beat. The border of this thread."""
        try:
            self._tell(ended=ended, ended_by=ended_by)
        except (OSError, RayError, StorageError) as error:
            if self._could_tell:
                log.warning("pause-ray status will show old figures: %s", error)
            self._could_tell = False
        else:
            self._could_tell = True

    def _tell(self, *, ended: float | None, ended_by: str | None) -> None:
        fleet: PoolState | None = None
        gpus: float | None = None
        free_gpus = 0.0
        pending: str | None = None
        try:
            fleet = self._fleet.state(timeout_seconds=ASK_SECONDS)
            free_gpus, gpus = ray_cluster.free_gpus(), ray_cluster.total_gpus()
            pending = ray_cluster.pending_requests()
        except RayError as error:
            log.debug("a part of the cluster does not answer: %s", error)
        states = self._progress.look()
        if (line := self._pending.due(pending, states, now=time.monotonic())) is not None:
            self._progress.say(
                f"no trial has made progress for a minute, and Ray has not placed {line}; `ray status` on the head shows the nodes"
            )
        status = self._status(states, fleet, gpus=gpus, free_gpus=free_gpus, ended=ended, ended_by=ended_by)
        self._work.begin_no_more(key for key, arm in self._arms.items() if arm in status.given_up)
        self._export(states, status, fleet)
        status.write(self._rounds.folder)

    def _status(
        self, states: States, fleet: PoolState | None, *, gpus: float | None, free_gpus: float, ended: float | None, ended_by: str | None
    ) -> LiveStatus:
        failures = self._failures()
        running = {key: state for key, state in states.items() if not state.stage.is_end and key not in failures}
        size = FleetSize(busy=fleet.busy, idle=len(fleet.pids) - fleet.busy, coming=fleet.starting) if fleet else None
        idle = idle_share(
            running.values(),
            size,
            gpus=gpus,
            free_gpus=free_gpus,
            per_actor=self._places.scoring_gpus,
            per_trial=0.0 if self._places.resources.train_workers else self._places.train_gpus,
        )
        self._steps.forget([key for key in self._steps.of_trials() if is_complete(self._storage.trials / key)])
        answers = fleet.stats.values() if fleet else None
        return LiveStatus(
            written=time.time(),
            every_seconds=BEAT_SECONDS,
            began=self._began,
            ended=ended,
            ended_by=ended_by,
            driver=f"process {os.getpid()} on {socket.gethostname()}",
            seconds_left=self._progress.seconds_left,
            speed=self._speedometer.speed(answers, trained_tokens=self._steps.new.tokens, now=time.monotonic()),
            fleet=size,
            gpus=gpus,
            gpu_idle_share=idle,
            running=tuple(self._running(key, state) for key, state in running.items()) if ended is None else (),
            failures={key: message[:MOST_WORDS] for key, (message, _) in failures.items()},
            given_up={arm: reason[:MOST_WORDS] for arm, reason in self._given_up().items()},
            trained=self._steps.of_trials(),
        )

    def _running(self, key: str, state: TrialState) -> RunningTrial:
        now = time.monotonic()
        if self._stages.get(key, (None, now))[0] != state.stage:
            self._stages[key] = (state.stage, now)
        return RunningTrial(
            digest=key,
            label=self._rounds.trials[key].planned.label,
            stage=state.stage,
            done=state.done,
            total=state.total,
            seconds=round(now - self._stages[key][1], 1),
        )

    def _export(self, states: States, status: LiveStatus, fleet: PoolState | None) -> None:
        exported, failed = self._exported, status.failures
        by_state = self._work.by_state(states, failed=failed)
        for stage in Stage:
            exported.show(TRIALS, by_state[stage], state=stage)
        exported.show(CELLS_LEFT, self._work.cells_left(states, failed=failed))
        if status.gpus is not None:
            exported.show(GPUS, status.gpus)
        if status.gpu_idle_share is not None:
            exported.show(GPU_IDLE_SHARE, status.gpu_idle_share)
        if status.fleet is not None:
            for name in ("busy", "idle", "coming"):
                exported.show(SCORING_ACTORS, getattr(status.fleet, name), state=name)
        for asked, its in (fleet.stats if fleet else {}).items():
            exported.count(CELLS, its.cells, asked=asked)
            exported.count(UNSCORED_CELLS, its.unscored_cells, asked=asked)
            exported.count(PREFILLED_TOKENS, its.prefilled_tokens, asked=asked)
            exported.count(DECODED_TOKENS, its.decoded_tokens, asked=asked)
        exported.count(TRAINED_STEPS, self._steps.new.steps)
        exported.count(TRAINED_TOKENS, self._steps.new.tokens)


def _trained_before(rounds: Rounds) -> dict[str, TrainingProgress]:
    """How far trials were by the last word of the driver before this one; a file that cannot be read costs a count and no sweep."""
    try:
        before = LiveStatus.read(rounds.folder)
    except (OSError, StorageError) as error:
        log.warning("%s", error)
        return {}
    return {key: its for key, its in before.trained.items() if key in rounds.trials} if before else {}
