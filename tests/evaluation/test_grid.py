"""Where answers stand on a grid: nothing is lost, moved or counted twice on the way from a ledger to a heatmap."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from pause_ray.evaluation.compare import summarize
from pause_ray.evaluation.grid import (
    NUM_BINS,
    DepthAxis,
    GridCell,
    by_fact,
    depth_axis,
    depth_profile,
    difference_grid,
    length_profile,
    score_grid,
)
from pause_ray.evaluation.suite import SuiteSpec, cells
from tests.stored_sweep import cell, grid, rows, several_facts

PERCENT, BINS = DepthAxis("percent"), DepthAxis("bins")
LENGTHS = (1000, 2048, 4096)


def scattered(trial: str, *, replicates: int = 3, samples: int = 4) -> list:
    """Random scores of random questions, the same questions for every trial; one in eight is not scored."""
    draw, asked = random.Random(trial), random.Random("questions")
    found = []
    for length, replicate, sample in itertools.product(LENGTHS, range(replicates), range(samples)):
        depth = round(100 * asked.random(), 1)
        score = draw.choice([None, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0])
        landed = int(length * depth / 100) + draw.randrange(60)
        prompt = length + 60 + draw.randrange(200)
        found.append(cell(length, depth, score, trial=trial, replicate=replicate, sample=sample, needle_token=landed, prompt_tokens=prompt))
    return found


def test_fields_keep_unscored_apart_and_show_the_spread() -> None:
    first = rows({(1024, 10): 1.0, (1024, 50): None, (2048, 10): None}, replicate=0)
    second = rows({(1024, 10): 0.5, (1024, 50): 0.5, (2048, 10): None}, replicate=1)
    fields = score_grid([*first, *second], axis=PERCENT)
    assert fields[1024, 10] == GridCell(0.75, 0.5, 1.0, num_scored=2, num_unscored=0, uncertain=True)
    assert fields[1024, 50] == GridCell(0.5, 0.5, 0.5, num_scored=1, num_unscored=1, uncertain=False)
    assert (fields[2048, 10].value, fields[2048, 10].num_unscored) == (None, 2)


def test_differences_pair_replicate_by_replicate_and_sample_by_sample() -> None:
    a = [cell(1024, 10, 1.0, replicate=0), cell(1024, 10, 0.0, replicate=1), cell(1024, 10, 1.0, replicate=2)]
    b = [cell(1024, 10, 0.0, replicate=0), cell(1024, 10, 1.0, replicate=1)]
    field = difference_grid(a, b, axis=PERCENT)[1024, 10]
    assert (field.value, field.low, field.high, field.num_scored) == (0.0, -1.0, 1.0, 2)
    a = [cell(1024, 10, 1.0, sample=0), cell(1024, 10, 0.0, sample=1)]
    b = [cell(1024, 10, 0.0, sample=1), cell(1024, 10, 1.0, sample=0)]
    assert difference_grid(a, b, axis=PERCENT)[1024, 10].low == 0.0


@pytest.mark.parametrize("axis", [PERCENT, BINS, DepthAxis("lattice", 512)], ids=lambda axis: axis.kind)
def test_swapping_the_arms_turns_every_difference_around(axis: DepthAxis) -> None:
    a, b = scattered("a"), scattered("b")
    there, back = difference_grid(a, b, axis=axis), difference_grid(b, a, axis=axis)
    assert there.keys() == back.keys()
    for place, field in there.items():
        turned = back[place]
        assert (field.value is None) == (turned.value is None)
        assert field.value is None or field.value == pytest.approx(-turned.value)
        assert (field.low, field.high, field.uncertain) == (-turned.high, -turned.low, turned.uncertain)
    assert sum(field.num_scored for field in there.values()) > 10


@pytest.mark.parametrize("axis", [PERCENT, BINS, DepthAxis("lattice", 512)], ids=lambda axis: axis.kind)
def test_every_answer_is_in_one_field_and_fields_give_the_ledgers_mean(axis: DepthAxis) -> None:
    found = scattered("a")
    fields = score_grid(found, axis=axis).values()
    scores = [row.score for row in found if row.score is not None]
    assert sum(field.num_scored for field in fields) == len(scores)
    assert sum(field.num_unscored for field in fields) == len(found) - len(scores)
    assert sum(field.value * field.num_scored for field in fields if field.value is not None) == pytest.approx(sum(scores))


def suite(**changes: object) -> SuiteSpec:
    needles = {"needles": [{"needle": "The key is under the mat.", "question": "Where is it?", "keywords": ["mat"]}]}
    given = {"name": "s", "task": {"kind": "single", "needles": needles}, "noise": "Grass is green.", "context_tokens": [700, 1536, 4096]}
    return SuiteSpec.parse(given | changes, origin="test")


@pytest.mark.parametrize("lattice", [100, 333, 512])
def test_a_lattices_fields_are_the_positions_that_were_asked(lattice: int) -> None:
    """A ledger has only the percentages, rounded; the tokens come back from them exactly, and no two cells share a field."""
    asked = cells(suite(lattice_tokens=lattice), identity="i", replicate=0, seed=0)
    axis = depth_axis([{"lattice_tokens": lattice}])
    found = [cell(its.context_tokens, its.depth_percent, 1.0) for its in asked]
    for its, row in zip(asked, found, strict=True):
        position, end = axis.position(row), its.facts[0].position_tokens is None
        assert position == its.facts[0].position_tokens or (end and its.context_tokens <= position < its.context_tokens + lattice)
    assert len(score_grid(found, axis=axis)) == len(asked)


def test_bins_follow_where_facts_landed() -> None:
    row = cell(1000, 5.0, 1.0, needle_token=950, prompt_tokens=1000)
    assert list(score_grid([row], axis=BINS)) == [(1000, 90.0)]
    at_the_end = cell(1000, 5.0, 1.0, needle_token=1000, prompt_tokens=1000)
    assert list(score_grid([at_the_end], axis=BINS)) == [(1000, 90.0)]
    unknown = cell(1000, 35.0, 1.0, needle_token=-1)
    assert list(score_grid([unknown], axis=BINS)) == [(1000, 30.0)]
    edges = [cell(1000, 0.0, 1.0, needle_token=100 * number, prompt_tokens=1000) for number in range(NUM_BINS)]
    assert Counter(score_grid([row], axis=BINS).popitem()[0][1] for row in edges) == Counter(10.0 * number for number in range(NUM_BINS))


def test_each_of_several_facts_stands_at_its_own_place() -> None:
    row = several_facts(1000, [(5.0, 1.0), (55.0, 0.0), (95.0, 0.5)])
    assert {place[1]: field.value for place, field in score_grid([row], axis=BINS).items()} == {0.0: 1.0, 50.0: 0.0, 90.0: 0.5}
    lost = several_facts(1000, [(5.0, None), (55.0, None)])
    assert [(field.value, field.num_unscored) for field in score_grid([lost], axis=BINS).values()] == [(None, 1), (None, 1)]
    assert by_fact(row, axis=PERCENT) == [row]


def test_distractors_have_no_place() -> None:
    row = several_facts(1000, [(5.0, 1.0), (55.0, 0.0)])
    asked, other = row.facts
    mixed = several_facts(1000, [(5.0, 1.0)], facts=(asked, type(other)(**{**other.__dict__, "references": (), "score": None})))
    assert list(score_grid([mixed], axis=BINS)) == [(1000, 0.0)]


def test_suites_on_different_grids_meet_in_bins() -> None:
    assert depth_axis([{"samples": 3}, {"samples": 5}]) == BINS
    assert depth_axis([{"depth_percent": [0]}, {"lattice_tokens": 64}]) == BINS
    assert depth_axis([{"lattice_tokens": 64}, {"lattice_tokens": 64}]) == DepthAxis("lattice", 64)
    assert depth_axis([]) == PERCENT


def test_only_disagreeing_answers_are_marked_and_many_of_them_not() -> None:
    def field(*scores: float) -> GridCell:
        found = [cell(1000, 50, score, replicate=number) for number, score in enumerate(scores)]
        return score_grid(found, axis=PERCENT)[1000, 50]

    assert not field(1.0).uncertain
    assert not field(1.0, 1.0, 1.0).uncertain
    assert field(1.0, 0.0).uncertain
    assert not field(*[1.0, 0.0] * 40).uncertain


def test_profiles_are_the_summarys_means() -> None:
    found = rows(grid(LENGTHS, (0.0, 30.0, 100.0), lambda length, depth: None if length + depth == 1030 else (length + depth) % 7 / 7))
    summary = summarize(found)
    assert {length: point.value for length, point in length_profile(found).items()} == summary.mean_by_length
    assert {depth: point.value for depth, point in depth_profile(found, axis=PERCENT, in_tenths=False).items()} == summary.mean_by_depth
    tenths = depth_profile(found, axis=PERCENT, in_tenths=True)
    assert list(tenths) == [5.0, 35.0, 95.0]
    for point in tenths.values():
        assert point.interval is not None
        assert point.interval.low <= point.value <= point.interval.high
