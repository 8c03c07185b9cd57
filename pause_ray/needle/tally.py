"""A fleet as it is at one moment, and what it has answered so far. Pure counting: knows results, no actor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pause_ray.needle.ledger import CellResult

Asked = Literal["grid", "proxy", "recheck"]
"""Why: for a trial's ledger, to judge an adapter in training, or again in other shapes."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All answers that were asked for one reason."""

    cells: int = 0
    unscored_cells: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0

    def with_result(self, result: CellResult) -> Answered:
        """And one more."""
        return Answered(
            cells=self.cells + 1,
            unscored_cells=self.unscored_cells + (result.score is None),
            prefilled_tokens=self.prefilled_tokens + result.prefilled_tokens,
            decoded_tokens=self.decoded_tokens + result.decoded_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class FleetState:
    """A moment of the fleet."""

    pids: tuple[int, ...]
    """Processes of the actors that are up."""
    busy: int
    """Of them, those that are answering."""
    coming: int
    """Actors that are starting, or for which there is no room."""
    orders: int
    """Calls that wait for answers."""
    waiting_cells: int
    """Cells that no actor has yet."""
    answered: Mapping[Asked, Answered]
    """Since the broker's process began."""


class Tally:
    """Counts answers as they come."""

    def __init__(self) -> None:
        self._answered: defaultdict[Asked, Answered] = defaultdict(Answered)

    def add(self, result: CellResult, *, asked: Asked) -> None:
        """One has come."""
        self._answered[asked] = self._answered[asked].with_result(result)

    @property
    def answered(self) -> dict[Asked, Answered]:
        """So far."""
        return dict(self._answered)
