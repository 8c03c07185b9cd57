"""The front of value and cost: nothing on it is beaten, everything else is, by one on it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pause_ray.pareto import Priced, beaten_by, front

CHOICES = st.lists(st.builds(Priced, st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=12)


def beats(one: Priced, other: Priced) -> bool:
    return one.value >= other.value and one.cost <= other.cost and one != other


@given(CHOICES)
def test_the_front_is_what_no_other_beats(choices: list[Priced]) -> None:
    expected = {place for place, its in enumerate(choices) if not any(beats(other, its) for other in choices)}
    assert set(front(choices)) == expected
    assert [choices[place].cost for place in front(choices)] == sorted(choices[place].cost for place in expected)


@given(CHOICES)
def test_what_is_not_on_the_front_is_beaten_by_the_most_valuable_that_can(choices: list[Priced]) -> None:
    on_it = set(front(choices))
    for place, by in enumerate(beaten_by(choices)):
        assert (by is None) == (place in on_it)
        if by is not None:
            assert by in on_it
            assert beats(choices[by], choices[place])
            assert choices[by].value == max(other.value for other in choices if beats(other, choices[place]))


def test_equal_choices_are_on_the_front_together() -> None:
    assert front([Priced(0.5, 1.0), Priced(0.5, 1.0), Priced(0.4, 1.0)]) == [0, 1]
    assert beaten_by([Priced(0.5, 1.0), Priced(0.5, 2.0)]) == [None, 0]
