"""Which points of the search are run next: asked for round by round, told what came of them. Knows neither trials nor who runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pause_ray.errors import SpecError
from pause_ray.spec import JsonObject
from pause_ray.sweep.log import SearchLog
from pause_ray.sweep.spec import SweepSpec, known_points


class Search(Protocol):
    """Chooses points of a sweep's search."""

    def ask(self) -> list[JsonObject] | None:
        """The points to run next, whose values it must be told before it is asked again; None at the end.

        Raises:
            SpecError: no valid point is left to ask for.
        """

    def tell(self, point: JsonObject, value: float | None) -> None:
        """The objective's value at a point that was asked for, or None where there is none as its trial failed."""


class KnownSearch:
    """All points in one round."""

    def __init__(self, points: Sequence[JsonObject]) -> None:
        """Take the points in their order."""
        self._points: list[JsonObject] | None = list(points)

    def ask(self) -> list[JsonObject] | None:
        """All points, then None."""
        points, self._points = self._points, None
        return points

    def tell(self, point: JsonObject, value: float | None) -> None:
        """Nothing is learned from it."""


def start_search(sweep: SweepSpec, *, log: SearchLog) -> Search:
    """The search of a sweep from its beginning; what ``log`` says was asked before is asked again, in the same rounds.

    Grid and random points need no log. With algorithm tpe, Ray Tune and Optuna are imported.

    Raises:
        SpecError: no point keeps the constraints.
        StorageError: a damaged log.
    """
    points = known_points(sweep)
    if points is not None:
        return KnownSearch(points)
    if sweep.algorithm.kind != "tpe":
        raise SpecError(f"sweep {sweep.name}: algorithm {sweep.algorithm.kind} knows no points and learns none")
    from pause_ray.sweep.tpe import TpeSearch

    return TpeSearch(sweep, sweep.algorithm, log=log)
