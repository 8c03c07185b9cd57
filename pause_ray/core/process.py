"""What a process's log lines are about: the trial that it runs or scores for, and the cell. Knows names only, no handler of others.

Trials' processes and scoring actors do one thing at a time, so what they are at belongs to the process and not to a thread: a
training's threads say it too. The driver does many things, and its lines name their trial themselves.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("pause_ray")


class _Subject(logging.Filter):
    """Puts what the process is at in front of its own lines."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        """Every line passes."""
        if self.parts:
            record.msg, record.args = f"{', '.join(self.parts)}: {record.getMessage()}", ()
        return True


_SUBJECT = _Subject()


@contextlib.contextmanager
def about(part: str) -> Iterator[None]:
    """Within the block, every line that this process logs begins with ``part``; blocks within blocks add to it, nothing adds nothing."""
    before = _SUBJECT.parts
    _SUBJECT.parts = (*before, part) if part else before
    try:
        yield
    finally:
        _SUBJECT.parts = before


def write_lines() -> None:
    """Let a process that Ray started write its lines to standard error, which Ray keeps in the node's session folder.

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


def trial_words(label: str, digest: str) -> str:
    """How a line names a trial: as people call it, and by the beginning of its folder's name."""
    return f"trial {label} ({digest[:8]})"


@contextlib.contextmanager
def first_signal_asks(ask: Callable[[], None], *, insist: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call ``ask`` at a first SIGINT or SIGTERM within the block; a second calls ``insist`` and does what it did before.

    Outside a process's main thread, which alone can take signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, its in before.items():
            signal.signal(number, its)

    def answer(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, answer_again)
        ask()

    def answer_again(number: int, frame: object) -> None:
        restore()
        insist()
        signal.raise_signal(number)

    for number in before:
        signal.signal(number, answer)
    try:
        yield
    finally:
        restore()
