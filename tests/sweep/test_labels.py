"""Labels are short, and no two conditions share one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.spec import digest
from pause_ray.sweep.spec import condition_labels


def labels(points: list[dict[str, Any]], *, arm: str = "arm") -> list[str]:
    return list(condition_labels([{"digest": str(place), "arm": arm, "point": point} for place, point in enumerate(points)]).values())


def test_a_path_is_its_last_part_where_that_is_enough() -> None:
    assert labels([{"train.lora.rank": 4, "pauses.every": 2}]) == ["arm rank=4 every=2"]
    assert labels([{"train.seed": 1}, {"corpus.seed": 2}]) == ["arm train.seed=1", "arm corpus.seed=2"]


def test_a_number_has_as_many_digits_as_tell_it_apart() -> None:
    assert labels([{"train.learning_rate": 0.000318427591}]) == ["arm learning_rate=0.000318428"]
    close = labels([{"train.learning_rate": 0.3000000001}, {"train.learning_rate": 0.3000000002}])
    assert len(set(close)) == 2


def test_a_long_value_is_cut() -> None:
    [label] = labels([{"pauses.marker": "pause " * 40}])
    assert len(label) < 70


@given(
    st.lists(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.booleans(), st.none()), max_size=8)
)
def test_no_two_values_have_one_label(values: list[Any]) -> None:
    different = list({digest([value]): value for value in values}.values())
    assert len(set(labels([{"a.b": value} for value in different]))) == len(different)
