"""Logits with a prefix cache are those of a whole computation: five architectures, markers, adapters, drafts, kept and host keys."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pause_ray.inference.engine import PromptStep
from tests.inference.prompt_steps import walk_of
from tests.inference.tiny_model import KINDS, added_marker, make_adapter, make_model

torch = pytest.importorskip("torch")
hf = pytest.importorskip("pause_ray.inference.hf")
weights = pytest.importorskip("pause_ray.models.weights")
greedy = pytest.importorskip("pause_ray.inference.decoding")
attention = pytest.importorskip("pause_ray.inference.prefix_attention")
pytestmark = pytest.mark.torch
CHUNK = 16
MIXED = ("llama", "gemma3_text")
"""Plain, and with both kinds of layers."""
MARKED = 5
"""Place of a marker in every prompt."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda kind: make_model(root / kind, kind=kind))


@pytest.fixture(scope="module")
def model_of(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model and marker by architecture, precision, and whether it carries a marker's row and an adapter."""
    root = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def load(kind: str, dtype: str = "float32", adapted: bool = False) -> tuple[Any, int | None]:
        marker = added_marker(folder_of(kind)) if adapted else None
        model = weights.load_base(folder_of(kind), dtype=dtype, marker=marker, device="cpu")
        attention.use_prefix_attention(model)
        if marker:
            model = weights.load_adapter(model, make_adapter(root / f"{kind} {dtype}", folder_of(kind), seed=1, marker=marker))
        return model, marker.token_id if marker else None

    return load


@dataclass(kw_only=True)
class Recorded(greedy.Answer):  # type: ignore[misc, name-defined]
    """Remembers the logits that it was given, one row per token of the answer and its end."""

    rows: list[Any] = field(default_factory=list)

    def accept(self, logits: Any, draft: Any) -> None:
        before = len(self.ids)
        super().accept(logits, draft)
        self.rows.extend(logits[: len(self.ids) - before + (self.finished and len(self.ids) < self.max_tokens)])


def prompts(*, seed: int = 0, marker: int | None = None) -> list[list[int]]:
    """Two prefixes with suffixes of all lengths, exact multiples of the chunk and single tokens among them; none is long."""
    draw = random.Random(seed)

    def some(count: int) -> list[int]:
        return [draw.randrange(2, 390) for _ in range(count)]

    prefix = some(80)
    made = [prefix[:cut] + some(more) for cut, more in ((80, 16), (70, 30), (64, 16), (64, 1), (16, 15), (3, 50))]
    made += [made[-1], made[-1][:32], made[-1][:1]]
    return [[*ids[:MARKED], marker, *ids[MARKED:]] if marker is not None else ids for ids in made]


def read(
    model: Any, steps: list[PromptStep], *, grain: int = 1, chunk: int = CHUNK, drafts: bool = True, host: bool = False, together: int = 1
) -> list[Recorded]:
    decoder = greedy.GreedyDecoder(model, model.config, chunk_tokens=chunk, prefix_block_size=grain, host=host, decode_batch=together)
    decoder.reserve(max(len(step.prompt.ids) for step in steps) + 60)
    answers = []
    with torch.inference_mode():
        for step in steps:
            decoder.make_room(step.prompt.ids, keep_tokens=step.keep_tokens)
            answers.append(
                asked(decoder, step.prompt.ids, keep=step.keep_tokens, drafts=drafts, draft=step.draft_ids, most=step.max_new_tokens)
            )
            assert answers[-1].prefilled_tokens == len(step.prompt.ids) - step.keep_tokens
        decoder.finish()
    assert all(answer.finished for answer in answers)
    return answers


def asked(decoder: Any, ids: Any, *, keep: int, drafts: bool = False, draft: Sequence[int] = (), most: int = 6) -> Recorded:
    answer = Recorded(max_tokens=most, end_ids=frozenset([0]), reference=draft)
    decoder.decode(ids, answer, keep_tokens=keep, drafts=drafts, wait=True)
    return answer


def whole_logits(model: Any, step: PromptStep, answer: Recorded) -> Any:
    """Rows of logits that one forward pass without a cache gives, in transformers' plainest attention."""
    path = torch.as_tensor(np.append(step.prompt.ids, answer.ids).astype(np.int64))[None]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits = model(input_ids=path, use_cache=False).logits[0]
    finally:
        inner.set_attn_implementation(attention.NAME)
    return logits[len(step.prompt.ids) - 1 :][: len(answer.rows)]


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "marker and adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_along_a_prefix_plan_are_those_of_one_forward_pass(model_of: Any, kind: str, adapted: bool) -> None:
    model, marker = model_of(kind, adapted=adapted)
    steps = walk_of(prompts(marker=marker))
    assert sum(step.keep_tokens for step in steps) > 0.3 * sum(len(step.prompt.ids) for step in steps)
    plain = read(model, steps, drafts=False)
    drafted = read(model, walk_of(prompts(marker=marker), drafts=[answer.ids for answer in plain]))
    together = read(model, steps, drafts=False, together=3)
    for step, *answers in zip(steps, plain, drafted, together, strict=True):
        expected = whole_logits(model, step, answers[0])
        for answer in answers:
            assert len(answer.rows) == len(expected)
            assert torch.allclose(torch.stack(answer.rows), expected, rtol=0, atol=1e-4)
    assert len({tuple(answer.ids) for answer in plain}) >= 6, "a model that always says the same would prove nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_that_is_longer_than_the_window_sees_no_further(model_of: Any, kind: str) -> None:
    model, _ = model_of(kind)
    steps = walk_of(prompts(seed=3), grain=1000)
    for step, answer in zip(steps, read(model, steps, chunk=1000, drafts=False), strict=True):
        assert torch.allclose(torch.stack(answer.rows), whole_logits(model, step, answer), rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "marker and adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_logits_are_equal_bit_by_bit_whatever_is_kept(model_of: Any, kind: str, adapted: bool) -> None:
    model, marker = model_of(kind, "bfloat16", adapted=adapted)
    asked = prompts(seed=2, marker=marker)
    drafts = [answer.ids[:6] for answer in read(model, walk_of(asked, grain=1000), grain=CHUNK, drafts=False)]
    kept = read(model, walk_of(asked, grain=CHUNK, drafts=drafts), grain=CHUNK)
    none = read(model, walk_of(asked, grain=1000, drafts=drafts), grain=CHUNK)
    host = read(model, walk_of(asked, grain=CHUNK, drafts=drafts), grain=CHUNK, host=True)
    assert sum(answer.prefilled_tokens for answer in kept) < 0.7 * sum(answer.prefilled_tokens for answer in none)
    for one, *others in zip(none, kept, host, strict=True):
        for other in others:
            assert other.ids == one.ids
            assert torch.equal(torch.stack(other.rows), torch.stack(one.rows))


@pytest.mark.parametrize("kind", MIXED)
def test_a_draft_changes_no_answer_and_saves_forward_passes(model_of: Any, kind: str) -> None:
    model, _ = model_of(kind)
    asked = prompts(seed=4)
    plain = read(model, walk_of(asked), drafts=False)
    assert [answer.forwards for answer in plain] == [max(0, len(answer.rows) - 1) for answer in plain]
    right = [answer.ids for answer in plain]
    drafts = {
        "right": right,
        "begun": [ids[:4] for ids in right],
        "half right": [[*ids[:3], 7, 8, 9] for ids in right],
        "wrong": [[7, 8, 9] for _ in right],
        "too long": [[*ids, 7, 8] for ids in right],
        "of another": [right[-1], *right[:-1]],
    }
    for name, given in drafts.items():
        found = read(model, walk_of(asked, drafts=given))
        assert [answer.ids for answer in found] == right, name
        assert all(new.forwards <= old.forwards for new, old in zip(found, plain, strict=True))
        for answer, draft, old in zip(found, given, plain, strict=True):
            assert answer.margin == pytest.approx(old.margin, abs=1e-4)
            said = [*answer.ids, 0][: len(answer.rows)]
            leaves = any(token != guess for token, guess in zip(said, draft, strict=False))
            assert (answer.reference_margin is not None) == leaves, name
            assert answer.reference_margin is None or answer.reference_margin >= answer.margin - 1e-4
    assert sum(answer.forwards for answer in read(model, walk_of(asked, drafts=right))) == 0


def test_margins_are_gaps_of_the_logits(model_of: Any) -> None:
    model, _ = model_of("llama")
    asked = prompts(seed=5)
    drafts = [[9] if number % 2 else [] for number in range(len(asked))]
    for answer, draft in zip(read(model, walk_of(asked, drafts=drafts), drafts=False), drafts, strict=True):
        gaps = [float(top[0] - top[1]) for top in (row.topk(2).values for row in answer.rows)]
        assert answer.margin == pytest.approx(min(gaps))
        if draft and answer.ids[:1] != draft:
            assert answer.reference_margin == pytest.approx(float(answer.rows[0].max() - answer.rows[0][9]))
        else:
            assert answer.reference_margin is None


def test_text_that_repeats_its_prompt_takes_fewer_forward_passes(model_of: Any) -> None:
    model, _ = model_of("llama")
    draw = random.Random(0)
    said = read(model, walk_of([[draw.randrange(2, 390) for _ in range(40)]], most=24), drafts=False)[0]
    quoted = [*said.ids, 380, 381, *said.ids]  # so that its own repetitions were said before
    plain, looked_up = (
        sum(answer.forwards for answer in read(model, walk_of([quoted], drafts=[[9]], most=60), drafts=drafts)) for drafts in (False, True)
    )
    assert looked_up < plain


@pytest.mark.parametrize("kind", MIXED)
def test_neither_the_length_of_chunks_nor_the_place_of_keys_changes_an_answer(model_of: Any, kind: str) -> None:
    model, _ = model_of(kind)
    asked = prompts(seed=6)
    expected = [answer.ids for answer in read(model, walk_of(asked))]
    for changes in ({"chunk": 7}, {"chunk": 1000}, {"host": True}):
        assert [answer.ids for answer in read(model, walk_of(asked), **changes)] == expected


def test_what_a_step_wrongly_keeps_is_computed_anew(model_of: Any) -> None:
    model, _ = model_of("llama")
    first, second = [step.prompt for step in walk_of(prompts(seed=7)[:2])]
    decoder = greedy.GreedyDecoder(model, model.config, chunk_tokens=CHUNK, prefix_block_size=1)
    found = []
    with torch.inference_mode():
        for ids, keep in ((first.ids, 50), (second.ids, 99), (np.flip(first.ids).copy(), 40)):
            answer = asked(decoder, ids, keep=keep)
            found.append((answer.ids, answer.prefilled_tokens))
    expected = [answer.ids for answer in read(model, walk_of([first.ids, second.ids, np.flip(first.ids)], grain=1000, most=6))]
    assert [ids for ids, _ in found] == expected
    assert [tokens for _, tokens in found] == [96, 30, 96], "nothing was there to be kept; 70 tokens were; none were"


def test_where_only_whole_chunks_are_kept_the_last_one_is_computed_anew(model_of: Any) -> None:
    """It was not whole, or it was computed together with a draft."""
    model, _ = model_of("llama")
    first, second = [step.prompt.ids for step in walk_of(prompts(seed=7)[:2])]
    longer = np.append(first, second[:2])
    assert len(first) % CHUNK == 0
    decoder = greedy.GreedyDecoder(model, model.config, chunk_tokens=CHUNK, prefix_block_size=CHUNK)
    computed = []
    with torch.inference_mode():
        for ids, keep in ((first, 0), (second, 70), (first, 70), (longer, len(first))):
            answer = asked(decoder, ids, keep=keep)
            computed.append(answer.prefilled_tokens)
    assert computed == [len(first), len(second) - 64, len(first) - 64, CHUNK + 2]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_batch_are_those_computed_alone(model_of: Any, kind: str) -> None:
    """Long ones, of prompts that share much, little and nothing; some with guesses from their prompt, some longer than a window."""
    model, _ = model_of(kind)
    draw = random.Random(8)
    phrase = [draw.randrange(2, 390) for _ in range(12)]
    made = [[*ids, *phrase, *phrase[:6]] for ids in prompts(seed=8)]
    steps = walk_of(made, drafts=[[9]] * len(made), most=40)
    alone = read(model, steps, drafts=False)
    for together, drafts in ((2, False), (8, False), (5, True)):
        found = read(model, steps, drafts=drafts, together=together)
        assert [answer.ids for answer in found] == [answer.ids for answer in alone]
        for one, other in zip(found, alone, strict=True):
            assert torch.allclose(torch.stack(one.rows), torch.stack(other.rows), rtol=0, atol=1e-4)
            assert one.margin == pytest.approx(other.margin, abs=1e-4)


def test_a_batch_takes_fewer_forward_passes_and_bounded_memory(model_of: Any) -> None:
    model, _ = model_of("llama")
    steps = walk_of(prompts(seed=9), most=30)
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    decoder = greedy.GreedyDecoder(model, model.config, chunk_tokens=CHUNK, prefix_block_size=1, decode_batch=4)
    try:
        read(model, steps, drafts=False)
        alone = len(passes)
        read(model, steps, drafts=False, together=4)
        assert len(passes) - alone < 0.6 * alone
        decoder.reserve(130)
        with torch.inference_mode():
            for step in steps:
                decoder.make_room(step.prompt.ids, keep_tokens=step.keep_tokens)
                asked(decoder, step.prompt.ids, keep=step.keep_tokens, most=30)
                assert decoder.kv_bytes <= (2 * 130 + 4 * 30) * 2 * 2 * 2 * 8 * 4, "layers x keys and values x heads x width x bytes"
    finally:
        hook.remove()
