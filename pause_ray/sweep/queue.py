"""How much a command may spend on a sweep. Knows no clock but the one it is given, and starts and ends nothing.

A budget decides whether another trial may start; running ones end as they would. What was left out is run by the same command
without the limit.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import Storage, is_complete
from pause_ray.evaluation.ledger import Ledger

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


GIVE_UP_SHARE = 0.1
"""Of an arm's trials (of all trials, for the whole sweep): if so many have failed and none has finished, the others are not begun."""
FEWEST_FAILURES = 3
"""One or two failures may be chance."""


class TrialQueue:
    """Trials that wait for their turn, first come first served."""

    def __init__(self, *, start: Callable[[str], str | None]) -> None:
        """``start`` is asked before each trial: None if it may begin, or why none may begin any more."""
        self._start = start
        self._arms: dict[str, str] = {}
        self._waiting: deque[str] = deque()
        self._finished: Counter[str] = Counter()
        self._failures: dict[str, list[str]] = {}
        self._taken_back: deque[str] = deque()
        self._is_over = False
        self.ended_by: str | None = None
        """Why no trial begins any more, for people; None while trials begin."""
        self.is_out_of_budget = False
        """Whether it is ``start`` that said so."""
        self.given_up: dict[str, str] = {}
        """Arm → why its other trials were not begun."""

    def expect(self, trials: Mapping[str, str]) -> None:
        """Count trials (key → arm) among those of their arms; they may never get in line."""
        self._arms.update(trials)

    def expects(self, key: str) -> bool:
        """Whether a trial is counted."""
        return key in self._arms

    def add(self, keys: Iterable[str]) -> None:
        """Let expected trials queue up behind those that wait."""
        self._waiting.extend(keys)

    def take_back(self, key: str) -> bool:
        """Let a trial that had begun go on before all others; False if it is not to, as no other of its arm or of the sweep is.

        A budget that is used up does not keep it: it was started within it.
        """
        may = not self._is_over and self._arms[key] not in self.given_up
        if may:
            self._taken_back.append(key)
        return may

    @property
    def may_take_back(self) -> bool:
        """Whether a trial that runs may come back."""
        return not self._is_over

    def next(self) -> str | None:
        """The trial whose turn it is, or None when none waits or none is to begin any more."""
        if self._taken_back and not self._is_over:
            return self._taken_back.popleft()
        while self._waiting and self.ended_by is None:
            key = self._waiting[0]
            if self._arms[key] not in self.given_up:
                self.ended_by = self._start(key)
                if self.ended_by is not None:
                    self.is_out_of_budget = True
                    return None
                return self._waiting.popleft()
            self._waiting.popleft()
        return None

    def end(self, reason: str) -> None:
        """Let no trial begin any more; of several reasons the first one counts."""
        self.ended_by = self.ended_by or reason
        self._is_over = True

    def note_finished(self, keys: Iterable[str]) -> None:
        """These trials came to their end."""
        self._finished.update(self._arms[key] for key in keys)

    def note_failed(self, key: str, message: str) -> None:
        """A trial failed: perhaps one too many of its arm, or of the sweep. One that was not expected counts for nothing."""
        arm = self._arms.get(key)
        if arm is None:
            return
        self._failures.setdefault(arm, []).append(message)
        planned, failed = Counter(self._arms.values()), self._failures[arm]
        if not self._finished[arm] and _enough(len(failed), of=planned[arm]):
            self.given_up.setdefault(arm, _in_words(f"of {planned[arm]} trials of the arm {arm}", failed))
        all_failed = [message for messages in self._failures.values() for message in messages]
        systemic = not self._finished.total() and len(self._failures) >= min(2, len(planned))
        if systemic and _enough(len(all_failed), of=planned.total()):
            self.end(_in_words(f"of {planned.total()} trials", all_failed))


def _enough(failed: int, *, of: int) -> bool:
    return failed >= max(FEWEST_FAILURES, math.ceil(GIVE_UP_SHARE * of))


def _in_words(whose: str, messages: list[str]) -> str:
    """How many failed, and the reason that most of them have in common: the same words but for numbers, digests and paths."""
    kinds = Counter(re.sub(r"\S*[\d/]\S*", "…", message) for message in messages)
    kind, count = kinds.most_common(1)[0]
    example = next(message for message in messages if re.sub(r"\S*[\d/]\S*", "…", message) == kind)
    return f"{len(messages)} {whose} have failed and none has finished, so the others were not begun; {count} of them: {example}"
