"""Every cell is answered once whatever happens to actors; no request waits while another has more than its share of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.evaluation.cell_scheduler import MIN_BATCH_SECONDS, MODEL_SWITCH_SECONDS, Batch, CellScheduler, ScoringStats, busy_actors
from pause_ray.evaluation.suite import Cell, cells
from tests.evaluation.tiny import make_suite
from tests.stored_sweep import cell


def grid(seed: int = 0) -> list[Cell]:
    """Fifteen cells of three lengths, about four and a half of the longest prompts to compute."""
    return cells(make_suite(Path("texts"), depth_percent=[0, 25, 50, 75, 100]), identity=str(seed), replicate=0, seed=seed)


def one_context() -> list[Cell]:
    """Six questions about facts in the same context."""
    suite = make_suite(
        Path("texts"), task={"kind": "multi_key"}, context_tokens=[4096], prompt={"system": None}, depth_percent=[0, 20, 40, 60, 80, 100]
    )
    return cells(suite, identity="", replicate=0, seed=0)


def scheduler_of(*requests: tuple[str, list[Cell], str], now: float = 0.0) -> CellScheduler:
    scheduler = CellScheduler()
    for place, (key, request, model) in enumerate(requests):
        scheduler.submit(key, request, base_model=model, now=now + place)
    return scheduler


def assigned(scheduler: CellScheduler, *, actors: int, now: float, model: str = "one") -> Batch:
    batch = scheduler.assign(base_model=model, num_actors=actors, now=now)
    assert batch
    return batch


def preemption(scheduler: CellScheduler, *, now: float) -> Batch | None:
    return scheduler.choose_preemption(actor_is_idle=False, now=now)


def split(scheduler: CellScheduler) -> Batch | None:
    return scheduler.choose_preemption(actor_is_idle=True, now=0.0)


def test_a_context_that_is_computed_once_keeps_one_actor_busy_and_a_grid_several() -> None:
    assert busy_actors([]) == 0
    assert busy_actors(grid()[:1]) == 1
    assert busy_actors(one_context()) == 1
    assert 4 <= busy_actors(grid()) < len(grid())


@given(seed=st.integers(0, 10_000), num_actors=st.integers(1, 5), num_requests=st.integers(1, 4))
def test_every_cell_is_answered_once_whatever_happens_to_actors(seed: int, num_actors: int, num_requests: int) -> None:
    draw, now = random.Random(seed), 0.0
    asked = {str(place): draw.sample(grid(place), draw.randint(1, 15)) for place in range(num_requests)}
    scheduler = scheduler_of(*((key, request, draw.choice(["one", "other"])) for key, request in asked.items()))
    answered: list[tuple[str, str]] = []
    actors: list[tuple[str | None, Batch | None]] = [(None, None)] * num_actors
    for _ in range(2000):
        now += draw.random() * 30
        place = draw.randrange(num_actors)
        base, batch = actors[place]
        if batch is None:
            found = scheduler.assign(base_model=base, num_actors=num_actors, now=now)
            actors[place] = (str(found.request.base_model), found) if found else (base, None)
            continue
        told = split(scheduler) if any(its is None for _, its in actors) else preemption(scheduler, now=now)
        if told:
            told.preempted = True
        if batch.remaining and not (batch.preempted and draw.random() < 0.5) and draw.random() < 0.9:
            cell_id = draw.choice(list(batch.remaining))
            scheduler.record_answer(batch, cell_id, now=now)
            answered.append((batch.request.key, cell_id))
        else:  # its end, or its loss
            scheduler.end(batch, now=now)
            actors[place] = (base, None)
    assert sorted(answered) == sorted((key, cell.id) for key, request in asked.items() for cell in request)


def test_actors_divide_a_request_and_each_gets_about_as_much() -> None:
    scheduler = scheduler_of(("a", grid(), "one"))
    batches = [assigned(scheduler, actors=3, now=0.0) for _ in range(3)]
    assert sum(len(batch.remaining) for batch in batches) == 15
    assert scheduler.assign(base_model="one", num_actors=3, now=0.0) is None
    assert {busy_actors([*batch.remaining.values()]) for batch in batches} <= {2, 3, 4}


def test_a_request_without_an_actor_comes_before_one_with_some() -> None:
    scheduler = scheduler_of(("a", grid(0), "one"), ("b", grid(1), "one"), now=0.0)
    assert [assigned(scheduler, actors=4, now=2.0).request.key for _ in range(4)] == ["a", "b", "a", "b"]


def test_a_new_request_gets_an_actor_of_one_that_has_several_after_the_running_cell() -> None:
    scheduler = scheduler_of(("a", grid(0), "one"))
    batches = [assigned(scheduler, actors=3, now=float(second)) for second in range(3)]
    assert preemption(scheduler, now=5.0) is None
    scheduler.submit("b", grid(1), base_model="one", now=5.0)
    youngest = preemption(scheduler, now=5.0)
    assert youngest is batches[2]
    youngest.preempted = True
    assert preemption(scheduler, now=5.0) is None, "one is enough"
    scheduler.end(youngest, now=6.0)
    assert assigned(scheduler, actors=3, now=6.0).request.key == "b"
    assert preemption(scheduler, now=1000.0) is None, "each has an actor"


def test_requests_take_turns_at_one_actor() -> None:
    scheduler = scheduler_of(("a", grid(0), "one"), ("b", grid(1), "one"), now=0.0)
    keys = []
    for now in range(1, 400, 100):
        batch = assigned(scheduler, actors=1, now=now)
        assert preemption(scheduler, now=now + MIN_BATCH_SECONDS - 1) is None
        assert preemption(scheduler, now=now + MIN_BATCH_SECONDS) is batch
        scheduler.end(batch, now=now + MIN_BATCH_SECONDS)
        keys.append(batch.request.key)
    assert keys == ["a", "b", "a", "b"]


def test_a_turn_is_long_beside_what_changing_costs() -> None:
    scheduler = scheduler_of(("a", grid(0), "one"), ("b", grid(1), "one"), now=0.0)
    batch = assigned(scheduler, actors=1, now=0.0)
    scheduler.record_answer(batch, next(iter(batch.remaining)), now=20.0)
    assert preemption(scheduler, now=199.0) is None
    assert preemption(scheduler, now=201.0) is batch


def test_base_weights_are_changed_rarely_but_not_never() -> None:
    scheduler = scheduler_of(("a", grid(0), "one"), ("b", grid(1), "other"), ("c", grid(2), "one"), now=0.0)
    batch = assigned(scheduler, actors=1, now=3.0)
    scheduler.withdraw("c")
    assert preemption(scheduler, now=MIN_BATCH_SECONDS * 2) is None
    scheduler.submit("c", grid(2), base_model="one", now=MIN_BATCH_SECONDS * 2)
    assert preemption(scheduler, now=MIN_BATCH_SECONDS * 2) is None, "the longest waiting is left out first, and needs other weights"
    over = 10 + MODEL_SWITCH_SECONDS
    assert preemption(scheduler, now=over) is batch
    scheduler.end(batch, now=over)
    assert assigned(scheduler, actors=1, now=over).request.key == "b"
    assert assigned(scheduler, actors=1, now=over, model="one").request.key == "c"


def test_an_idle_actor_takes_a_part_of_what_another_owes_but_not_of_a_context_that_it_would_compute_anew() -> None:
    scheduler = scheduler_of(("a", grid(), "one"))
    alone = assigned(scheduler, actors=1, now=0.0)
    assert split(scheduler) is alone
    scheduler.end(alone, now=1.0)
    halves = [assigned(scheduler, actors=2, now=1.0) for _ in range(2)]
    assert sum(len(batch.remaining) for batch in halves) == 15
    scheduler = scheduler_of(("a", one_context(), "one"))
    assigned(scheduler, actors=4, now=0.0)
    assert scheduler.assign(base_model="one", num_actors=4, now=0.0) is None
    assert split(scheduler) is None


def test_what_a_withdrawn_request_leaves_behind_is_not_asked_again() -> None:
    scheduler = scheduler_of(("a", grid(0), "one"), ("b", grid(1), "one"))
    batch = assigned(scheduler, actors=2, now=1.0)
    assert scheduler.withdraw("a") == [batch]
    scheduler.end(batch, now=1.0)
    assert {assigned(scheduler, actors=2, now=2.0).request.key for _ in range(2)} == {"b"}
    assert scheduler.withdraw("a") == []


@pytest.mark.parametrize(
    ("bounds", "num_up", "resources_wanted", "wanted"),
    [
        ((3, 3), 0, False, 3),
        ((3, 3), 3, True, 3),
        ((0, 2), 0, False, 2),
        ((0, 99), 0, False, 5),
        ((0, 99), 4, True, 4),
        ((0, 99), 0, True, 1),
    ],
)
def test_there_are_as_many_actors_as_there_is_work_for(bounds: tuple[int, int], num_up: int, resources_wanted: bool, wanted: int) -> None:
    scheduler = scheduler_of(("a", grid(), "one"))
    assert busy_actors(grid()) == 5
    assert scheduler.target_actors(bounds=bounds, num_up=num_up, resources_wanted=resources_wanted) == wanted


def test_without_requests_only_those_that_stay_are_wanted() -> None:
    scheduler = scheduler_of(("a", grid(), "one"))
    scheduler.withdraw("a")
    for resources_wanted in (False, True):
        assert scheduler.target_actors(bounds=(0, 9), num_up=5, resources_wanted=resources_wanted) == 0
        assert scheduler.target_actors(bounds=(2, 9), num_up=5, resources_wanted=resources_wanted) == 2


def test_a_request_that_is_nearly_answered_keeps_few_actors() -> None:
    scheduler = scheduler_of(("a", grid(), "one"))
    batch = assigned(scheduler, actors=1, now=0.0)
    for cell_id in list(batch.remaining)[:-1]:
        scheduler.record_answer(batch, cell_id, now=1.0)
    assert scheduler.target_actors(bounds=(0, 9), num_up=0, resources_wanted=False) == 1


def test_answers_are_counted() -> None:
    one = ScoringStats().including(cell(1024, 50.0, 1.0))
    assert one == ScoringStats(cells=1, unscored_cells=0, prefilled_tokens=1024, decoded_tokens=12)
    two = one.including(cell(2048, 50.0, None, prefilled_tokens=0, decoded_tokens=0))
    assert two == ScoringStats(cells=2, unscored_cells=1, prefilled_tokens=1024, decoded_tokens=12)
