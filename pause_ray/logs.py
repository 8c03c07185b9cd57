"""What a process's log lines are about: the trial that it runs or scores for, and the cell. Knows names only, no handler of others.

Trials' processes and scoring actors do one thing at a time, so what they are at belongs to the process and not to a thread: a
training's threads say it too. The driver does many things, and its lines name their trial themselves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

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
