"""The scripted engine counts, keeps, ends and answers as a real engine does."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError
from pause_ray.inference.engine import Completion, EngineError, PromptStep
from pause_ray.inference.scripted import UNKNOWN, ScriptedEngine
from pause_ray.text.tokenizer import ModelTokenizer
from tests.evaluation.tiny import STOCK, base, make_text, make_tokenizer_folder
from tests.inference.prompt_steps import step_of, walk_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("tiny") / "model")


def ask(engine: ScriptedEngine, steps: list[PromptStep]) -> list[Completion | EngineError]:
    places, outcomes = zip(*engine.answer(steps), strict=True)
    assert list(places) == list(range(len(steps)))
    return list(outcomes)


def answered(outcome: Completion | EngineError) -> Completion:
    assert isinstance(outcome, Completion)
    return outcome


def test_it_answers_the_question_asked_from_the_prompt_only(folder: Path) -> None:
    facts = {STOCK.question: STOCK.needle, "Where is the old stone?": "The old stone is under the river."}
    engine = ScriptedEngine(facts=facts)
    engine.use(base(folder))
    tokenizer = ModelTokenizer.load(folder)
    told = make_text(20, seed=1) + " " + STOCK.needle + " "
    for question, answer in ((STOCK.question, STOCK.needle), ("Where is the old stone?", UNKNOWN), ("Who?", UNKNOWN)):
        ids = tokenizer.encode(told + question).ids.tolist()
        whole, cut = ask(engine, [step_of(ids, most=200), step_of(ids, most=3)])
        assert answered(whole).text == answer
        assert answered(cut).decoded_tokens == 3


@pytest.mark.parametrize("grain", [1, 4])
def test_what_is_kept_is_not_computed_again_and_is_lost_with_a_failure(folder: Path, grain: int) -> None:
    engine = ScriptedEngine(facts={}, fails_from_tokens=40, prefix_block_size=grain)
    engine.use(base(folder))
    trunk = list(range(100, 130))
    prompts = [[*trunk, 5], [*trunk[:21], 6, 7], list(range(100, 150)), [*trunk[:21], 8]]
    outcomes = ask(engine, walk_of(prompts, grain=grain))
    assert [answered(outcome).prefilled_tokens for outcome in outcomes[:2]] == [31, 23 - 21 // grain * grain]
    assert isinstance(outcomes[2], EngineError)
    assert answered(outcomes[3]).prefilled_tokens == 22


def test_a_plan_that_keeps_what_is_not_there_is_a_bug_and_no_answer(folder: Path) -> None:
    engine = ScriptedEngine(facts={})
    engine.use(base(folder))
    with pytest.raises(RuntimeError, match="keeps 3 tokens"):
        ask(engine, [step_of([10, 11, 12, 13]), step_of([10, 11, 99, 13], keep=3)])


def test_a_prompt_beyond_the_limit_is_refused(folder: Path) -> None:
    engine = ScriptedEngine(facts={}, limit_tokens=6)
    engine.use(base(folder))
    [outcome] = ask(engine, [step_of([10] * 4)])
    assert answered(outcome).decoded_tokens == 2
    with pytest.raises(ModelError, match=r"6 tokens .* limit is 6"):
        ask(engine, [step_of([10] * 6)])
