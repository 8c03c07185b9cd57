"""The display of a running sweep: one bar for all the work with an ETA, and one line per running trial.

Work is counted in prompt-token equivalents, so that the ETA does not jump between training and scoring. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject, digest
from pause_ray.evaluation.prefix_plan import by_position, new_tokens
from pause_ray.evaluation.suite import Cell, cells
from pause_ray.inference.engine import HfEngineSpec
from pause_ray.training.metrics import step_summary
from pause_ray.trial.spec import TrialSpec

TRAINED_TOKEN_COST = 3.0
"""Prompt tokens that one trained token costs: a LoRA step is a forward pass and a backward pass of about twice its
work (the frozen base needs no weight gradients, but activations are recomputed or spilled)."""
PENDING_SECONDS = 60.0
"""Time after which pending requests are shown; machines of a cloud take minutes to start, so the message is news and no alarm."""


@dataclass(frozen=True)
class TrialState:
    """How far one trial is."""

    stage: Stage
    done: int
    total: int
    row: JsonObject | None = None
    """The training log row of the last step, while training."""


def work_of(spec: TrialSpec, *, seen: dict[str, float] | None = None) -> tuple[float, float]:
    """Return the training and the scoring work of a trial, in prompt-token equivalents.

    ``seen`` has the scoring work by digest of what is asked and is extended here: most trials of a sweep ask the same.
    """
    seen = {} if seen is None else seen
    asked = digest([spec.eval.resolved(), spec.engine.resolved(), spec.replicate, spec.seed])
    if asked not in seen:
        seen[asked] = _scoring_work(spec)
    scoring = seen[asked]
    if spec.train is None or spec.corpus is None:
        return 0.0, scoring
    rows = spec.train.max_steps * spec.train.rows_per_step
    tokens = (spec.corpus.sequence_len + spec.corpus.min_context_tokens) / 2
    return TRAINED_TOKEN_COST * rows * tokens, scoring


def _scoring_work(spec: TrialSpec) -> float:
    """Return roughly how many prompt tokens are computed: shared prefixes count once where the engine shares them."""
    reuse = spec.engine.reuse if isinstance(spec.engine, HfEngineSpec) else "none"
    sharing: dict[object, list[Cell]] = {}
    for cell in cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed):
        key = {"full": None, "depth": cell.context_tokens, "none": cell.id}[reuse]
        sharing.setdefault(key, []).append(cell)
    return sum(sum(new_tokens(by_position(together))) for together in sharing.values())


def work_done(work: tuple[float, float], state: TrialState) -> float:
    """Return the part of a trial's ``work_of`` that is done in this state."""
    training, scoring = work
    share = state.done / state.total if state.total else 0.0
    if state.stage in (Stage.TRAINING, Stage.PROXY):
        return training * share
    if state.stage in (Stage.QUEUED, Stage.SCORING):
        return training + scoring * share
    return training + scoring if state.stage == Stage.NUMERICS_CHECK or state.stage.is_end else 0.0


class ProgressDisplay:
    """Draws what it is given until left: in a terminal bars, elsewhere a line per change of a trial's stage."""

    def __init__(self, console: Console) -> None:
        """Prepare a display on this console."""
        self._console = console
        self._labels: dict[str, str] = {}
        self._work: dict[str, tuple[float, float]] = {}
        self._stored: dict[str, float] = {}
        """The part of each trial's work that storage had at the start: no time goes into it."""
        self._scoring: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self.states: dict[str, TrialState] = {}
        """The last state of every trial that has begun, by digest."""
        self._pending: tuple[str | None, Mapping[str, TrialState]] = (None, {})
        """The pending requests, and the states of the trials that could make progress."""
        self._pending_since = 0.0
        self._shown_request: str | None = None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        self._all = self._progress.add_task("all trials", total=None, detail="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def add(self, trials: Mapping[str, tuple[str, TrialSpec]]) -> None:
        """Add the work of these trials, given as digest → label and spec."""
        self._work |= {key: work_of(spec, seen=self._scoring) for key, (_, spec) in trials.items()}
        self._labels |= {key: label for key, (label, _) in trials.items()}
        self._update_total()

    def subtract_stored(self, shares: Mapping[str, tuple[float, float]]) -> None:
        """Leave out the work that storage already has, given as digest → shares of training and of scoring, 0 to 1."""
        for key, (trained, scored) in shares.items():
            training, scoring = self._work[key]
            self._stored[key] = trained * training + scored * scoring
        self._update_total()

    def _update_total(self) -> None:
        self._progress.update(self._all, total=sum(map(sum, self._work.values())) - sum(self._stored.values()))

    def label(self, key: str) -> str:
        """Return the name under which a trial is shown."""
        return self._labels[key]

    def print(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False, markup=False)

    def bar(self, label: str) -> Callable[[int, int], None]:
        """Return a progress callback that draws one bar under ``label`` until its work is done."""
        bar = self._progress.add_task(f"  {label}", total=None, detail="")

        def update(done: int, total: int) -> None:
            self._progress.update(bar, completed=done, total=total, visible=done < total)

        return update

    @property
    def seconds_left(self) -> float | None:
        """The time left at the speed of the last ten minutes; None while the speed is unknown."""
        return next((task.time_remaining for task in self._progress.tasks if task.id == self._all), None)

    def show(self, states: Mapping[str, TrialState]) -> None:
        """Draw the trials that have reported something new."""
        for key, state in states.items():
            self._done[key] = max(0.0, work_done(self._work[key], state) - self._stored.get(key, 0.0))
            self._show_trial(key, state)
        self.states |= states
        ended = sum(state.stage.is_end for state in self.states.values())
        self._progress.update(self._all, completed=sum(self._done.values()), detail=f"{ended}/{len(self._labels)}")

    def note_pending(self, request: str | None, *, now: float) -> None:
        """Tell the user about requests that Ray has not placed: once, when they stay the same for a minute without any progress."""
        active = {key: state for key, state in self.states.items() if not state.stage.waits_for_others}
        if (request, active) != self._pending:
            self._pending, self._pending_since = (request, active), now
        if request is None:
            self._shown_request = None
        elif request != self._shown_request and now - self._pending_since >= PENDING_SECONDS:
            self._shown_request = request
            self.print(
                f"no trial has made progress for a minute, and Ray has not placed {request}; `ray status` on the head shows the nodes"
            )

    def _show_trial(self, key: str, state: TrialState) -> None:
        label = self._labels[key]
        if key not in self.states or self.states[key].stage != state.stage:
            if not self._console.is_terminal:
                self.print(f"{label}: {state.stage}")
            if key in self._bars:
                self._progress.remove_task(self._bars.pop(key))
            if not state.stage.is_end:
                self._bars[key] = self._progress.add_task(f"  {label}", total=state.total, detail=state.stage)
        if key in self._bars:
            detail = f"{state.stage} {state.done}/{state.total}" + (f" · {step_summary(state.row)}" if state.row else "")
            self._progress.update(self._bars[key], completed=state.done, total=state.total, detail=detail)
