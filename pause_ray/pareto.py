"""Which of several choices are worth their price: the Pareto front of a value and a cost. Pure numbers; knows no arm and no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Priced:
    """A choice: what it is worth and what it costs."""

    value: float
    """More is better."""
    cost: float
    """Less is better."""


def front(choices: Sequence[Priced]) -> list[int]:
    """Places of the choices that no other beats, cheapest first; equal ones are all on it."""
    beaten = {place for place, by in enumerate(beaten_by(choices)) if by is not None}
    on_it = [place for place in range(len(choices)) if place not in beaten]
    return sorted(on_it, key=lambda place: (choices[place].cost, choices[place].value, place))


def beaten_by(choices: Sequence[Priced]) -> list[int | None]:
    """For each choice the most valuable that is worth at least as much, costs at most as much, and is better in one; None on the front.

    Of equally valuable ones the cheapest, of equally cheap ones the first.
    """
    order = sorted(range(len(choices)), key=lambda place: (choices[place].cost, -choices[place].value, place))
    found: list[int | None] = [None] * len(choices)
    best: int | None = None
    for place in order:
        if best is not None and choices[place] != choices[best] and choices[best].value >= choices[place].value:
            found[place] = best
        elif best is None or choices[place].value > choices[best].value:
            best = place
    return found
