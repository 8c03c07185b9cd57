"""What a progress bar says of a training: loss, speed and the time that remains, also where there is no terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pause_ray.cli import terminal
from pause_ray.cli.terminal import StageProgress
from pause_ray.core.spec import JsonObject


def row(step: int, *, seconds: float = 3.0) -> JsonObject:
    return {"step": step, "loss": 2.0 / step, "seconds": seconds, "tokens_per_second": 300.0}


def shown_on(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=140, color_system=None, force_interactive=is_terminal)
    monkeypatch.setattr(terminal, "err", console)
    return written


def last_drawn(written: io.StringIO) -> str:
    """The last state of the bar, without what moves the cursor."""
    return re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", written.getvalue()).rstrip().rpartition("\r")[2]


def test_a_resumed_training_says_what_remains_by_the_seconds_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown_on(monkeypatch, is_terminal=True)
    with StageProgress() as show:
        for step in range(1, 41):  # all at once: they were done before
            show("training", step, 60, row(step))
    shown = last_drawn(written)
    assert shown.startswith("training")
    assert "40/60 loss 0.050 · 300 tokens/s" in shown
    assert shown.endswith("eta 0:01:00"), "twenty steps of three seconds"


def test_the_time_that_remains_follows_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown_on(monkeypatch, is_terminal=True)
    with StageProgress() as show:
        for step in range(1, 41):
            show("training", step, 60, row(step, seconds=100.0 if step < 20 else 6.0))
    assert last_drawn(written).endswith("eta 0:02:00")


def test_without_a_terminal_there_is_a_line_at_the_beginning_at_the_end_and_at_times(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown_on(monkeypatch, is_terminal=False)
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with StageProgress() as show:
        for step in range(1, 61):
            now = 4.0 * step
            show("training", step, 60, row(step))
    lines = written.getvalue().splitlines()
    assert lines[0] == "training 1/60 loss 2.000 · 300 tokens/s"
    assert lines[-1] == "training 60/60 loss 0.033 · 300 tokens/s"
    assert 4 <= len(lines) <= 6, "240 seconds, a line a minute"
