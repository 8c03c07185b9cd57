"""The queue of trials that wait to begin, and the budget that limits how many may.

A budget decides whether another trial may start and stops none. The same command without the limit runs the trials that were left out.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import Storage, is_complete
from pause_ray.evaluation.ledger import Ledger

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one command; None for no limit."""

    max_trials: int | None = None
    """Most trials that the command starts; trials that were finished before do not count."""
    max_hours: float | None = None
    """Most hours since the sweep began to run."""
    max_cost: float | None = None
    """Most money for machines and endpoints together, in the currency of the prices."""
    price_per_hour: float = 0.0
    """Price per hour of all machines that the sweep holds, used or not."""

    def __post_init__(self) -> None:
        for option, value in (("--max-trials", self.max_trials), ("--max-hours", self.max_hours), ("--max-cost", self.max_cost)):
            if value is not None and not value > 0:  # NaN is refused too
                raise SpecError(f"{option} {value:g}: must be above zero, or left out for no limit")


Bill = Callable[[str], tuple[float, bool]]
"""Returns the cost so far of the answers of the trial with this digest, and whether it is final."""


def bill_of(storage: Storage) -> Bill:
    """Return the bill that reads the costs of endpoints' answers from ledgers."""

    def bill(trial: str) -> tuple[float, bool]:
        folder = storage.trials / trial
        return math.fsum(row.cost or 0.0 for row in Ledger(folder / "cells.jsonl").rows()), is_complete(folder)

    return bill


class BudgetMeter:
    """Counts what a command spends against its budget; thread-safe."""

    def __init__(self, budget: Budget, *, bill: Bill = lambda trial: (0.0, True), clock: Callable[[], float] = time.monotonic) -> None:
        """Start to count now; ``clock`` returns the time in seconds."""
        self._budget, self._bill, self._clock = budget, bill, clock
        self._began = clock()
        self._started: set[str] = set()
        self._growing: dict[str, float] = {}
        """Cost before this command of each started trial whose cost may still grow, by trial digest."""
        self._spent = 0.0
        """Money spent on trials whose cost is final."""
        self._lock = threading.Lock()

    def start(self, trial: str) -> str | None:
        """Count a trial as started and return None, or return the reason why it may not start. A started trial may start again."""
        with self._lock:
            if trial in self._started:
                return None
            reached = self._reached()
            if reached is None:
                self._started.add(trial)
                if self._budget.max_cost is not None:
                    self._growing[trial], _ = self._bill(trial)
            return reached

    def _reached(self) -> str | None:
        budget, hours = self._budget, (self._clock() - self._began) / SECONDS_PER_HOUR
        if budget.max_trials is not None and len(self._started) >= budget.max_trials:
            return f"--max-trials {budget.max_trials} is reached"
        if budget.max_hours is not None and hours >= budget.max_hours:
            return f"--max-hours {budget.max_hours:g} is reached"
        cost = hours * budget.price_per_hour + self._answers_cost()
        if budget.max_cost is not None and cost >= budget.max_cost:
            return f"--max-cost {budget.max_cost:g} is reached: {cost:.2f} is spent"
        return None

    def _answers_cost(self) -> float:
        growing = 0.0
        for trial, before in list(self._growing.items()):
            money, is_final = self._bill(trial)
            if is_final:
                self._spent += money - before
                del self._growing[trial]
            else:
                growing += money - before
        return self._spent + growing


def left_over(reached: str, *, trials: int) -> str:
    """Return a sentence that says why ``trials`` were not started and how to continue."""
    return f"{reached}: {trials} trials were not started; the same command goes on with them, without the limit to the end"


GIVE_UP_SHARE = 0.1
"""Share of an arm's trials, or of all trials, that may fail while none has finished; then the others are not started."""
FEWEST_FAILURES = 3
"""Fewest failures after which an arm or a sweep is given up; one or two may be chance."""
VARIABLE_WORD = re.compile(r"\S*[\d/]\S*")
"""Numbers, digests and paths, in which messages of the same failure may differ."""


class TrialQueue:
    """Trials that wait to begin, first come first served."""

    def __init__(self, *, start: Callable[[str], str | None]) -> None:
        """Create an empty queue; ``start`` is called before each trial and returns None, or why no further trial may begin."""
        self._start = start
        self._arms: dict[str, str] = {}
        self._waiting: deque[str] = deque()
        self._finished: Counter[str] = Counter()
        self._failures: dict[str, list[str]] = {}
        self._taken_back: deque[str] = deque()
        self._is_over = False
        self.ended_by: str | None = None
        """Reason why no further trial begins; None while trials begin."""
        self.is_out_of_budget = False
        """Whether the budget is the reason."""
        self.given_up: dict[str, str] = {}
        """Reason why the other trials of an arm are not started, by arm."""

    def expect(self, trials: Mapping[str, str]) -> list[str]:
        """Register trials and their arms (key → arm) before they are queued; return the keys that were not registered yet."""
        new = [key for key in trials if key not in self._arms]
        self._arms.update(trials)
        return new

    def add(self, keys: Iterable[str]) -> None:
        """Append registered trials to the queue."""
        self._waiting.extend(keys)

    def take_back(self, key: str) -> bool:
        """Put a lost trial at the front of the queue and return True, or return False if its arm or the sweep was given up.

        A budget that is used up does not matter: the trial was started within it.
        """
        if self._is_over or self._arms[key] in self.given_up:
            return False
        self._taken_back.append(key)
        return True

    @property
    def may_take_back(self) -> bool:
        """Whether a running trial that is lost may begin again."""
        return not self._is_over

    def next(self) -> str | None:
        """Return the key of the next trial, or None when no trial waits or none may begin."""
        if self._taken_back and not self._is_over:
            return self._taken_back.popleft()
        while self._waiting and self.ended_by is None:
            key = self._waiting[0]
            if self._arms[key] not in self.given_up and (reason := self._start(key)):
                self.ended_by, self.is_out_of_budget = reason, True
                return None
            self._waiting.popleft()
            if self._arms[key] not in self.given_up:
                return key
        return None

    def end(self, reason: str) -> None:
        """Start no further trial; the first of several reasons is kept."""
        self.ended_by = self.ended_by or reason
        self._is_over = True

    def note_finished(self, keys: Iterable[str]) -> None:
        """Count trials that finished."""
        self._finished.update(self._arms[key] for key in keys)

    def note_failed(self, key: str, message: str) -> None:
        """Count a failed trial, and give up its arm or the sweep after too many; trials that are not registered are ignored."""
        arm = self._arms.get(key)
        if arm is None:
            return
        failed = self._failures.setdefault(arm, [])
        failed.append(message)
        planned = Counter(self._arms.values())
        if not self._finished[arm] and _are_too_many(failed, planned[arm]):
            self.given_up.setdefault(arm, _summarize(f"of {planned[arm]} trials of the arm {arm}", failed))
        all_failed = [message for messages in self._failures.values() for message in messages]
        are_several_arms = len(self._failures) >= min(2, len(planned))
        if not self._finished.total() and are_several_arms and _are_too_many(all_failed, planned.total()):
            self.end(_summarize(f"of {planned.total()} trials", all_failed))


def _are_too_many(failed: Sequence[str], planned: int) -> bool:
    return len(failed) >= max(FEWEST_FAILURES, math.ceil(GIVE_UP_SHARE * planned))


def _summarize(of_trials: str, messages: Sequence[str]) -> str:
    """Return a sentence about failures with the first of the most common kind of message."""
    kinds = [VARIABLE_WORD.sub("…", message) for message in messages]
    [(kind, count)] = Counter(kinds).most_common(1)
    example = messages[kinds.index(kind)]
    return f"{len(messages)} {of_trials} have failed and none has finished, so the others were not begun; {count} of them: {example}"
