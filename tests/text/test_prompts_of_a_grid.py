"""Many prompts of one builder: each is as if it were the only one, and what they can share they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pause_ray.core.errors import TextError
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt, HiddenText, PromptBuilder, PromptSpec
from pause_ray.text.segments import split
from pause_ray.text.tokenizer import ModelTokenizer, cut, insert_pauses, resolve_marker
from tests.text.test_prompts import HAYSTACK, NEEDLE, POLICIES, QUESTION, TOTAL, context_ids, haystack_of

TEXTS = (NEEDLE, "A grey horse waits at the mill.", "At noon, the bell rings four times!")
LINES = "\n".join(
    f"{name} went to the {place}. Then he slept." for name in ("John", "Mary", "Ann") for place in ("mill", "barn", "sea") * 60
)
LONG_HAYSTACK = haystack_of(7, 1500)
depths = st.lists(st.floats(0, 100), min_size=1, max_size=3)


def make_builder(tokenizer: ModelTokenizer, policy: PausePolicy | None, *, haystack: str = HAYSTACK, **changed: Any) -> PromptBuilder:
    asked: dict[str, Any] = {"rules": None, "prompt": PromptSpec(), "seed": 0}
    return PromptBuilder(haystack, **(asked | changed), tokenizer=tokenizer, policy=policy, marker=resolve_marker(tokenizer, policy))


def hidden(depths: Sequence[float]) -> list[HiddenText]:
    return [HiddenText(text=text, depth_percent=depth) for text, depth in zip(TEXTS, depths, strict=False)]


def standing_at(position: int) -> list[HiddenText]:
    return [HiddenText(text=NEEDLE, depth_percent=0, position_tokens=position)]


def build(builder: PromptBuilder, facts: Sequence[HiddenText], context_tokens: int) -> BuiltPrompt:
    return builder.build(facts, question=QUESTION, context_tokens=context_tokens)


def end_of_context(built: BuiltPrompt) -> int:
    return len(built.ids) - built.suffix_tokens


def common_prefix(one: BuiltPrompt, other: BuiltPrompt) -> int:
    size = min(len(one.ids), len(other.ids))
    differ = np.flatnonzero(one.ids[:size] != other.ids[:size])
    return int(differ[0]) if differ.size else size


def assert_same(one: BuiltPrompt, other: BuiltPrompt) -> None:
    for field in dataclasses.fields(BuiltPrompt):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


@settings(max_examples=40)
@given(
    cells=st.lists(st.tuples(st.integers(250, 3000), depths), min_size=2, max_size=6),
    policy=st.sampled_from(POLICIES + TOTAL),
    seed=st.integers(0, 3),
)
def test_a_prompt_does_not_depend_on_what_was_built_before(byte_tokenizer, cells, policy, seed):
    shared = make_builder(byte_tokenizer, policy, haystack=LONG_HAYSTACK, seed=seed)
    for tokens, places in cells:
        alone = make_builder(byte_tokenizer, policy, haystack=LONG_HAYSTACK, seed=seed)
        assert_same(build(shared, hidden(places), tokens), build(alone, hidden(places), tokens))


@settings(max_examples=60)
@given(
    tokens=st.integers(350, 2500),
    places=depths,
    policy=st.sampled_from([each for each in POLICIES + TOTAL if each is None or each.token != "reserved"]),
)
def test_the_context_is_the_beginning_of_the_whole_text_with_its_facts_and_pauses(tokenizer, tokens, places, policy):
    facts = hidden(places)
    haystack = "She counted the boats. It did not lift. What had she missed? " * 200
    built = build(make_builder(tokenizer, policy, haystack=haystack), facts, tokens)
    # Where each fact went, in haystack tokens and so in characters; the rest is done the long way.
    marker = resolve_marker(tokenizer, policy)
    sentences = np.array([start for start, _ in split(haystack, unit="sentence")])
    tokens_before = np.searchsorted(tokenizer.encode(haystack).starts, sentences)
    content, landings = np.flatnonzero(~pauses_of(built, tokenizer, policy)), {}
    for fact, token in zip(facts, built.needle_tokens, strict=True):
        earlier = [other.text for other, place in zip(facts, built.needle_tokens, strict=True) if place < token]
        before = int(np.searchsorted(content, token - built.prefix_tokens)) - sum(len(tokenizer.encode(f"{each} ").ids) for each in earlier)
        landings[fact.text] = int(sentences[np.abs(tokens_before - before).argmin()])
    text, done = "", 0
    for fact in sorted(facts, key=lambda fact: landings[fact.text]):
        text += f"{haystack[done : landings[fact.text]]}{fact.text} "
        done = landings[fact.text]
    document = insert_pauses(tokenizer.encode(text + haystack[done:]), policy=policy, marker=marker, seed=0)
    context = built.ids[built.prefix_tokens : end_of_context(built)]
    room = built.content_tokens if policy is None or policy.budget == "content" else len(context)
    wanted = cut(document, tokens=room, budget=policy.budget if policy else "content")
    assert context.tolist() == wanted.ids.tolist()


def pauses_of(built: BuiltPrompt, tokenizer: ModelTokenizer, policy: PausePolicy | None) -> np.ndarray:
    from pause_ray.data.packing import pause_mask

    context = built.ids[built.prefix_tokens : end_of_context(built)]
    return pause_mask(context, group_ids=resolve_marker(tokenizer, policy).group_ids)


@settings(max_examples=60)
@given(
    lengths=st.tuples(st.integers(450, 3000), st.integers(450, 3000)),
    position=st.integers(0, 250),
    policy=st.sampled_from(POLICIES + TOTAL),
)
def test_on_a_lattice_lengths_share_everything_up_to_the_end_of_the_shorter_context(byte_tokenizer, lengths, position, policy):
    builder = make_builder(byte_tokenizer, policy, haystack=LONG_HAYSTACK)
    short, long = (build(builder, standing_at(position // (2 if policy in TOTAL else 1)), tokens) for tokens in sorted(lengths))
    assert short.needle_token == long.needle_token
    assert common_prefix(short, long) >= end_of_context(short)


@settings(max_examples=60)
@given(places=st.tuples(st.floats(0, 100), st.floats(0, 100)), policy=st.sampled_from(POLICIES + TOTAL))
def test_two_depths_share_everything_up_to_the_shallower_needle(byte_tokenizer, places, policy):
    builder = make_builder(byte_tokenizer, policy)
    one, other = (build(builder, hidden([place]), 900) for place in places)
    # A pause between them may stand on either side of a blank: the next word is or is not one token with it.
    group = len(resolve_marker(byte_tokenizer, policy).group_ids)
    assert common_prefix(one, other) >= min(one.needle_token, other.needle_token) - group


@settings(max_examples=40)
@given(places=st.lists(st.floats(0, 100), min_size=3, max_size=3), policy=st.sampled_from(POLICIES))
def test_every_fact_is_whole_and_where_it_would_be_alone(byte_tokenizer, places, policy):
    facts = hidden(places)
    builder = make_builder(byte_tokenizer, policy)
    built = build(builder, facts, 1200)
    assert built.prompt_tokens - built.num_pauses * len(resolve_marker(byte_tokenizer, policy).group_ids) == 1200
    content = byte_tokenizer.decode(context_ids(built, byte_tokenizer, policy))
    marker = policy.marker if policy and policy.token == "text" else "\0"
    for fact, token in zip(facts, built.needle_tokens, strict=True):
        assert content.count(fact.text) == 1
        assert byte_tokenizer.decode(built.ids[token:]).replace(marker, "").lstrip().startswith(fact.text)
        # The context with one fact that has as many haystack tokens.
        sizes = [len(byte_tokenizer.encode(f"{other.text} ").ids) for other in facts]
        alone = build(builder, [fact], 1200 - sum(sizes) + sizes[facts.index(fact)])
        before = byte_tokenizer.decode(context_ids(alone, byte_tokenizer, policy)).partition(fact.text)[0]
        removed = content.partition(fact.text)[0]
        for other in facts:
            removed = removed.replace(f"{other.text} ", "")
        assert removed == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("depth", [0, 40, 100])
def test_facts_of_one_place_keep_their_order(byte_tokenizer, order, depth):
    facts = [HiddenText(text=TEXTS[index], depth_percent=depth) for index in order]
    built = build(make_builder(byte_tokenizer, PausePolicy(token="added")), facts, 700)
    assert list(built.needle_tokens) == sorted(built.needle_tokens)
    assert " ".join(fact.text for fact in facts) in byte_tokenizer.decode(built.ids)


def test_facts_at_the_end_go_back_together_rather_than_lose_their_room_to_pauses(byte_tokenizer):
    policy = PausePolicy(unit="sentence", count=8, token="added", budget="total")
    builder = make_builder(byte_tokenizer, policy)
    for tokens in range(420, 460, 4):
        content = byte_tokenizer.decode(context_ids(build(builder, hidden([100, 100, 100]), tokens), byte_tokenizer, policy))
        assert " ".join(TEXTS) in content


def test_a_fact_further_up_stays_where_it_is_when_one_at_the_end_goes_back(byte_tokenizer):
    policy = PausePolicy(unit="sentence", count=8, token="added", budget="total")
    builder = make_builder(byte_tokenizer, policy)
    for tokens in range(420, 460, 4):
        early, late = build(builder, hidden([10, 100]), tokens), build(builder, hidden([10, 60]), tokens)
        assert early.needle_tokens[0] == late.needle_tokens[0] < late.needle_tokens[1] < early.needle_tokens[1]


def test_a_position_beyond_the_context_is_its_end(byte_tokenizer):
    builder = make_builder(byte_tokenizer, PausePolicy())
    assert_same(build(builder, standing_at(10**6), 700), build(builder, [HiddenText(text=NEEDLE, depth_percent=100)], 700))


@settings(max_examples=30)
@given(places=depths, policy=st.sampled_from([None, PausePolicy(), PausePolicy(unit="sentence", every=2), PausePolicy(budget="total")]))
def test_in_a_haystack_of_lines_a_fact_is_a_line(byte_tokenizer, places, policy):
    builder = make_builder(byte_tokenizer, policy, haystack=LINES, rules=((0, "newline"),), joiner="\n")
    built = build(builder, hidden(places), 900)
    text = byte_tokenizer.decode(built.ids[built.prefix_tokens : end_of_context(built)]).replace("<PAUSE>", "")
    lines = text.split("\n")
    assert set(TEXTS[: len(places)]) <= set(lines)
    # The cut may end in the middle of a line.
    assert LINES.startswith("\n".join(line for line in lines if line not in TEXTS))


def test_the_beginning_of_the_answer_ends_the_prompt_and_is_inside_its_length(byte_tokenizer):
    builder = make_builder(byte_tokenizer, PausePolicy(token="added"))
    plain, begun = (
        builder.build(hidden([50]), question=QUESTION, context_tokens=600, answer_prefix=prefix) for prefix in ("", "It lies under the")
    )
    size = len(byte_tokenizer.encode("It lies under the").ids)
    assert begun.prompt_tokens - begun.num_pauses == plain.prompt_tokens - plain.num_pauses == 600
    assert begun.suffix_tokens == plain.suffix_tokens + size
    assert begun.content_tokens == plain.content_tokens - size
    assert byte_tokenizer.decode(begun.ids).endswith(f"{QUESTION}\nassistant\nIt lies under the")
    assert begun.answer_prefix == "It lies under the"


def test_a_server_can_be_sent_the_texts_around_the_context(byte_tokenizer):
    policy = PausePolicy(instruction="At each <PAUSE>, think.")
    prompt = PromptSpec(system="Be brief.", before="Read this.\n")
    built = build(make_builder(byte_tokenizer, policy, prompt=prompt), hidden([50]), 600)
    prefix, suffix = byte_tokenizer.chat_frame(built.system, built.user_before, built.user_after)
    assert built.ids[: built.prefix_tokens].tolist() == list(prefix)
    assert built.ids[end_of_context(built) :].tolist() == list(suffix)
    assert built.user_after == f"\n\nAt each <PAUSE>, think. {QUESTION}"


def test_facts_that_need_more_than_the_length_are_refused_with_the_least(byte_tokenizer):
    builder = make_builder(byte_tokenizer, None)
    with pytest.raises(TextError, match="ask for at least ") as caught:
        build(builder, hidden([10, 50, 90]), 120)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    content = byte_tokenizer.decode(context_ids(build(builder, hidden([10, 50, 90]), least), byte_tokenizer, None))
    assert content.strip() == " ".join(TEXTS)
