"""A first signal asks, a second does what it did before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pause_ray.core.process import stop_on_signal

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_a_first_signal_asks_and_a_second_of_either_kind_does_what_it_did(first: signal.Signals, second: signal.Signals) -> None:
    asked: list[str] = []
    before: list[int] = []
    handlers = {number: signal.signal(number, lambda its, frame: before.append(its)) for number in BOTH}
    try:
        with stop_on_signal(lambda: asked.append("first"), insist=lambda: asked.append("second")):
            os.kill(os.getpid(), first)
            assert (asked, before) == (["first"], [])
            os.kill(os.getpid(), second)
            assert (asked, before) == (["first", "second"], [second])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_what_was_not_asked_for_is_as_it_was_afterwards() -> None:
    handlers = [signal.getsignal(number) for number in BOTH]
    with stop_on_signal(lambda: None):
        assert [signal.getsignal(number) for number in BOTH] != handlers
    assert [signal.getsignal(number) for number in BOTH] == handlers


def test_outside_the_main_thread_nothing_changes() -> None:
    handlers = [signal.getsignal(number) for number in BOTH]
    seen: list[object] = []

    def enter() -> None:
        with stop_on_signal(lambda: None):
            seen.append([signal.getsignal(number) for number in BOTH])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [handlers]
