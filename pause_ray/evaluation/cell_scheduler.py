"""Assigns cells to scoring actors: fair between trials, and cells that share a prefix stay on one actor. Pure: no Ray and no clock.

Requests (the cells of one trial) share the actors evenly: a request without an actor is served before one that has some, and where
requests outnumber actors they take turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.prefix_plan import by_position, new_tokens, split_for_actors
from pause_ray.evaluation.suite import Cell

MIN_BATCH_SECONDS = 60.0
"""Time that a batch runs before another request may preempt it; a change costs an adapter and the prefix of a prompt."""
MIN_BATCH_ANSWERS = 10
"""The same time as a multiple of the batch's longest answer, which is about what the prefix of a prompt costs."""
MODEL_SWITCH_SECONDS = 600.0
"""The same time where the waiting request needs another base model; large weights take minutes to load."""
MIN_ACTORS_TO_SPLIT = 3
"""A batch is split for an idle actor if it could keep this many actors busy; with fewer, both would mostly recompute prefixes."""

Purpose = Literal["grid", "proxy", "numerics_check"]
"""Why cells are answered: for a trial's ledger, to judge an adapter in training, or again with other numerics."""


def busy_actors(cells: Sequence[Cell]) -> int:
    """Return how many actors can share these cells before each computes little more than one whole prompt."""
    if not cells:
        return 0
    ordered = by_position(cells)
    longest = max(cell.context_tokens for cell in ordered)
    return min(len(ordered), max(1, math.ceil(sum(new_tokens(ordered)) / longest)))


@dataclass(kw_only=True, eq=False)
class ScoringRequest:
    """The cells of one trial that are to be answered."""

    key: str
    base_model: object
    """Equal for requests that the same base weights answer."""
    num_cells: int
    max_actors: int
    """``busy_actors`` of all its cells."""
    waiting: list[Cell]
    """Cells that no actor has."""
    last_served: float
    """The time at which the request was submitted, or last got or lost an actor."""
    batches: dict[int, Batch] = field(default_factory=dict)
    """Batches that actors are working on, by number."""

    @property
    def useful_actors(self) -> int:
        """The number of actors that the unanswered cells can keep busy."""
        unanswered = len(self.waiting) + sum(len(batch.remaining) for batch in self.batches.values())
        return math.ceil(self.max_actors * unanswered / self.num_cells)


@dataclass(kw_only=True, eq=False)
class Batch:
    """Cells of one request that one actor is answering."""

    number: int
    request: ScoringRequest
    remaining: dict[str, Cell]
    """Unanswered cells by id, in the order in which the actor answers them; a few answers may arrive out of order."""
    started: float
    last_answer: float
    """The time of the last answer, or of the start."""
    longest_answer: float = 0.0
    """Seconds."""
    preempted: bool = False
    """Whether the actor was told to stop after its current cell."""

    def may_be_preempted(self, *, by: ScoringRequest, now: float) -> bool:
        """Return whether the batch has run long enough to give its actor to that request."""
        seconds = now - self.started
        if self.request.base_model != by.base_model and min(seconds, now - by.last_served) < MODEL_SWITCH_SECONDS:
            return False
        return seconds >= max(MIN_BATCH_SECONDS, MIN_BATCH_ANSWERS * self.longest_answer)


class CellScheduler:
    """Decides which request an idle actor serves and which batch is preempted. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._requests: dict[str, ScoringRequest] = {}
        self._numbers = itertools.count()

    def submit(self, key: str, cells: Sequence[Cell], *, base_model: object, now: float) -> None:
        """Add the request that ``key`` identifies."""
        self._requests[key] = ScoringRequest(
            key=key, base_model=base_model, num_cells=len(cells), max_actors=busy_actors(cells), waiting=list(cells), last_served=now
        )

    def withdraw(self, key: str) -> list[Batch]:
        """Remove a request and return its batches that actors are still working on."""
        request = self._requests.pop(key, None)
        return list(request.batches.values()) if request else []

    def assign(self, *, base_model: object, num_actors: int, now: float) -> Batch | None:
        """Return the next batch for an idle actor that has ``base_model`` loaded (None: nothing), or None if no cell waits.

        ``num_actors`` includes actors that will start soon.
        """
        waiting = [request for request in self._requests.values() if request.waiting]
        if not waiting:
            return None

        def priority(request: ScoringRequest) -> tuple[bool, int, float]:
            is_cheap = request.base_model == base_model or request.last_served < now - MODEL_SWITCH_SECONDS
            return not is_cheap, len(request.batches), request.last_served

        request = min(waiting, key=priority)
        share = max(1, math.ceil(num_actors / len(self._requests)) - len(request.batches))
        mine, *others = split_for_actors(request.waiting, num_actors=min(share, busy_actors(request.waiting)))
        remaining = {cell.id: cell for cell in mine}
        batch = Batch(number=next(self._numbers), request=request, remaining=remaining, started=now, last_answer=now)
        request.waiting = [cell for other in others for cell in other]
        request.last_served = now
        request.batches[batch.number] = batch
        return batch

    def record_answer(self, batch: Batch, cell_id: str, *, now: float) -> None:
        """Record one answer of a batch."""
        del batch.remaining[cell_id]
        batch.longest_answer = max(batch.longest_answer, now - batch.last_answer)
        batch.last_answer = now

    def end(self, batch: Batch, *, now: float) -> None:
        """Take a batch from its actor; unanswered cells wait again."""
        batch.request.batches.pop(batch.number, None)
        batch.request.last_served = now
        batch.request.waiting += batch.remaining.values()

    def choose_preemption(self, *, actor_is_idle: bool, now: float) -> Batch | None:
        """Return the batch that should stop after its current cell, if any.

        While an actor is idle and nothing waits, that is the largest batch, so that two actors share the rest. While no actor is
        idle, it is a batch of a request with several actors, or of one that had its turn, in favor of a request that has none.
        """
        requests = list(self._requests.values())
        batches = [batch for request in requests for batch in request.batches.values()]
        if any(batch.preempted for batch in batches):
            return None
        if actor_is_idle:
            largest = max(batches, key=lambda batch: len(batch.remaining), default=None)
            is_split = largest is not None and busy_actors([*largest.remaining.values()]) >= MIN_ACTORS_TO_SPLIT
            return largest if is_split and not any(request.waiting for request in requests) else None
        unserved = [request for request in requests if request.waiting and not request.batches]
        if not unserved:
            return None
        next_request = min(unserved, key=lambda request: request.last_served)
        several = [request for request in requests if len(request.batches) > 1 and request.base_model == next_request.base_model]
        if several:
            return max(max(several, key=lambda request: len(request.batches)).batches.values(), key=lambda batch: batch.started)
        long_enough = [batch for batch in batches if batch.may_be_preempted(by=next_request, now=now)]
        return min(long_enough, key=lambda batch: batch.started, default=None)

    def target_actors(self, *, bounds: tuple[int, int], num_up: int, resources_wanted: bool) -> int:
        """Return how many actors there should be: as many as the requests can use, within ``bounds`` (the fewest and the most).

        While other work waits for resources that actors hold (``resources_wanted``), the ``num_up`` started actors get no company.
        """
        fewest, most = bounds
        useful = sum(request.useful_actors for request in self._requests.values())
        if resources_wanted:
            return max(fewest, min(1, len(self._requests)), min(useful, num_up))
        return max(fewest, min(useful, most))


@dataclass(frozen=True, kw_only=True)
class ScoringStats:
    """Totals over answered cells."""

    cells: int = 0
    unscored_cells: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0

    def including(self, result: CellResult) -> ScoringStats:
        """Return the totals with one more result."""
        return ScoringStats(
            cells=self.cells + 1,
            unscored_cells=self.unscored_cells + (result.score is None),
            prefilled_tokens=self.prefilled_tokens + result.prefilled_tokens,
            decoded_tokens=self.decoded_tokens + result.decoded_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """A snapshot of a scoring pool."""

    pids: tuple[int, ...]
    """Processes of the actors that have started."""
    busy: int
    """The number of actors that are answering."""
    starting: int
    """The number of actors that are starting, or for which there are no resources."""
    requests: int
    """The number of calls that wait for answers."""
    stats: Mapping[Purpose, ScoringStats]
    """Totals by purpose since the pool's controller started."""
