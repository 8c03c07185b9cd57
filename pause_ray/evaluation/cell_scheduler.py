"""Whose turn it is at the scoring actors: what each is given, who must make way, how many actors there should be.

Orders (the cells that one trial wants answered) share the actors evenly: an order without an actor comes before one with
some, and where there are more orders than actors they take turns. Pure: knows cells and times, no Ray and no clock.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.prefix_plan import by_position, new_tokens, split_for_actors
from pause_ray.evaluation.suite import Cell

TURN_SECONDS = 60.0
"""An actor stays with an order at least this long where others wait; changing costs an adapter and the beginning of a prompt."""
TURN_ANSWERS = 10
"""And at least this many times the longest that it needed for one answer, which is what computing a prompt anew can cost."""
BASE_TURN_SECONDS = 600.0
"""The same where the waiting order needs other base weights, which take minutes to load when they are large."""
STEALS_FROM = 3
"""A run is split for an idle actor while it would keep as many actors busy: one of them goes on, two beginnings are computed anew."""


def busy_actors(cells: Sequence[Cell]) -> int:
    """How many actors could share these cells before each computes little more than one whole prompt."""
    if not cells:
        return 0
    ordered = by_position(cells)
    whole = max(cell.context_tokens for cell in ordered)
    return min(len(ordered), max(1, math.ceil(sum(new_tokens(ordered)) / whole)))


@dataclass(kw_only=True, eq=False)
class Order:
    """The cells that one trial wants answered."""

    key: str
    base: object
    """Equal for orders that the same base weights answer."""
    num_cells: int
    shareable: int
    """``busy_actors`` of all its cells."""
    waiting: list[Cell]
    """No actor has them."""
    served: float
    """When it came, or last got or lost an actor."""
    runs: dict[int, Run] = field(default_factory=dict)
    """What actors are at, by the runs' numbers."""

    @property
    def open_cells(self) -> int:
        """Cells without an answer."""
        return len(self.waiting) + sum(len(run.owed) for run in self.runs.values())

    @property
    def useful_actors(self) -> int:
        """How many actors it can keep busy now."""
        return math.ceil(self.shareable * self.open_cells / self.num_cells)


@dataclass(kw_only=True, eq=False)
class Run:
    """What one actor was asked and still owes."""

    number: int
    order: Order
    owed: dict[str, Cell]
    """By their ids, in the order of their walk; a few answers may come after later ones."""
    since: float
    answered: float
    """When the last answer came, or the run began."""
    longest_answer: float = 0.0
    """Seconds."""
    making_way: bool = False
    """It was told to end after the cell that it is at."""

    def had_its_turn(self, *, before: Order, now: float) -> bool:
        """Whether it has lasted long enough to make way for that order."""
        lasted = now - self.since
        if self.order.base != before.base and min(lasted, now - before.served) < BASE_TURN_SECONDS:
            return False
        return lasted >= max(TURN_SECONDS, TURN_ANSWERS * self.longest_answer)


class Turns:
    """Orders and runs, and the rules between them. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._orders: dict[str, Order] = {}
        self._numbers = itertools.count()

    def enter(self, key: str, cells: Sequence[Cell], *, base: object, now: float) -> None:
        """An order comes."""
        self._orders[key] = Order(key=key, base=base, num_cells=len(cells), shareable=busy_actors(cells), waiting=list(cells), served=now)

    def leave(self, key: str) -> list[Run]:
        """An order goes; the runs that still are at it, which nobody waits for."""
        order = self._orders.pop(key, None)
        return list(order.runs.values()) if order else []

    def next_run(self, *, base: object, actors: int, now: float) -> Run | None:
        """What an idle actor should do, if anything waits.

        Args:
            base: Of the weights that it holds; None for none.
            actors: How many there are, those that will soon be up included.
            now: The time.
        """
        waiting = [order for order in self._orders.values() if order.waiting]
        if not waiting:
            return None
        longest_wait = now - BASE_TURN_SECONDS
        order = min(
            waiting,
            key=lambda order: (not (order.base == base or order.served < longest_wait), len(order.runs), order.served),
        )
        share = max(1, math.ceil(actors / len(self._orders)) - len(order.runs))
        mine, *others = split_for_actors(order.waiting, num_actors=min(share, busy_actors(order.waiting)))
        run = Run(number=next(self._numbers), order=order, owed={cell.id: cell for cell in mine}, since=now, answered=now)
        order.waiting = [cell for other in others for cell in other]
        order.served = now
        order.runs[run.number] = run
        return run

    def begun(self, run: Run, cells: list[Cell]) -> None:
        """The order in which the actor will answer."""
        run.owed = {cell.id: cell for cell in cells}

    def answered(self, run: Run, cell_id: str, *, now: float) -> None:
        """One answer of a run has come."""
        del run.owed[cell_id]
        run.longest_answer = max(run.longest_answer, now - run.answered)
        run.answered = now

    def end(self, run: Run, *, now: float) -> None:
        """The actor is at it no longer; what it owes waits again."""
        run.order.runs.pop(run.number, None)
        run.order.served = now
        run.order.waiting += run.owed.values()

    def must_make_way(self, *, now: float) -> Run | None:
        """The run that should end after its cell, while no actor is idle, for an order that has none."""
        orders = list(self._orders.values())
        left_out = min((order for order in orders if order.waiting and not order.runs), key=lambda order: order.served, default=None)
        if left_out is None or any(run.making_way for run in self._runs()):
            return None
        several = [order for order in orders if len(order.runs) > 1 and order.base == left_out.base]
        if several:
            runs = max(several, key=lambda order: len(order.runs)).runs.values()
            return max(runs, key=lambda run: run.since)
        over = [run for run in self._runs() if run.had_its_turn(before=left_out, now=now)]
        return min(over, key=lambda run: run.since, default=None)

    def worth_splitting(self) -> Run | None:
        """The run that should end after its cell, while an actor is idle and nothing waits, so that both share the rest."""
        runs = self._runs()
        if any(run.making_way for run in runs) or any(order.waiting for order in self._orders.values()):
            return None
        busiest = max(runs, key=lambda run: len(run.owed), default=None)
        return busiest if busiest and busy_actors([*busiest.owed.values()]) >= STEALS_FROM else None

    def _runs(self) -> list[Run]:
        return [run for order in self._orders.values() for run in order.runs.values()]

    @property
    def open_orders(self) -> int:
        """Orders that have come and not gone."""
        return len(self._orders)

    @property
    def useful_actors(self) -> int:
        """How many actors all orders together can keep busy."""
        return sum(order.useful_actors for order in self._orders.values())

    @property
    def waiting_cells(self) -> int:
        """Cells that no actor has."""
        return sum(len(order.waiting) for order in self._orders.values())


def wanted_actors(turns: Turns, *, bounds: tuple[int, int], number_up: int, room_is_wanted: bool) -> int:
    """How many actors there should be: what the orders can use, within bounds.

    Args:
        turns: What is to be done.
        bounds: Fewest and most.
        number_up: How many there are, without those that wait for room themselves.
        room_is_wanted: Something else waits for what actors hold: none is added then, but the first.
    """
    fewest, most = bounds
    least = max(fewest, min(1, turns.open_orders))
    useful = min(turns.useful_actors, number_up if room_is_wanted else most)
    return max(least if room_is_wanted else fewest, useful)


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
