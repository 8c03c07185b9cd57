"""The status of a running sweep: ``status.json`` in the sweep's folder, and Ray's metrics for Prometheus.

The file has only what storage does not tell otherwise: speeds, scoring actors, running trials, reasons of failures. ``report.overview``
reads it, on machines without Ray too, so this module imports Ray only where metrics are filled.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
import traceback
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pause_ray.core.errors import PauseRayError, StorageError, UserError
from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, is_complete, read_json, write_json
from pause_ray.evaluation.cell_scheduler import PoolState, ScoringStats
from pause_ray.evaluation.ledger import Ledger
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import TrialQueue

if TYPE_CHECKING:
    from pause_ray.sweep.search import SweepTrial

log = logging.getLogger("pause_ray")

STATUS_FILE = "status.json"
FORMAT = 3
STATUS_SECONDS = 3.0
"""Time between two status files."""
MISSED_UNTIL_OLD = 5
"""Status files that may be overdue before the last one counts as old: its driver hangs, was killed, or cannot write."""
MAX_REASON_CHARS = 500
"""Characters of a failure's reason; the whole of it is shown when the sweep ends."""


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial that has begun and not ended."""

    digest: str
    label: str
    stage: Stage
    done: int
    total: int
    """The stage's size: steps while training, cells while scoring."""
    seconds: float
    """Time in this stage."""


@dataclass(frozen=True, kw_only=True)
class ActorCounts:
    """Scoring actors."""

    busy: int
    idle: int
    coming: int
    """Actors that are starting or have no room."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Means of the last minute, per second."""

    cells: float = 0.0
    scored_tokens: float = 0.0
    """Tokens of prompts and answers that went through the model."""
    trained_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a trial's training is."""

    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class LiveStatus:
    """One moment of a sweep. Times are seconds since 1970 by the driver's clock."""

    written: float
    every_seconds: float
    """Time until the next file is due."""
    began: float
    ended: float | None = None
    """When the driver ended; None while it runs, and for ever if it was killed."""
    ended_by: str | None = None
    """Why the run ended early."""
    driver: str
    """Process and machine."""
    seconds_left: float | None
    """The display's estimate; None while the speed is unknown."""
    speed: Speed
    actors: ActorCounts | None
    """Scoring actors; None while they cannot be asked."""
    gpus: float | None
    """GPUs of the cluster as Ray counts them; None while it does not answer."""
    gpu_idle_share: float | None
    """Share of the GPUs, 0 to 1, that are free or whose holder waits; None if no GPU is known."""
    running: tuple[RunningTrial, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    """Reasons why trials failed in this run, by trial digest."""
    given_up: Mapping[str, str] = field(default_factory=dict)
    """Reasons why the remaining trials of an arm were not begun in this run, by arm."""
    trained: Mapping[str, TrainingProgress] = field(default_factory=dict)
    """How far unfinished trials are, by digest, those of earlier runs included."""

    @classmethod
    def read(cls, sweep_folder: Path) -> LiveStatus | None:
        """Return the last status, or None where no driver of this version wrote one.

        Raises:
            StorageError: the file is damaged.
        """
        path = sweep_folder / STATUS_FILE
        if not path.is_file():
            return None
        data = read_json(path)
        if data.pop("format", None) != FORMAT:
            return None
        return TypeAdapter(cls).validate_python(data)

    def write(self, sweep_folder: Path) -> None:
        """Replace the file atomically.

        Raises:
            StorageError: disk full or not writable.
        """
        write_json(sweep_folder / STATUS_FILE, {"format": FORMAT, **dataclasses.asdict(self)})

    def age_seconds(self, now: float) -> float:
        """Return the file's age; clocks of machines may differ a little."""
        return max(0.0, now - self.written)

    def is_current(self, now: float) -> bool:
        """Return whether the driver can be taken to run and the figures to be current."""
        return self.ended is None and self.age_seconds(now) <= MISSED_UNTIL_OLD * self.every_seconds


@dataclass(frozen=True)
class Metric:
    """One series, or one for each value of its labels."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    """Labels beside ``sweep``."""
    counts: bool = False
    """Whether the value only rises, so that Prometheus takes its rate."""

    @property
    def exported(self) -> str:
        """The name under which Ray exports the series."""
        return f"ray_{self.name}" + ("_total" if self.counts else "")


METRICS = (
    CELLS := Metric(
        "pause_ray_cells",
        "Cells answered; asked: for the ledger (grid), again with other chunk shapes (numerics_check), by a proxy",
        ("asked",),
        counts=True,
    ),
    UNSCORED_CELLS := Metric("pause_ray_unscored_cells", "Of the answered cells, those that could not be scored", ("asked",), counts=True),
    PREFILLED_TOKENS := Metric("pause_ray_prefilled_tokens", "Prompt tokens that went through the model", ("asked",), counts=True),
    DECODED_TOKENS := Metric("pause_ray_decoded_tokens", "Tokens of answers", ("asked",), counts=True),
    TRAINED_STEPS := Metric("pause_ray_trained_steps", "Optimizer steps, each step of a trial once", counts=True),
    TRAINED_TOKENS := Metric("pause_ray_trained_tokens", "Tokens of those steps, without padding", counts=True),
    CELLS_LEFT := Metric("pause_ray_cells_left", "Cells that trials to come and running ones have not answered yet"),
    TRIALS := Metric("pause_ray_trials", "Trials by state", ("state",)),
    SCORING_ACTORS := Metric("pause_ray_scoring_actors", "Scoring actors: busy, idle, or coming (starting, or without room)", ("state",)),
    GPUS := Metric("pause_ray_gpus", "GPUs of the cluster as Ray counts them"),
    GPU_IDLE_SHARE := Metric("pause_ray_gpu_idle_share", "Share of the GPUs, 0 to 1, that nobody holds or whose holder waits"),
)


class RayMetrics:
    """All metrics of one sweep. Ray, which must be initialised, exports them every ten seconds and when the driver leaves."""

    def __init__(self, sweep: str) -> None:
        """Register the series, all with the label ``sweep``."""
        from ray.util.metrics import Counter, Gauge

        self._labels = {"sweep": sweep}
        self._series = {
            metric: (Counter if metric.counts else Gauge)(metric.name, metric.meaning, ("sweep", *metric.labels)) for metric in METRICS
        }
        self._counted: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge, which Ray forgets after twenty seconds, or raise a counter; a counter that falls has started again from zero."""
        series, tags = self._series[metric], self._labels | labels
        if not metric.counts:
            series.set(value, tags=tags)
            return
        key = (metric, tuple(sorted(labels.items())))
        before = self._counted.get(key, 0)
        self._counted[key] = value
        if more := value - before if value >= before else value:
            series.inc(more, tags=tags)


SPEED_SECONDS = 60.0
"""The time over which speeds are averaged, since an answer may take a few seconds."""
States = Mapping[str, TrialState]
"""The last state of each trial that has begun, by digest."""


@dataclass(frozen=True)
class ExpectedTrial:
    """A trial that is to be run."""

    label: str
    arm: str
    num_cells: int
    answered: int
    """Cells answered before this run."""

    def cells_left(self, state: TrialState | None) -> int:
        """Return how many cells have no answer yet; ``state`` is the trial's last one, None before it begins."""
        if state is not None and (state.stage.is_end or state.stage == Stage.NUMERICS_CHECK):
            return 0
        if state is not None and state.stage in (Stage.QUEUED, Stage.SCORING):
            return state.total - state.done
        return self.num_cells - self.answered


def count_trials(
    expected: Mapping[str, ExpectedTrial], states: States, *, failed: Collection[str], left_out: Collection[str]
) -> tuple[Counter[Stage], int]:
    """Return the number of trials in each state, and the cells of running and coming trials that have no answer yet.

    Trials of ``failed`` may not have reported it, if their process was lost; those of ``left_out`` count as stopped unless they have begun.
    """
    begun = Counter(Stage.FAILED if key in failed else state.stage for key, state in states.items())
    others = Counter(Stage.STOPPED if key in left_out else Stage.TO_COME for key in expected.keys() - states.keys())
    ended = {*failed, *(set(left_out) - states.keys())}
    return begun + others, sum(trial.cells_left(states.get(key)) for key, trial in expected.items() if key not in ended)


class StepCounter:
    """Counts each training step once, even if a resumed training reports steps that its checkpoint already contains."""

    def __init__(self, before: Mapping[str, TrainingProgress]) -> None:
        """``before`` tells how far trials were when the last driver ended."""
        self.by_trial = dict(before)
        """How far each trial is whose figures storage does not have."""
        self.new = TrainingProgress(steps=0, tokens=0)
        """The steps and tokens counted in this run, over all trials."""

    def note(self, trial: str, row: JsonObject) -> None:
        """Count a row of a trial's training log."""
        known = self.by_trial.get(trial, TrainingProgress(steps=0, tokens=0))
        if row["step"] > known.steps:
            self.by_trial[trial] = TrainingProgress(steps=row["step"], tokens=known.tokens + row["tokens"])
            self.new = TrainingProgress(steps=self.new.steps + 1, tokens=self.new.tokens + row["tokens"])


class Speedometer:
    """Computes speeds from rising totals."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, tuple[int, int, int]]] = deque()
        """Times, and the answered cells, scored tokens and trained tokens until then."""

    def speed(self, answers: Collection[ScoringStats] | None, *, trained_tokens: int, now: float) -> Speed:
        """Return the speeds of the last minute; totals that fall have started again from zero, and so does this.

        ``answers`` are all so far; None if the scoring actors could not be asked, which says nothing about speeds.
        """
        if answers is not None:
            totals = (
                sum(each.cells for each in answers),
                sum(each.prefilled_tokens + each.decoded_tokens for each in answers),
                trained_tokens,
            )
            if self._past and totals[0] < self._past[-1][1][0]:
                self._past.clear()
            self._past.append((now, totals))
        while self._past and now - self._past[0][0] > SPEED_SECONDS:
            self._past.popleft()
        if len(self._past) < 2:
            return Speed()
        (began, first), (ended, last) = self._past[0], self._past[-1]
        cells, scored, trained = ((after - before) / (ended - began) for before, after in zip(first, last, strict=True))
        return Speed(cells=round(cells, 3), scored_tokens=round(scored, 1), trained_tokens=round(trained, 1))


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """State of the cluster as Ray reports it; None for parts that do not answer."""

    scoring: PoolState | None = None
    """The scoring pool's state."""
    gpus: float | None = None
    """All GPUs as Ray counts them."""
    free_gpus: float = 0.0
    pending: str | None = None
    """Resource requests that Ray has not placed, for people."""

    @property
    def actors(self) -> ActorCounts | None:
        """How many scoring actors there are."""
        scoring = self.scoring
        return ActorCounts(busy=scoring.busy, idle=len(scoring.pids) - scoring.busy, coming=scoring.starting) if scoring else None


def idle_share(running: Collection[TrialState], cluster: ClusterState, *, per_actor: float, per_trial: float) -> float | None:
    """Return the share of the GPUs, 0 to 1, that are free, held by an idle actor, or by a trial that does not train now.

    A scoring actor has ``per_actor`` GPUs and a trial's own process ``per_trial``. Without a GPU the share is None.
    """
    if not cluster.gpus:
        return None
    waiting = sum(state.stage != Stage.TRAINING for state in running)
    idle = cluster.free_gpus + per_trial * waiting + (per_actor * cluster.actors.idle if cluster.actors else 0.0)
    return round(min(1.0, idle / cluster.gpus), 4)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial did not finish."""

    error: PauseRayError
    """Error that the trial raised; other packages' errors are wrapped, since they may not survive pickling."""
    trace: str | None = None
    """The traceback; None for a mistake of the user."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the failure of a trial that raised this error."""
        if isinstance(error, UserError):
            return cls(error=error)
        return cls(error=PauseRayError(f"{type(error).__name__}: {error}"), trace="".join(traceback.format_exception(error)))

    @property
    def message(self) -> str:
        """The error in one line."""
        return str(self.error)


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """Result of running a sweep."""

    folder: Path
    finished: int
    planned: int
    """Trials that are known; a search may still add more."""
    left_out: int = 0
    """Trials that early stopping ended, or that only make sense beside one of these."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    """Failures of this run, by the trial's label."""
    ended_by: str | None = None
    """Why the sweep ended early, for people; None if only failed trials are left."""
    given_up: tuple[str, ...] = ()
    """Reasons why the remaining trials of an arm were not begun, for people."""
    interrupted: bool = False
    """Whether a signal ended it."""

    @property
    def is_complete(self) -> bool:
        """Return whether nothing is left to do."""
        return self.finished + self.left_out == self.planned and self.ended_by is None


class StatusWriter:
    """Writes ``status.json`` and fills the Ray metrics. Not safe for threads: the driver calls it under its own lock.

    What storage or the cluster refuses is logged once and may be possible the next time: a sweep never ends because of its status.
    """

    def __init__(
        self,
        folder: Path,
        *,
        storage: Storage,
        metrics: RayMetrics | None = None,
        per_actor_gpus: float = 0.0,
        per_trial_gpus: float = 0.0,
        settled: Mapping[Stage, int] | None = None,
    ) -> None:
        """Prepare to write into the sweep's ``folder``; ``metrics`` are None without Ray.

        A scoring actor holds ``per_actor_gpus``, a trial's own process ``per_trial_gpus`` from its beginning to its end. The metrics
        include the trials of ``settled``, which had ended before this run.
        """
        self._folder, self._storage, self._metrics = folder, storage, metrics
        self._per_actor_gpus, self._per_trial_gpus = per_actor_gpus, per_trial_gpus
        self._settled = Counter(settled)
        self._expected: dict[str, ExpectedTrial] = {}
        self.left_out: set[str] = set()
        """Trials that early stopping has left out."""
        self.steps = StepCounter(_trained_before(folder))
        self._speedometer = Speedometer()
        self._stages: dict[str, tuple[Stage, float]] = {}
        """The stage of each trial and when it began, by the monotonic clock."""
        self._began = time.time()
        self._could_write = True

    def expect(self, trials: Mapping[str, SweepTrial]) -> None:
        """Add trials that are to be run."""
        for key, trial in trials.items():
            num_cells = sum(trial.planned.spec.eval.num_positions.values())
            answered = len(Ledger(self._storage.trials / key / "cells.jsonl").done_ids())
            self._expected[key] = ExpectedTrial(trial.planned.label, trial.planned.arm, num_cells, answered)

    def write(
        self,
        display: ProgressDisplay,
        queue: TrialQueue,
        cluster: ClusterState,
        *,
        failures: Mapping[str, Failure],
        ended: float | None = None,
        ended_by: str | None = None,
    ) -> None:
        """Write the file and fill the metrics; ``ended`` (seconds since 1970) and ``ended_by`` are None while the run lasts."""
        states = display.states
        try:
            running = {key: state for key, state in states.items() if not state.stage.is_end and key not in failures}
            unfinished = {key: done for key, done in self.steps.by_trial.items() if not is_complete(self._storage.trials / key)}
            self.steps.by_trial = unfinished
            answers = cluster.scoring.stats.values() if cluster.scoring else None
            status = LiveStatus(
                written=time.time(),
                every_seconds=STATUS_SECONDS,
                began=self._began,
                ended=ended,
                ended_by=ended_by,
                driver=f"process {os.getpid()} on {socket.gethostname()}",
                seconds_left=display.seconds_left,
                speed=self._speedometer.speed(answers, trained_tokens=self.steps.new.tokens, now=time.monotonic()),
                actors=cluster.actors,
                gpus=cluster.gpus,
                gpu_idle_share=idle_share(running.values(), cluster, per_actor=self._per_actor_gpus, per_trial=self._per_trial_gpus),
                running=tuple(self._running(key, state) for key, state in running.items()) if ended is None else (),
                failures={key: failure.message[:MAX_REASON_CHARS] for key, failure in failures.items()},
                given_up={arm: reason[:MAX_REASON_CHARS] for arm, reason in queue.given_up.items()},
                trained=unfinished,
            )
            if self._metrics is not None:
                self._fill_metrics(self._metrics, states, status, cluster)
            status.write(self._folder)
        except (OSError, StorageError) as error:
            if self._could_write:
                log.warning("pause-ray status will show old figures: %s", error)
            self._could_write = False
        else:
            self._could_write = True

    def _running(self, key: str, state: TrialState) -> RunningTrial:
        now = time.monotonic()
        if self._stages.get(key, (None, now))[0] != state.stage:
            self._stages[key] = (state.stage, now)
        return RunningTrial(
            digest=key,
            label=self._expected[key].label,
            stage=state.stage,
            done=state.done,
            total=state.total,
            seconds=round(now - self._stages[key][1], 1),
        )

    def _fill_metrics(self, metrics: RayMetrics, states: States, status: LiveStatus, cluster: ClusterState) -> None:
        left_out = self.left_out | {key for key, trial in self._expected.items() if trial.arm in status.given_up}
        by_state, cells_left = count_trials(self._expected, states, failed=status.failures, left_out=left_out)
        for stage in Stage:
            metrics.set(TRIALS, (by_state + self._settled)[stage], state=stage)
        metrics.set(CELLS_LEFT, cells_left)
        if status.gpus is not None:
            metrics.set(GPUS, status.gpus)
        if status.gpu_idle_share is not None:
            metrics.set(GPU_IDLE_SHARE, status.gpu_idle_share)
        if status.actors is not None:
            for name in ("busy", "idle", "coming"):
                metrics.set(SCORING_ACTORS, getattr(status.actors, name), state=name)
        for asked, stats in (cluster.scoring.stats if cluster.scoring else {}).items():
            metrics.set(CELLS, stats.cells, asked=asked)
            metrics.set(UNSCORED_CELLS, stats.unscored_cells, asked=asked)
            metrics.set(PREFILLED_TOKENS, stats.prefilled_tokens, asked=asked)
            metrics.set(DECODED_TOKENS, stats.decoded_tokens, asked=asked)
        metrics.set(TRAINED_STEPS, self.steps.new.steps)
        metrics.set(TRAINED_TOKENS, self.steps.new.tokens)


def _trained_before(folder: Path) -> dict[str, TrainingProgress]:
    """Return how far trials were by the last driver's status; a file that cannot be read costs a count and no sweep."""
    try:
        before = LiveStatus.read(folder)
    except (OSError, StorageError) as error:
        log.warning("%s", error)
        return {}
    return dict(before.trained) if before else {}
