"""The state of a process: the stages of a trial, the subject of its log lines, and its reaction to a first and a second signal.

A trial's process and a scoring actor do one thing at a time, so the subject belongs to the process and not to a thread: the threads of a
training log it too. The driver does many things at once, and its log lines name their trial themselves.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum

log = logging.getLogger("pause_ray")


class Stage(StrEnum):
    """The stages of a trial. The display, ``status.json`` and the metrics use these names."""

    TO_COME = "to_come"
    """The trial has not begun."""
    STARTING = "starting"
    """The trial's process has begun and reported nothing yet."""
    WAITING = "waiting"
    """The trial waits for another process that runs it or trains its adapter, so it has nothing of its own to finish."""
    DATA = "data"
    """The trial's training sequences are written."""
    TRAINING = "training"
    PROXY = "proxy"
    """An adapter of the unfinished training is scored, and the training itself has ended."""
    QUEUED = "queued"
    """The trial's cells wait for a scoring actor: none is up yet, or all work for other trials."""
    SCORING = "scoring"
    NUMERICS_CHECK = "numerics_check"
    """Some of the scored cells are answered again with other chunk shapes."""
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """Early stopping ended the trial, or the sweep was interrupted."""

    @property
    def is_end(self) -> bool:
        """Return whether the trial does nothing more in this run of the sweep."""
        return self in (Stage.DONE, Stage.FAILED, Stage.STOPPED)

    @property
    def waits_for_others(self) -> bool:
        """Return whether the trial cannot make progress by itself, so that its silence means nothing."""
        return self in (Stage.WAITING, Stage.QUEUED)


class _Subject(logging.Filter):
    """Puts the subject of the process in front of its own log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every line pass."""
        if self.parts:
            record.msg, record.args = f"{', '.join(self.parts)}: {record.getMessage()}", ()
        return True


_SUBJECT = _Subject()


@contextlib.contextmanager
def about(part: str) -> Iterator[None]:
    """Begin every line that this process logs within the block with ``part``; nested blocks add to it, an empty part adds nothing."""
    before = _SUBJECT.parts
    _SUBJECT.parts = (*before, part) if part else before
    try:
        yield
    finally:
        _SUBJECT.parts = before


def log_to_stderr() -> None:
    """Let a process that Ray started write its log lines to standard error, which Ray keeps in the node's session folder.

    Without effect where somebody has decided already where lines go, as the command line does.
    """
    if _SUBJECT not in log.filters:
        log.addFilter(_SUBJECT)
    if logging.getLogger().handlers or log.handlers:
        return
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(lines)
    log.setLevel(logging.INFO)


def format_trial(label: str, digest: str) -> str:
    """Return the name of a trial in log lines: its label, and the beginning of its folder's name."""
    return f"trial {label} ({digest[:8]})"


@contextlib.contextmanager
def stop_on_signal(ask: Callable[[], None], *, insist: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call ``ask`` at a first SIGINT or SIGTERM within the block; a second calls ``insist`` and has the effect it had before the block.

    Outside a process's main thread, which alone can take signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        for handled in before:
            signal.signal(handled, handle_again)
        ask()

    def handle_again(number: int, frame: object) -> None:
        restore()
        insist()
        signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
