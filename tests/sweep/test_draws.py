"""Points of a space: complete where they are listed, different and reproducible where they are drawn."""

from __future__ import annotations

import math

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.sweep.search_space import (
    ChoiceDomain,
    GridDomain,
    IntDomain,
    UniformDomain,
    corners,
    drawn_points,
    grid_points,
)

LISTED = {"a": GridDomain(grid=(1, 2, 3)), "b": ChoiceDomain(choice=("x", "y"))}
OPEN = {"a": UniformDomain(uniform=(0.0, 1.0)), "b": IntDomain(int=(1, 10))}


def everything(point: JsonObject) -> bool:
    return True


def test_a_grid_has_every_combination_in_order() -> None:
    points = grid_points(LISTED, everything, origin="test")
    assert [(point["a"], point["b"]) for point in points] == [(a, b) for a in (1, 2, 3) for b in "xy"]


def test_only_valid_points_are_left() -> None:
    assert all(point["a"] != 2 for point in grid_points(LISTED, lambda point: point["a"] != 2, origin="test"))
    assert all(point["a"] > 0.9 for point in drawn_points(OPEN, lambda point: point["a"] > 0.9, points=9, seed=0, origin="test"))


def test_drawn_points_differ_and_are_the_same_each_time() -> None:
    points = drawn_points(LISTED, everything, points=6, seed=0, origin="test")
    assert {digest(point) for point in points} == {digest(point) for point in grid_points(LISTED, everything, origin="test")}
    assert drawn_points(LISTED, everything, points=6, seed=0, origin="test") == points
    assert drawn_points(OPEN, everything, points=6, seed=0, origin="test") != drawn_points(
        OPEN, everything, points=6, seed=1, origin="test"
    )


def test_more_points_begin_with_the_same_ones() -> None:
    few, many = (drawn_points(OPEN, everything, points=points, seed=3, origin="test") for points in (4, 9))
    assert many[:4] == few


@pytest.mark.parametrize(
    ("search", "points", "told"),
    [(LISTED, 7, r"algorithm\.points 7: the search has 6 valid points"), (OPEN, 3, r"algorithm\.points 3: the search has 1 valid points")],
)
def test_more_points_than_there_are_is_refused(search: dict[str, GridDomain], points: int, told: str) -> None:
    seen: list[JsonObject] = []

    def one_of_the_open_space(point: JsonObject) -> bool:
        seen.append(point)
        return search is LISTED or len(seen) == 1

    with pytest.raises(SpecError, match=told):
        drawn_points(search, one_of_the_open_space, points=points, seed=0, origin="test")


@pytest.mark.parametrize("search", [LISTED, OPEN])
def test_a_space_without_a_valid_point_is_refused(search: dict[str, GridDomain]) -> None:
    with pytest.raises(SpecError, match="no point keeps the constraints"):
        drawn_points(search, lambda point: False, points=1, seed=0, origin="test")
    with pytest.raises(SpecError, match="no point keeps the constraints"):
        grid_points(LISTED, lambda point: False, origin="test")


def test_corners_are_the_combinations_of_ends_or_of_many_those_one_step_away() -> None:
    assert len(corners(OPEN)) == 4
    assert {(point["a"], point["b"]) for point in corners(OPEN)} == {(0.0, 1), (0.0, 10), (1.0, 1), (1.0, 10)}
    many = {str(number): IntDomain(int=(0, 1)) for number in range(10)}
    found = [tuple(point.values()) for point in corners(many)]
    assert len(found) == 22 < 2**10
    assert {sum(point) for point in found} == {0, 1, 9, 10}
    assert math.prod(len(domain.ends()) for domain in many.values()) == 2**10
