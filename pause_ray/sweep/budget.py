"""How much a command may spend on a sweep. Knows no clock but the one it is given, and starts and ends nothing.

A budget decides whether another trial may start; running ones end as they would. What was left out is run by the same command
without the limit.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pause_ray.errors import SpecError
from pause_ray.needle.ledger import Ledger
from pause_ray.storage import Storage, is_complete

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one command; None for no limit."""

    max_trials: int | None = None
    """Trials that are started, finished before or not; what is finished already does not count."""
    max_hours: float | None = None
    """Since the sweep began to run."""
    max_cost: float | None = None
    """In the currency of the prices, of machines and endpoints together."""
    price_per_hour: float = 0.0
    """Of all machines that the sweep holds, used or not."""

    def __post_init__(self) -> None:
        for option, value in (("--max-trials", self.max_trials), ("--max-hours", self.max_hours), ("--max-cost", self.max_cost)):
            if value is not None and not value > 0:  # nor what is no number
                raise SpecError(f"{option} {value:g}: must be above zero, or left out for no limit")

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in (self.max_trials, self.max_hours, self.max_cost))

    def reached(self, *, started: int, seconds: float, spent: float = 0.0) -> str | None:
        """The limit that keeps another trial from starting, in words; None where it may start.

        Args:
            started: Trials that this command has started.
            seconds: Since the sweep began to run.
            spent: On answers of endpoints, in the prices' currency.
        """
        hours = seconds / SECONDS_PER_HOUR
        cost = hours * self.price_per_hour + spent
        if self.max_trials is not None and started >= self.max_trials:
            return f"--max-trials {self.max_trials} is reached"
        if self.max_hours is not None and hours >= self.max_hours:
            return f"--max-hours {self.max_hours:g} is reached"
        if self.max_cost is not None and cost >= self.max_cost:
            return f"--max-cost {self.max_cost:g} is reached: {cost:.2f} is spent"
        return None


class Bill(Protocol):
    """What a trial's answers have cost."""

    def __call__(self, trial: str) -> tuple[float, bool]:
        """Of the trial with this digest: money so far, and whether that is all."""


class BudgetMeter:
    """A budget while it is spent: asked once before each trial. Several threads may ask."""

    def __init__(self, budget: Budget, *, bill: Bill | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to count now.

        Args:
            budget: The limits.
            bill: Asked for the trials that were started; None where answers cost nothing.
            clock: Tells seconds.
        """
        self._budget, self._bill, self._clock = budget, bill, clock
        self._began = clock()
        self._started: set[str] = set()
        self._growing: dict[str, float] = {}
        """Started trials that may still cost something, and what they had cost before."""
        self._spent = 0.0
        """By trials that cost nothing any more."""
        self._lock = threading.Lock()

    def start(self, trial: str) -> str | None:
        """Count a trial as started, unless a limit forbids it: then the limit in words. A trial that was started may go on."""
        with self._lock:
            if trial in self._started:
                return None
            seconds = self._clock() - self._began
            reached = self._budget.reached(started=len(self._started), seconds=seconds, spent=self._answers_cost())
            if reached is None:
                self._started.add(trial)
                if self._counts_answers:
                    self._growing[trial] = self._asked(trial)[0]
            return reached

    @property
    def _counts_answers(self) -> bool:
        return self._budget.max_cost is not None and self._bill is not None

    def _asked(self, trial: str) -> tuple[float, bool]:
        return self._bill(trial) if self._bill else (0.0, True)

    def _answers_cost(self) -> float:
        growing = 0.0
        for trial, before in list(self._growing.items()):
            money, is_all = self._asked(trial)
            if is_all:
                self._spent += money - before
                del self._growing[trial]
            else:
                growing += money - before
        return self._spent + growing


def bill_of(storage: Storage) -> Bill:
    """The costs that ledgers have, of endpoints with prices."""

    def bill(trial: str) -> tuple[float, bool]:
        folder = storage.trials / trial
        return math.fsum(row.cost or 0.0 for row in Ledger(folder / "cells.jsonl").rows()), is_complete(folder)

    return bill


def left_over(reached: str, *, trials: int) -> str:
    """For people: why ``trials`` were not started, and how to go on."""
    return f"{reached}: {trials} trials were not started; the same command goes on with them, without the limit to the end"
