"""Every cell is answered once, in an order that reuses what the last prompt computed, and failures are not zeros."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.engines.engine import Completion
from pause_ray.engines.scripted import UNKNOWN, ScriptedEngine
from pause_ray.errors import ModelError, TextError
from pause_ray.needle.haystack import load_haystack
from pause_ray.needle.ledger import CellResult
from pause_ray.needle.task import Cell, SuiteSpec, cells
from pause_ray.needle.walk import Condition, answer_cells, new_tokens, order_for_reuse, split_for_actors
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokens import ModelTokenizer, resolve_marker
from tests.needle.tiny import STOCK, base, make_suite

CONDITION = Condition(arm="baseline", model="tiny", adapter=None, pauses="none")
FACTS = {STOCK.question: STOCK.needle}


def grid(lengths: list[int], depths: list[float]) -> list[Cell]:
    return [
        Cell(task="t", context_tokens=length, depth_percent=depth, replicate=0, seed=0, needle=STOCK, identity="")
        for length in lengths
        for depth in depths
    ]


def answers(suite: SuiteSpec, model_dir: Path, engine: ScriptedEngine, *, policy: PausePolicy | None = None) -> list[CellResult]:
    tokenizer = ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, policy)
    engine.use(base(model_dir))
    asked = cells(suite, identity="i", replicate=0, seed=0)
    haystack = load_haystack(suite, cache=model_dir, seed=0, replicate=0)
    return list(
        answer_cells(
            asked,
            engine=engine,
            suite=suite,
            haystack=haystack,
            tokenizer=tokenizer,
            policy=policy,
            marker=marker,
            condition=CONDITION,
        )
    )


grids = st.builds(
    grid,
    st.lists(st.integers(100, 9000), min_size=1, max_size=5, unique=True),
    st.lists(st.floats(0, 100), min_size=1, max_size=5, unique=True),
)


@given(asked=grids, seed=st.integers(0, 9))
def test_the_order_is_that_of_the_cells_not_of_the_list(asked: list[Cell], seed: int) -> None:
    shuffled = random.Random(seed).sample(asked, len(asked))
    assert order_for_reuse(shuffled) == order_for_reuse(asked)
    assert sorted(order_for_reuse(asked), key=lambda cell: cell.id) == sorted(asked, key=lambda cell: cell.id)


@given(asked=grids, num_actors=st.integers(1, 6))
def test_the_runs_of_the_actors_are_the_order_cut_into_pieces(asked: list[Cell], num_actors: int) -> None:
    runs = split_for_actors(asked, num_actors=num_actors)
    assert [cell for run in runs for cell in run] == order_for_reuse(asked)
    assert len(runs) <= num_actors
    assert all(runs)


def test_two_actors_share_the_work_about_evenly() -> None:
    runs = split_for_actors(grid([1000 * step for step in range(1, 17)], [float(step) for step in range(0, 101, 10)]), num_actors=2)
    work = [sum(new_tokens(run)) for run in runs]
    assert max(work) < 1.25 * min(work)


@pytest.mark.parametrize(
    ("depths", "policy", "least_gain"),
    [
        ([0, 50, 100], None, 1.5),
        ([0, 50, 100], PausePolicy(), 1.5),
        ([0, 50, 100], PausePolicy(placement="random", rate=5.0), 1.5),
        ([10, 50, 90], None, 1.35),
    ],
)
def test_reuse_saves_prefill_and_the_estimate_is_about_right(
    tokenizer_dir: Path, essays_dir: Path, depths: list[float], least_gain: float, policy: PausePolicy | None
) -> None:
    suite = make_suite(essays_dir, depth_percent=depths)
    rows = answers(suite, tokenizer_dir, ScriptedEngine(facts=FACTS), policy=policy)
    prompts, prefilled = sum(row.prompt_tokens for row in rows), sum(row.prefilled_tokens for row in rows)
    assert prompts / prefilled >= least_gain
    if policy is None:
        estimate = sum(new_tokens(order_for_reuse(cells(suite, identity="i", replicate=0, seed=0))))
        assert estimate == pytest.approx(prefilled, rel=0.15)


def test_each_cell_is_answered_once_and_its_row_says_what_was_asked(tokenizer_dir: Path, essays_dir: Path) -> None:
    suite = make_suite(essays_dir)
    rows = answers(suite, tokenizer_dir, ScriptedEngine(facts=FACTS))
    asked = {cell.id: cell for cell in cells(suite, identity="i", replicate=0, seed=0)}
    assert {row.cell_id for row in rows} == asked.keys()
    assert len(rows) == len(asked) == 9
    for row in rows:
        cell = asked[row.cell_id]
        assert (row.context_tokens, row.depth_percent) == (cell.context_tokens, cell.depth_percent)
        assert row.prompt_tokens == cell.context_tokens
        assert row.rule == "blank_line"
        assert row.needle_token == pytest.approx(cell.depth_percent / 100 * cell.context_tokens, abs=150)
        assert (row.score, row.rubric, row.response, row.engine) == (1.0, 10, STOCK.needle, "scripted")


def test_a_fact_that_the_engine_misses_scores_zero(tokenizer_dir: Path, essays_dir: Path) -> None:
    engine = ScriptedEngine(facts=FACTS, blind_percent=(25, 75), blind_from_tokens=2000)
    rows = answers(make_suite(essays_dir), tokenizer_dir, engine)
    missed = {(row.context_tokens, row.depth_percent) for row in rows if row.score == 0}
    assert missed == {(2048, 50.0), (4096, 50.0)}
    assert {row.response for row in rows if row.score == 0} == {UNKNOWN}


@dataclass(kw_only=True)
class CopyingEngine(ScriptedEngine):
    """Puts markers from the prompt into its answer."""

    copied: Callable[[Completion], Completion]

    def complete(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Completion:
        return self.copied(super().complete(prompt_ids, max_new_tokens=max_new_tokens))


@pytest.mark.parametrize("marker", ["<PAUSE>", " <PAUSE> "])
def test_a_marker_that_is_copied_into_the_answer_costs_nothing_and_is_kept(tokenizer_dir: Path, essays_dir: Path, marker: str) -> None:
    answer = "Eat a sand<PAUSE>wich in Dolores <PAUSE>Park on a sunny<PAUSE> day <PAUSE> !"
    engine = CopyingEngine(facts=FACTS, copied=lambda completion: dataclasses.replace(completion, text=answer))
    suite = make_suite(essays_dir, context_tokens=[1024])
    for row in answers(suite, tokenizer_dir, engine, policy=PausePolicy(marker=marker)):
        assert (row.score, row.response) == (1.0, answer)
    for row in answers(suite, tokenizer_dir, engine):
        assert row.score is not None
        assert row.score < 1, "without a policy it is no marker"


def test_a_marker_of_the_vocabulary_in_an_answer_is_shown_and_costs_nothing(tokenizer_dir: Path, essays_dir: Path) -> None:
    policy = PausePolicy(token="added")
    token = resolve_marker(ModelTokenizer.load(tokenizer_dir), policy).token
    assert token is not None

    def after_each_token(completion: Completion) -> Completion:
        return dataclasses.replace(completion, ids=tuple(id_ for token_id in completion.ids for id_ in (token_id, token.token_id)))

    engine = CopyingEngine(facts=FACTS, copied=after_each_token)
    for row in answers(make_suite(essays_dir, context_tokens=[1024]), tokenizer_dir, engine, policy=policy):
        assert row.score == 1.0
        assert str(row.response).endswith(".<PAUSE>")
        assert str(row.response).replace("<PAUSE>", "") == STOCK.needle


def test_an_engine_failure_is_unscored_and_the_walk_goes_on(tokenizer_dir: Path, essays_dir: Path) -> None:
    rows = answers(make_suite(essays_dir), tokenizer_dir, ScriptedEngine(facts=FACTS, fails_from_tokens=4000))
    failed = [row for row in rows if row.score is None]
    assert {row.context_tokens for row in failed} == {4096}
    assert all("out of memory" in str(row.unscored_reason) and row.response is None and row.rubric is None for row in failed)
    assert {row.score for row in rows if row.context_tokens < 4096} == {1.0}


def test_a_prompt_beyond_the_models_limit_is_an_error_with_both_numbers(tokenizer_dir: Path, essays_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"4096 tokens .* limit is 3000"):
        answers(make_suite(essays_dir), tokenizer_dir, ScriptedEngine(facts=FACTS, limit_tokens=3000))


def test_a_length_that_cannot_hold_the_question_fails_before_anything_is_asked(tokenizer_dir: Path, essays_dir: Path) -> None:
    refuses_all = ScriptedEngine(facts=FACTS, limit_tokens=1)
    with pytest.raises(TextError, match="context_tokens 40 is too short"):
        answers(make_suite(essays_dir, context_tokens=[4096, 40]), tokenizer_dir, refuses_all)
