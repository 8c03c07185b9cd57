"""The scripted engine counts, reuses, ends and answers as a real engine does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.engines.prefix import reusable_tokens
from pause_ray.engines.scripted import UNKNOWN, ScriptedEngine
from pause_ray.text.tokens import ModelTokenizer
from tests.needle.tiny import STOCK, base, make_text, make_tokenizer_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("tiny") / "model")


def test_it_answers_the_question_asked_from_the_prompt_only(folder: Path) -> None:
    facts = {STOCK.question: STOCK.needle, "Where is the old stone?": "The old stone is under the river."}
    engine = ScriptedEngine(facts=facts)
    engine.use(base(folder))
    tokenizer = ModelTokenizer.load(folder)
    told = make_text(20, seed=1) + " " + STOCK.needle + " "
    for question, answer in ((STOCK.question, STOCK.needle), ("Where is the old stone?", UNKNOWN), ("Who?", UNKNOWN)):
        ids = tokenizer.encode(told + question).ids
        assert engine.complete(ids.tolist(), max_new_tokens=200).text == answer
        assert engine.complete(ids.tolist(), max_new_tokens=3).decoded_tokens == 3


ids = st.lists(st.integers(0, 2), max_size=40)


@given(common=ids, before=ids, after=st.lists(st.integers(0, 2), min_size=1, max_size=40), chunk_tokens=st.integers(1, 9))
def test_what_is_reused_is_shared_whole_chunks_and_never_the_last_token(
    common: list[int], before: list[int], after: list[int], chunk_tokens: int
) -> None:
    computed, prompt = np.array(common + before, dtype=np.int32), np.array(common + after, dtype=np.int32)
    reused = reusable_tokens(computed, prompt, chunk_tokens=chunk_tokens)
    assert reused % chunk_tokens == 0
    assert reused < len(prompt)
    assert computed[:reused].tolist() == prompt[:reused].tolist()
    longer = reused + chunk_tokens
    assert longer >= len(prompt) or longer > len(computed) or computed[:longer].tolist() != prompt[:longer].tolist()
