"""A first SIGTERM or Ctrl-C as a request to end, a second as what it was before. Knows nothing of what runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


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
