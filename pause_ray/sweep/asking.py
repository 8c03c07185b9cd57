"""Tune's question for the next trial, answered by whoever decides. Knows Tune's searchers, no trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

NOT_YET = ""
"""Instead of a trial: what runs now decides whether there is another."""


class Asking(Searcher):  # type: ignore[misc]
    """Hands Tune one trial after another as ``{"trial": key}``, however many there turn out to be."""

    def __init__(self, next_trial: Callable[[], str | None], *, ended: Callable[[str, str | None], None]) -> None:
        """Begin.

        Args:
            next_trial: The key of the trial to begin, ``NOT_YET``, or None when there are no more.
            ended: Is given the key of every trial that has ended, and how its process was lost, or None.
        """
        super().__init__()
        self._next_trial = next_trial
        self._ended = ended
        self._keys: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles searchers to restore an experiment, which storage makes unnecessary here."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        """The next trial's config."""
        key = self._next_trial()
        if key is None:
            finished: str = Searcher.FINISHED
            return finished
        if key == NOT_YET:
            return None
        self._keys[trial_id] = key
        return {"trial": key}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002 (Tune's)
        """Pass on that a trial has ended."""
        key = self._keys.pop(trial_id, None)
        if key is not None:
            self._ended(key, "the trial's process was lost" if error else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as for ``__getstate__``."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as for ``__getstate__``."""
