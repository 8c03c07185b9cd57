"""What a sweep shows while it runs: one bar for all the work with an ETA, one line per running trial.

Work is counted in prompt-token equivalents, so that the ETA does not jump between training and scoring. Knows no Ray:
states come from a callable, whoever collects them.
"""

from __future__ import annotations

import threading
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
from pause_ray.training.metrics import step_words
from pause_ray.trial.spec import TrialSpec

TRAINED_TOKEN_COST = 3.0
"""Prompt tokens that one trained token costs: a LoRA step is a forward pass and a backward pass of about twice its
work (the frozen base needs no weight gradients, but activations are recomputed or spilled)."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrialState:
    """How far one trial is."""

    stage: Stage
    done: int
    total: int
    row: JsonObject | None = None
    """While training: what the training log says of the last step."""


def work_of(spec: TrialSpec, *, seen: dict[str, float] | None = None) -> tuple[float, float]:
    """Training and scoring work of a trial, in prompt-token equivalents.

    Args:
        spec: The trial.
        seen: Scoring work of other trials, and added to: most trials of a sweep ask the same.
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
    """Prompt tokens that are computed, roughly: what prompts share counts once where the engine shares it."""
    reuse = spec.engine.reuse if isinstance(spec.engine, HfEngineSpec) else "none"
    sharing: dict[object, list[Cell]] = {}
    for cell in cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed):
        key = {"full": None, "depth": cell.context_tokens, "none": cell.id}[reuse]
        sharing.setdefault(key, []).append(cell)
    return sum(sum(new_tokens(by_position(together))) for together in sharing.values())


def work_done(work: tuple[float, float], state: TrialState) -> float:
    """The part of a trial's ``work_of`` that is behind it in this state."""
    training, scoring = work
    share = state.done / state.total if state.total else 0.0
    if state.stage == Stage.TRAINING:
        return training * share
    if state.stage in (Stage.PROXY, Stage.PAUSED):
        return training
    if state.stage in (Stage.QUEUED, Stage.SCORING):
        return training + scoring * share
    return training + scoring if state.stage == Stage.RECHECKING or state.stage.is_end else 0.0


class ProgressDisplay:
    """Draws until left; in a terminal a live display, elsewhere a line per change of stage."""

    def __init__(self, console: Console, states: Callable[[], Mapping[str, TrialState]]) -> None:
        """Prepare a display; ``states`` is asked twice a second for the trials that have said something since."""
        self._console = console
        self._states = states
        self._labels: dict[str, str] = {}
        self._work: dict[str, tuple[float, float]] = {}
        self._found: dict[str, float] = {}
        """Of a trial's work, what storage has of it: no time goes into that."""
        self._scoring: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._stages: dict[str, Stage] = {}
        self._seen: dict[str, TrialState] = {}
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sweep-progress", daemon=True)
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
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.stop()

    def add(self, trials: Mapping[str, tuple[str, TrialSpec]]) -> None:
        """Count these trials (key → label and spec) as work to be done."""
        self._work |= {key: work_of(spec, seen=self._scoring) for key, (_, spec) in trials.items()}
        self._labels |= {key: label for key, (label, _) in trials.items()}
        self._count()

    def found(self, shares: Mapping[str, tuple[float, float]]) -> None:
        """Count no more what storage has of these trials: key → share of training and of scoring, 0 to 1."""
        for key, (trained, scored) in shares.items():
            training, scoring = self._work[key]
            self._found[key] = trained * training + scored * scoring
        self._count()

    def _count(self) -> None:
        self._progress.update(self._all, total=sum(map(sum, self._work.values())) - sum(self._found.values()))

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False, markup=False)

    def showing(self, label: str) -> Callable[[int, int], None]:
        """A progress callback that draws one line under ``label`` until its work is done."""
        bar = self._progress.add_task(f"  {label}", total=None, detail="")

        def show(done: int, total: int) -> None:
            self._progress.update(bar, completed=done, total=total, visible=done < total)

        return show

    def _follow(self) -> None:
        last_look = False
        while not last_look:
            last_look = self._stop.wait(POLL_SECONDS)
            self.look()

    def look(self) -> dict[str, TrialState]:
        """Show what is new; the last state of every trial that has said something."""
        with self._looking:
            self._show(self._states())
            return dict(self._seen)

    @property
    def seconds_left(self) -> float | None:
        """By the speed of the last ten minutes; None while nothing tells it."""
        return next((task.time_remaining for task in self._progress.tasks if task.id == self._all), None)

    def _show(self, states: Mapping[str, TrialState]) -> None:
        self._seen |= states
        for key, state in states.items():
            self._done[key] = max(0.0, work_done(self._work[key], state) - self._found.get(key, 0.0))
            self._show_trial(key, state)
        ended = sum(stage.is_end for stage in self._stages.values())
        self._progress.update(self._all, completed=sum(self._done.values()), detail=f"{ended}/{len(self._labels)}")

    def _show_trial(self, key: str, state: TrialState) -> None:
        label = self._labels[key]
        if self._stages.get(key) != state.stage:
            self._stages[key] = state.stage
            if not self._console.is_terminal:
                self._console.print(f"{label}: {state.stage}", highlight=False, markup=False)
            if key in self._bars:
                self._progress.remove_task(self._bars.pop(key))
            if not state.stage.is_end:
                self._bars[key] = self._progress.add_task(f"  {label}", total=state.total, detail=state.stage)
        if key in self._bars:
            detail = f"{state.stage} {state.done}/{state.total}" + (f" · {step_words(state.row)}" if state.row else "")
            self._progress.update(self._bars[key], completed=state.done, total=state.total, detail=detail)
