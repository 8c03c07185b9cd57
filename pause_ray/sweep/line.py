"""Which trial begins next, and when none does any more. Pure: it is told what ended, and asks whether the budget allows another.

An arm whose first trials all failed is given up, so that a mistake in it costs neither its other trials nor the other arms;
a sweep ends when trials of more than one arm fail and nothing has finished.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

GIVE_UP_SHARE = 0.1
"""Of an arm's trials (of all trials, for the whole sweep): if so many have failed and none has finished, the others are not begun."""
FEWEST_FAILURES = 3
"""One or two failures may be chance."""


class WaitingLine:
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
