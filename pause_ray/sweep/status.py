"""What the driver of a sweep says of itself while it runs: ``status.json`` in the sweep's folder, replaced every few seconds.

Only what storage does not tell otherwise: speeds, the fleet, who is at what, why trials failed. Reads and writes the file; measures
nothing, and knows no Ray.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import read_json, write_json
from pause_ray.evaluation.cell_scheduler import ScoringStats
from pause_ray.sweep.progress import TrialState

STATUS_FILE = "status.json"
FORMAT = 3
BEATS_UNTIL_OLD = 5
"""A file that was due so often and has not come is old: its driver hangs, was killed, or cannot write."""


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial that has begun and not ended."""

    digest: str
    label: str
    stage: Stage
    done: int
    total: int
    """Of the stage: steps while training, cells while scoring."""
    seconds: float
    """Since it came to this stage."""


@dataclass(frozen=True, kw_only=True)
class FleetSize:
    """Scoring actors."""

    busy: int
    idle: int
    coming: int
    """Starting, or without room."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of the last minute, per second."""

    cells: float = 0.0
    scored_tokens: float = 0.0
    """Of prompts and answers, those that went through the model."""
    trained_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far the training of a trial has come."""

    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class LiveStatus:
    """One moment of a driver. Times are seconds since 1970 by its clock."""

    written: float
    every_seconds: float
    """The next one is due after so long."""
    began: float
    ended: float | None = None
    """None while it runs, and for ever if it was killed."""
    ended_by: str | None = None
    """Why it ended before its end."""
    driver: str
    """Process and machine."""
    seconds_left: float | None
    """As the display says; None while nothing tells how fast it goes."""
    speed: Speed
    fleet: FleetSize | None
    """None while nothing is known of it."""
    gpus: float | None
    """Of the cluster, as Ray counts them; None while it does not answer."""
    gpu_idle_share: float | None
    """Of them, 0 to 1, those that nobody holds or whose holder waits; None if none are known."""
    running: tuple[RunningTrial, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    """Trial → why it did not finish in this run."""
    given_up: Mapping[str, str] = field(default_factory=dict)
    """Arm → why its other trials were not begun in this run."""
    trained: Mapping[str, TrainingProgress] = field(default_factory=dict)
    """Trial → how far it is, of those that are not finished; also as drivers before this one left it."""

    @classmethod
    def read(cls, sweep_folder: Path) -> LiveStatus | None:
        """The last one; None where no driver wrote one, or one of another version did.

        Raises:
            StorageError: the file is damaged.
        """
        path = sweep_folder / STATUS_FILE
        if not path.is_file():
            return None
        data = read_json(path)
        if data.pop("format", None) != FORMAT:
            return None
        fleet = data.pop("fleet")
        return cls(
            **data
            | {
                "speed": Speed(**data["speed"]),
                "fleet": FleetSize(**fleet) if fleet else None,
                "running": tuple(RunningTrial(**trial | {"stage": Stage(trial["stage"])}) for trial in data["running"]),
                "trained": {key: TrainingProgress(**its) for key, its in data["trained"].items()},
            }
        )

    def as_json(self) -> JsonObject:
        """Plain data."""
        return dataclasses.asdict(self)

    def write(self, sweep_folder: Path) -> None:
        """Replace the file; readers see the old one or this one.

        Raises:
            StorageError: disk full or not writable.
        """
        write_json(sweep_folder / STATUS_FILE, {"format": FORMAT, **self.as_json()})

    def age_seconds(self, now: float) -> float:
        """Since it was written; machines' clocks may differ by a little."""
        return max(0.0, now - self.written)

    def is_current(self, now: float) -> bool:
        """Whether its driver can be taken to run, and this to be how things are."""
        return self.ended is None and self.age_seconds(now) <= BEATS_UNTIL_OLD * self.every_seconds


SPEED_SECONDS = 60.0
"""Of the past, that speeds are means of: an answer may take a few seconds."""
States = Mapping[str, TrialState]
"""Trial → what it said last; only those that have begun."""


@dataclass(frozen=True)
class Cells:
    """Of a trial."""

    number: int
    answered: int
    """Before it began."""


class Work:
    """The trials of a sweep, and what is left of their cells. One thread adds, another one looks."""

    def __init__(self, *, settled: Mapping[str, int]) -> None:
        """``settled``: state → trials that had ended before."""
        self._settled = Counter(settled)
        self._cells: Mapping[str, Cells] = {}
        self._left_out: frozenset[str] = frozenset()
        self._not_begun: frozenset[str] = frozenset()

    def expect(self, trials: Mapping[str, Cells]) -> None:
        """These are to be run."""
        self._cells = {**self._cells, **trials}

    def leave_out(self, trials: Iterable[str]) -> None:
        """Nothing more comes of these."""
        self._left_out = self._left_out.union(trials)

    def begin_no_more(self, trials: Iterable[str]) -> None:
        """Nothing comes of these unless they have begun; they replace those that were given before."""
        self._not_begun = frozenset(trials)

    def by_state(self, states: States, *, failed: Collection[str]) -> Counter[str]:
        """State → trials; a failure is known before the trial's process says so, where it was lost."""
        begun = Counter(Stage.FAILED if key in failed else state.stage for key, state in states.items())
        out = self._left_out | self._not_begun
        others = Counter(Stage.STOPPED if key in out else Stage.TO_COME for key in self._cells.keys() - states.keys())
        return self._settled + begun + others

    def cells_left(self, states: States, *, failed: Collection[str]) -> int:
        """Of trials that are to come or running, those without an answer."""
        cells, out = self._cells, self._left_out | (self._not_begun - states.keys())
        return sum(_left(cells[key], states.get(key)) for key in cells if key not in failed and key not in out)


def _left(cells: Cells, state: TrialState | None) -> int:
    if state is not None and (state.stage.is_end or state.stage == Stage.RECHECKING):
        return 0
    if state is not None and state.stage in (Stage.QUEUED, Stage.SCORING):
        return state.total - state.done
    return cells.number - cells.answered


class StepCounter:
    """Training steps, each step of a trial once: a training that goes on tells again what its checkpoint has. Threads may share it."""

    def __init__(self, before: Mapping[str, TrainingProgress]) -> None:
        """``before``: how far trials were when the driver before this one ended."""
        self._trained = dict(before)
        self._steps, self._tokens = 0, 0
        self._counting = threading.Lock()

    def note(self, trial: str, row: JsonObject) -> None:
        """A row of a trial's training log."""
        with self._counting:
            known = self._trained.get(trial, TrainingProgress(steps=0, tokens=0))
            if row["step"] > known.steps:
                self._trained[trial] = TrainingProgress(steps=row["step"], tokens=known.tokens + row["tokens"])
                self._steps += 1
                self._tokens += row["tokens"]

    def of_trials(self) -> dict[str, TrainingProgress]:
        """How far each is that has not been forgotten."""
        with self._counting:
            return dict(self._trained)

    def forget(self, trials: Iterable[str]) -> None:
        """Storage tells it of these."""
        with self._counting:
            for key in trials:
                self._trained.pop(key, None)

    @property
    def new(self) -> TrainingProgress:
        """All that was counted since the beginning, of all trials together."""
        with self._counting:
            return TrainingProgress(steps=self._steps, tokens=self._tokens)


class Speedometer:
    """Speeds from totals that rise."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, Speed]] = deque()
        """When, and the totals then."""

    def speed(self, answers: Collection[ScoringStats] | None, *, trained_tokens: int, now: float) -> Speed:
        """Of the last minute, or as long as it runs; totals that fall were begun anew, and so is this.

        Args:
            answers: What was answered so far; None when nobody could be asked, which says nothing of speeds.
            trained_tokens: So far.
            now: Seconds of any clock.
        """
        if answers is not None:
            self._note(answers, trained_tokens=trained_tokens, now=now)
        while self._past and now - self._past[0][0] > SPEED_SECONDS:
            self._past.popleft()
        if len(self._past) < 2:
            return Speed()
        (since, before), (until, totals) = self._past[0], self._past[-1]
        seconds = until - since
        return Speed(
            cells=round((totals.cells - before.cells) / seconds, 3),
            scored_tokens=round((totals.scored_tokens - before.scored_tokens) / seconds, 1),
            trained_tokens=round((totals.trained_tokens - before.trained_tokens) / seconds, 1),
        )

    def _note(self, answers: Collection[ScoringStats], *, trained_tokens: int, now: float) -> None:
        totals = Speed(
            cells=sum(its.cells for its in answers),
            scored_tokens=sum(its.prefilled_tokens + its.decoded_tokens for its in answers),
            trained_tokens=trained_tokens,
        )
        if self._past and totals.cells < self._past[-1][1].cells:
            self._past.clear()
        self._past.append((now, totals))


def idle_share(
    running: Collection[TrialState], fleet: FleetSize | None, *, gpus: float | None, free_gpus: float, per_actor: float, per_trial: float
) -> float | None:
    """Share of the GPUs, 0 to 1, that are free, an idle actor's, or a trial's own while it does not train; None if none are known.

    Args:
        running: Trials that have begun and not ended.
        fleet: Scoring actors, where they are known.
        gpus: Of the cluster; None while it cannot be asked.
        free_gpus: Of them, those that nobody holds.
        per_actor: GPUs of each scoring actor.
        per_trial: GPUs that a trial holds in its own process from its beginning to its end.
    """
    if not gpus:
        return None
    waiting = sum(state.stage not in (Stage.TRAINING, Stage.PAUSED) for state in running)
    idle = free_gpus + per_trial * waiting + (per_actor * fleet.idle if fleet else 0.0)
    return round(min(1.0, idle / gpus), 4)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial did not finish."""

    label: str
    message: str
    trace: str | None
    """The traceback; None for a mistake of the user."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a command left of a sweep on storage."""

    folder: Path
    finished: int
    planned: int
    """The number of known trials; a search that learns as it goes may ask for more."""
    left_out: int = 0
    """The number of trials that early stopping ended, or that needed one of these to go on."""
    failures: tuple[Failure, ...] = ()
    ended_by: str | None = None
    """The reason, for people, for an early end; None if nothing is left but what failed."""
    given_up: tuple[str, ...] = ()
    """The reasons, for people, why trials of an arm were not begun."""
    interrupted: bool = False
    """Whether a signal ended it."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished + self.left_out == self.planned and self.ended_by is None
