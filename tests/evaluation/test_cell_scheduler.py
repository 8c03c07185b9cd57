"""Every cell is answered once whatever happens to actors; no order waits while another has more than its share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.evaluation.cell_scheduler import BASE_TURN_SECONDS, TURN_SECONDS, Run, Turns, busy_actors, wanted_actors
from pause_ray.evaluation.suite import Cell, cells
from tests.evaluation.tiny import make_suite


def grid(seed: int = 0) -> list[Cell]:
    """Fifteen cells of three lengths, about four and a half of the longest prompts to compute."""
    return cells(make_suite(Path("texts"), depth_percent=[0, 25, 50, 75, 100]), identity=str(seed), replicate=0, seed=seed)


def one_context() -> list[Cell]:
    """Six questions about facts in the same context."""
    suite = make_suite(
        Path("texts"), task={"kind": "keyed"}, context_tokens=[4096], prompt={"system": None}, depth_percent=[0, 20, 40, 60, 80, 100]
    )
    return cells(suite, identity="", replicate=0, seed=0)


def turns_of(*orders: tuple[str, list[Cell], str], now: float = 0.0) -> Turns:
    turns = Turns()
    for place, (key, asked, base) in enumerate(orders):
        turns.enter(key, asked, base=base, now=now + place)
    return turns


def started(turns: Turns, *, actors: int, now: float, base: str = "one") -> Run:
    run = turns.next_run(base=base, actors=actors, now=now)
    assert run
    return run


def test_a_context_that_is_computed_once_keeps_one_actor_busy_and_a_grid_several() -> None:
    assert busy_actors([]) == 0
    assert busy_actors(grid()[:1]) == 1
    assert busy_actors(one_context()) == 1
    assert 4 <= busy_actors(grid()) < len(grid())


@given(seed=st.integers(0, 10_000), num_actors=st.integers(1, 5), num_orders=st.integers(1, 4))
def test_every_cell_is_answered_once_whatever_happens_to_actors(seed: int, num_actors: int, num_orders: int) -> None:
    draw, now = random.Random(seed), 0.0
    asked = {str(place): draw.sample(grid(place), draw.randint(1, 15)) for place in range(num_orders)}
    turns = turns_of(*((key, order, draw.choice(["one", "other"])) for key, order in asked.items()))
    answered: list[tuple[str, str]] = []
    actors: list[tuple[str | None, Run | None]] = [(None, None)] * num_actors
    for _ in range(2000):
        now += draw.random() * 30
        place = draw.randrange(num_actors)
        base, run = actors[place]
        if run is None:
            found = turns.next_run(base=base, actors=num_actors, now=now)
            actors[place] = (str(found.order.base), found) if found else (base, None)
            continue
        told = turns.worth_splitting() if any(its is None for _, its in actors) else turns.must_make_way(now=now)
        if told:
            told.making_way = True
        if run.owed and not (run.making_way and draw.random() < 0.5) and draw.random() < 0.9:
            cell_id = draw.choice(list(run.owed))
            turns.answered(run, cell_id, now=now)
            answered.append((run.order.key, cell_id))
        else:  # its end, or its loss
            turns.end(run, now=now)
            actors[place] = (base, None)
    assert sorted(answered) == sorted((key, cell.id) for key, order in asked.items() for cell in order)


def test_actors_divide_an_order_and_each_gets_about_as_much() -> None:
    turns = turns_of(("a", grid(), "one"))
    runs = [started(turns, actors=3, now=0.0) for _ in range(3)]
    assert sum(len(run.owed) for run in runs) == 15
    assert turns.next_run(base="one", actors=3, now=0.0) is None
    assert {busy_actors([*run.owed.values()]) for run in runs} <= {2, 3, 4}


def test_an_order_without_an_actor_comes_before_one_with_some() -> None:
    turns = turns_of(("a", grid(0), "one"), ("b", grid(1), "one"), now=0.0)
    assert [started(turns, actors=4, now=2.0).order.key for _ in range(4)] == ["a", "b", "a", "b"]


def test_a_new_order_gets_an_actor_of_one_that_has_several_after_the_running_cell() -> None:
    turns = turns_of(("a", grid(0), "one"))
    runs = [started(turns, actors=3, now=float(second)) for second in range(3)]
    assert turns.must_make_way(now=5.0) is None
    turns.enter("b", grid(1), base="one", now=5.0)
    youngest = turns.must_make_way(now=5.0)
    assert youngest is runs[2]
    youngest.making_way = True
    assert turns.must_make_way(now=5.0) is None, "one is enough"
    turns.end(youngest, now=6.0)
    assert started(turns, actors=3, now=6.0).order.key == "b"
    assert turns.must_make_way(now=1000.0) is None, "each has an actor"


def test_orders_take_turns_at_one_actor() -> None:
    turns = turns_of(("a", grid(0), "one"), ("b", grid(1), "one"), now=0.0)
    keys = []
    for now in range(1, 400, 100):
        run = started(turns, actors=1, now=now)
        assert turns.must_make_way(now=now + TURN_SECONDS - 1) is None
        assert turns.must_make_way(now=now + TURN_SECONDS) is run
        turns.end(run, now=now + TURN_SECONDS)
        keys.append(run.order.key)
    assert keys == ["a", "b", "a", "b"]


def test_a_turn_is_long_beside_what_changing_costs() -> None:
    turns = turns_of(("a", grid(0), "one"), ("b", grid(1), "one"), now=0.0)
    run = started(turns, actors=1, now=0.0)
    turns.answered(run, next(iter(run.owed)), now=20.0)
    assert turns.must_make_way(now=199.0) is None
    assert turns.must_make_way(now=201.0) is run


def test_base_weights_are_changed_rarely_but_not_never() -> None:
    turns = turns_of(("a", grid(0), "one"), ("b", grid(1), "other"), ("c", grid(2), "one"), now=0.0)
    run = started(turns, actors=1, now=3.0)
    turns.leave("c")
    assert turns.must_make_way(now=TURN_SECONDS * 2) is None
    turns.enter("c", grid(2), base="one", now=TURN_SECONDS * 2)
    assert turns.must_make_way(now=TURN_SECONDS * 2) is None, "the longest waiting is left out first, and needs other weights"
    over = 10 + BASE_TURN_SECONDS
    assert turns.must_make_way(now=over) is run
    turns.end(run, now=over)
    assert started(turns, actors=1, now=over).order.key == "b"
    assert started(turns, actors=1, now=over, base="one").order.key == "c"


def test_an_idle_actor_takes_a_part_of_what_another_owes_but_not_of_a_context_that_it_would_compute_anew() -> None:
    turns = turns_of(("a", grid(), "one"))
    alone = started(turns, actors=1, now=0.0)
    assert turns.worth_splitting() is alone
    turns.end(alone, now=1.0)
    halves = [started(turns, actors=2, now=1.0) for _ in range(2)]
    assert sum(len(run.owed) for run in halves) == 15
    turns = turns_of(("a", one_context(), "one"))
    started(turns, actors=4, now=0.0)
    assert turns.next_run(base="one", actors=4, now=0.0) is None
    assert turns.worth_splitting() is None


def test_what_an_order_leaves_behind_is_not_asked_again() -> None:
    turns = turns_of(("a", grid(0), "one"), ("b", grid(1), "one"))
    run = started(turns, actors=2, now=1.0)
    assert turns.leave("a") == [run]
    turns.end(run, now=1.0)
    assert {started(turns, actors=2, now=2.0).order.key for _ in range(2)} == {"b"}
    assert turns.leave("a") == []


@pytest.mark.parametrize(
    ("bounds", "number_up", "room_is_wanted", "wanted"),
    [
        ((3, 3), 0, False, 3),
        ((3, 3), 3, True, 3),
        ((0, 2), 0, False, 2),
        ((0, 99), 0, False, 5),
        ((0, 99), 4, True, 4),
        ((0, 99), 0, True, 1),
    ],
)
def test_there_are_as_many_actors_as_there_is_work_for(bounds: tuple[int, int], number_up: int, room_is_wanted: bool, wanted: int) -> None:
    turns = turns_of(("a", grid(), "one"))
    assert turns.useful_actors == busy_actors(grid()) == 5
    assert wanted_actors(turns, bounds=bounds, number_up=number_up, room_is_wanted=room_is_wanted) == wanted


def test_without_orders_only_those_that_stay_are_wanted() -> None:
    turns = turns_of(("a", grid(), "one"))
    turns.leave("a")
    for room_is_wanted in (False, True):
        assert wanted_actors(turns, bounds=(0, 9), number_up=5, room_is_wanted=room_is_wanted) == 0
        assert wanted_actors(turns, bounds=(2, 9), number_up=5, room_is_wanted=room_is_wanted) == 2


def test_an_order_that_is_nearly_answered_keeps_few_actors() -> None:
    turns = turns_of(("a", grid(), "one"))
    run = started(turns, actors=1, now=0.0)
    for cell_id in list(run.owed)[:-1]:
        turns.answered(run, cell_id, now=1.0)
    assert turns.useful_actors == 1
