"""Says what a cluster is asked for and does not give while a sweep does not get on: what was asked, what is there, what to look at.

Only where nothing gets on: that more is asked for than there is means nothing while trials run. Who asks is not told by Ray, so what
others on the cluster ask for is named too. Knows Ray through ``demand``; asks for nothing itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from ray.exceptions import RayError

from pause_ray.demand import NODE_RESOURCES, Demand, Wish, demand
from pause_ray.sweep.progress import QUEUED, WAITING, TrialState
from pause_ray.words import duration

P = ParamSpec("P")
T = TypeVar("T")

FIRST_SECONDS = 60.0
"""Of waiting, after which it is said; machines of a cloud take minutes to come, so this is news and no alarm."""
HOPELESS_SECONDS = 15.0
"""The same where the autoscaler has said that it will never come."""
MOST_SECONDS = 1800.0
"""Between two times that it is said; the first ones are a minute apart, then each twice as long."""
LOOK_SECONDS = 5.0
MOST_FAILURES = 3
"""Of those that an autoscaler tells, the newest."""
WHERE_TO_LOOK = "see `ray status` and logs/monitor.log on the head, and how many nodes of which kinds the cluster file allows"


class Shortage:
    """What is waited for, from one look to the next, and when to speak of it. Pure: is given looks and times in seconds."""

    def __init__(self) -> None:
        """Nothing is waited for."""
        self._since: dict[Wish, float] = {}
        self._told: float | None = None
        """After how many seconds it was last spoken of."""

    def look(self, seen: Demand, *, now: float, quiet_since: float) -> str | None:
        """A line for people, if it is time for one.

        Args:
            seen: The cluster now.
            now: The time.
            quiet_since: When the sweep last got on.
        """
        self._since = {wish: self._since.get(wish, now) for wish in seen.wishes}
        waiting = {wish: now - max(since, quiet_since) for wish, since in self._since.items()}
        longest = max(waiting.values(), default=0.0)
        if longest < LOOK_SECONDS:
            self._told = None
        first = HOPELESS_SECONDS if any(wish.is_hopeless for wish in waiting) else FIRST_SECONDS
        if longest < (first if self._told is None else self._told + min(max(self._told, FIRST_SECONDS), MOST_SECONDS)):
            return None
        self._told = longest
        return _in_words({wish: seen.wishes[wish] for wish, seconds in waiting.items() if seconds >= LOOK_SECONDS}, seen, longest)


def _in_words(wishes: Mapping[Wish, int], seen: Demand, seconds: float) -> str:
    asked = ", ".join(f"{number} × {_piece(wish)}" for wish, number in wishes.items())
    there = ", ".join(f"{seen.total[name]:g} {name}s ({seen.free[name]:g} free)" for name in NODE_RESOURCES)
    nodes = f"{seen.nodes} node{'s' if seen.nodes != 1 else ''}"
    parts = [
        f"nothing has got on for {duration(seconds)}",
        f"the cluster is asked, by this sweep or by others, for {asked}",
        f"it has {nodes} with {there}",
    ]
    if seen.starting:
        parts.append("starting: " + ", ".join(f"{number} {kind}" for kind, number in seen.starting.items()))
    if hopeless := [wish for wish in wishes if wish.is_hopeless]:
        parts.append("its autoscaler can start nothing that gives " + ", nor ".join(map(_piece, hopeless)))
    if seen.failed:
        parts.append("could not be started: " + ", ".join(seen.failed[-MOST_FAILURES:]))
    return "; ".join([*parts, WHERE_TO_LOOK])


def _piece(wish: Wish) -> str:
    what = " + ".join(f"{number:g} {name}" for name, number in wish.resources) or "a place"
    return f"({what}{' on ' + ', '.join(wish.labels) if wish.labels else ''})"


class ShortageWatch:
    """Looks at the cluster from when it is entered until it is left, from a thread of its own."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """``say`` shows a line to people."""
        self._say = say
        self._quiet_since = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look_regularly, name="sweep-shortage", daemon=True)

    def noticing(self, told: Callable[P, T]) -> Callable[P, T]:
        """``told``, a call of which means that the sweep gets on."""

        def call(*given: P.args, **named: P.kwargs) -> T:
            self._quiet_since = time.monotonic()
            return told(*given, **named)

        return call

    def hears(self, states: Mapping[str, TrialState]) -> Mapping[str, TrialState]:
        """``states``, what trials have said since they were last asked; who says only that it waits has not got on."""
        if any(state.stage not in (WAITING, QUEUED) for state in states.values()):
            self._quiet_since = time.monotonic()
        return states

    def __enter__(self) -> Self:
        self._quiet_since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()

    def _look_regularly(self) -> None:
        shortage = Shortage()
        while not self._left.wait(LOOK_SECONDS):
            try:
                told = shortage.look(demand(), now=time.monotonic(), quiet_since=self._quiet_since)
            except RayError:  # the head is busy or gone, which others tell better
                continue
            if told is not None:
                self._say(told)
