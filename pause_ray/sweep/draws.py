"""Points of a search space: all of them, some at random, its corners. Pure; what makes a point valid is the caller's to say.

Random points are drawn here and not by a library, so that a sweep's trials can be listed without starting anything and stay the
same whatever is installed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping

from pause_ray.errors import SpecError
from pause_ray.spec import JsonObject, digest
from pause_ray.sweep.space import Domain

MOST_DRAWS = 1000
"""In a row without a new valid point; then there is taken to be none."""
MOST_COUNTED = 1000
"""Points of a finite space that are tried one by one to know how many are valid."""
MOST_CORNERS = 64
Search = Mapping[str, Domain]
Allows = Callable[[JsonObject], bool]


def every_point(search: Search) -> Iterator[JsonObject]:
    """Every combination of the values of domains that all list them; the last path varies fastest."""
    lists = [listed for domain in search.values() if (listed := domain.listed()) is not None]
    return (dict(zip(search, values, strict=True)) for values in itertools.product(*lists))


def grid_points(search: Search, allows: Allows, *, origin: str) -> list[JsonObject]:
    """Every valid point.

    Raises:
        SpecError: there is none.
    """
    points = [point for point in every_point(search) if allows(point)]
    if not points:
        raise no_valid_point(origin)
    return points


def drawn_points(search: Search, allows: Allows, *, points: int, seed: int, origin: str) -> list[JsonObject]:
    """So many different valid points, drawn at random.

    Raises:
        SpecError: the space has fewer.
    """
    check_enough(search, allows, points=points, origin=origin)
    source = random.Random(digest(["points of a search", seed]))  # noqa: S311 (drawn points must be the same everywhere)
    found: dict[str, JsonObject] = {}
    draws_in_vain = 0
    while len(found) < points:
        point = {path: domain.draw(source) for path, domain in search.items()}
        key = digest(point)
        if key not in found and allows(point):
            found[key] = point
            draws_in_vain = 0
            continue
        draws_in_vain += 1
        if draws_in_vain == MOST_DRAWS:
            raise too_few(len(found), wanted=points, origin=origin) if found else no_valid_point(origin)
    return list(found.values())


def check_enough(search: Search, allows: Allows, *, points: int, origin: str) -> None:
    """Refuse more points than a small finite space has.

    Raises:
        SpecError: it has fewer, or none.
    """
    size = size_of(search)
    if size is None or size > MOST_COUNTED:
        return
    valid = sum(map(allows, every_point(search)))
    if not valid:
        raise no_valid_point(origin)
    if valid < points:
        raise too_few(valid, wanted=points, origin=origin)


def size_of(search: Search) -> int | None:
    """Points of the space, valid or not; None where there is no end of them."""
    sizes = [domain.size for domain in search.values()]
    return math.prod(size for size in sizes if size is not None) if None not in sizes else None


def corners(search: Search) -> list[JsonObject]:
    """Points at the outermost values: all of their combinations, or where these are many, those with one path at its other end."""
    ends = {path: domain.ends() for path, domain in search.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        return [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    low, high = ({path: its[place] for path, its in ends.items()} for place in (0, -1))
    return [low, *(low | {path: high[path]} for path in ends), *(high | {path: low[path]} for path in ends), high]


def no_valid_point(origin: str) -> SpecError:
    """The error of a space that is empty."""
    return SpecError(f"{origin}: search: no point keeps the constraints; widen a domain or change a constraint")


def too_few(valid: int, *, wanted: int, origin: str) -> SpecError:
    """The error of a space that is too small."""
    return SpecError(
        f"{origin}: algorithm.points {wanted}: the search has {valid} valid points; lower points, or list values and use algorithm grid"
    )
