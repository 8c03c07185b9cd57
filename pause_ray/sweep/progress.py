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

from pause_ray.engines.engine import HfEngineSpec
from pause_ray.needle.task import Cell, cells
from pause_ray.needle.walk import by_position, new_tokens
from pause_ray.spec import JsonObject
from pause_ray.train.telemetry import step_words
from pause_ray.trial.spec import TrialSpec

TRAINED_TOKEN_COST = 3.0
"""Prompt tokens that one trained token costs: a LoRA step is a forward pass and a backward pass of about twice its
work (the frozen base needs no weight gradients, but activations are recomputed or spilled)."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrialState:
    """How far one trial is."""

    stage: str
    """``waiting`` (for another run of the same trial), ``text``, ``training``, ``scoring``, ``rechecking``, ``done`` or ``failed``."""
    done: int
    total: int
    row: JsonObject | None = None
    """While training: what the training log says of the last step."""


def work_of(spec: TrialSpec) -> tuple[float, float]:
    """Training and scoring work of a trial, in prompt-token equivalents."""
    scoring = _scoring_work(spec)
    if spec.train is None or spec.corpus is None:
        return 0.0, scoring
    rows = spec.train.steps * spec.train.batch_size * spec.train.accumulation
    tokens = (spec.corpus.sequence_tokens + spec.corpus.min_context_tokens) / 2
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
    if state.stage == "training":
        return training * share
    if state.stage == "scoring":
        return training + scoring * share
    return training + scoring if state.stage in ("rechecking", "done", "failed") else 0.0


class SweepProgress:
    """Draws until left; in a terminal a live display, elsewhere a line per change of stage."""

    def __init__(
        self, console: Console, trials: Mapping[str, tuple[str, TrialSpec]], states: Callable[[], Mapping[str, TrialState]]
    ) -> None:
        """Prepare a display of ``trials`` (key → label and spec) whose ``states`` are asked for twice a second."""
        self._console = console
        self._trials = trials
        self._states = states
        self._work = {key: work_of(spec) for key, (_, spec) in trials.items()}
        self._bars: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sweep-progress", daemon=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        self._all = self._progress.add_task("all trials", total=sum(map(sum, self._work.values())), detail=f"0/{len(self._trials)}")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False)

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
            self._show(self._states())

    def _show(self, states: Mapping[str, TrialState]) -> None:
        ended = sum(state.stage in ("done", "failed") for state in states.values())
        work = sum(work_done(self._work[key], state) for key, state in states.items())
        self._progress.update(self._all, completed=work, detail=f"{ended}/{len(self._trials)}")
        for key, state in states.items():
            self._show_trial(key, state)

    def _show_trial(self, key: str, state: TrialState) -> None:
        label = self._trials[key][0]
        if self._stages.get(key) != state.stage:
            self._stages[key] = state.stage
            if not self._console.is_terminal:
                self._console.print(f"{label}: {state.stage}")
            if key in self._bars:
                self._progress.remove_task(self._bars.pop(key))
            if state.stage not in ("done", "failed"):
                self._bars[key] = self._progress.add_task(f"  {label}", total=state.total, detail=state.stage)
        if key in self._bars:
            detail = f"{state.stage} {state.done}/{state.total}" + (f" · {step_words(state.row)}" if state.row else "")
            self._progress.update(self._bars[key], completed=state.done, total=state.total, detail=detail)
