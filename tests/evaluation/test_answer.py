"""Every cell is answered once and its row says what was asked; failures are not zeros, copied markers cost nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError, TextError
from pause_ray.evaluation.answer import CellRunner, Provenance, answer_cells, plan_cells
from pause_ray.evaluation.haystack import load_haystack, prompt_builder
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.engine import Completion, EngineError, PromptStep, Reuse
from pause_ray.inference.scripted import UNKNOWN, ScriptedEngine
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from tests.evaluation.tiny import STOCK, base, make_suite

PROVENANCE = Provenance(arm="baseline", model="tiny", adapter=None, pauses="none")
FACTS = {STOCK.question: STOCK.needle}


def answers(
    suite: SuiteSpec, model_dir: Path, engine: ScriptedEngine, *, policy: PausePolicy | None = None, reuse: Reuse = "full"
) -> list[CellResult]:
    tokenizer = ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, policy)
    haystack = load_haystack(suite, cache=model_dir, seed=0, replicate=0)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=0)
    runner = CellRunner(builder=builder, tokenizer=tokenizer, policy=policy, marker=marker, max_new_tokens=suite.max_new_tokens)
    engine.use(base(model_dir))
    asked = plan_cells(
        cells(suite, identity="i", replicate=0, seed=0), runner=runner, prefix_block_size=engine.prefix_block_size, reuse=reuse
    )
    return list(answer_cells(asked, engine=engine, runner=runner, provenance=PROVENANCE))


@pytest.mark.parametrize(
    ("grid", "policy", "least_gain"),
    [
        ({"depth_percent": [0, 50, 100]}, None, 1.5),
        ({"depth_percent": [0, 50, 100]}, PausePolicy(), 1.5),
        ({"depth_percent": [0, 50, 100]}, PausePolicy(placement="random", rate=5.0), 1.5),
        ({"depth_percent": [10, 50, 90]}, None, 1.35),
        ({"lattice_tokens": 512, "context_tokens": [512 * step for step in range(1, 9)], "depth_percent": []}, None, 4.0),
        ({"lattice_tokens": 512, "context_tokens": [512 * step for step in range(1, 9)], "depth_percent": []}, PausePolicy(every=2), 4.0),
    ],
)
def test_reuse_saves_prefill(
    tokenizer_dir: Path, essays_dir: Path, grid: dict[str, object], least_gain: float, policy: PausePolicy | None
) -> None:
    suite = make_suite(essays_dir, **grid)
    rows = answers(suite, tokenizer_dir, ScriptedEngine(facts=FACTS), policy=policy)
    assert sum(row.prompt_tokens for row in rows) / sum(row.prefilled_tokens for row in rows) >= least_gain


@pytest.mark.parametrize("reuse", ["full", "depth", "none"])
def test_what_is_reused_changes_no_row_but_its_costs(tokenizer_dir: Path, essays_dir: Path, reuse: Reuse) -> None:
    def rows(mode: Reuse) -> list[CellResult]:
        found = answers(make_suite(essays_dir), tokenizer_dir, ScriptedEngine(facts=FACTS, blind_percent=(25, 75)), reuse=mode)
        return sorted((dataclasses.replace(row, prefilled_tokens=0) for row in found), key=lambda row: row.cell_id)

    assert rows(reuse) == rows("none")


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

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, outcome in super().answer(steps):
            assert isinstance(outcome, Completion)
            yield place, self.copied(outcome)


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


def test_a_row_has_what_the_engine_tells_of_its_answer(tokenizer_dir: Path, essays_dir: Path) -> None:
    told = {"margin": 0.5, "reference_margin": 0.25, "cost": 0.01, "seconds": 2.0, "decoded_tokens": 77}
    engine = CopyingEngine(facts=FACTS, copied=lambda completion: dataclasses.replace(completion, **told))
    rows = answers(make_suite(essays_dir, context_tokens=[1024], depth_percent=[], samples=3), tokenizer_dir, engine)
    assert [{name: getattr(row, name) for name in told} for row in rows] == [told] * 3
    assert {row.sample for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("drafts", [True, False])
def test_the_reference_is_the_draft_where_drafts_are_wanted(tokenizer_dir: Path, essays_dir: Path, drafts: bool) -> None:
    suite, tokenizer = make_suite(essays_dir, context_tokens=[1024]), ModelTokenizer.load(tokenizer_dir)
    haystack, marker = load_haystack(suite, cache=tokenizer_dir, seed=0, replicate=0), resolve_marker(tokenizer, None)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=None, marker=marker, seed=0)
    runner = CellRunner(builder=builder, tokenizer=tokenizer, policy=None, marker=marker, max_new_tokens=5)
    asked = plan_cells(cells(suite, identity="i", replicate=0, seed=0), runner=runner, prefix_block_size=1, drafts=drafts)
    expected = tuple(tokenizer.encode(STOCK.needle).ids.tolist()) if drafts else ()
    assert {(step.draft_ids, step.max_new_tokens) for _, step in asked} == {(expected, 5)}


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
