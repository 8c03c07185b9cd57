"""Rows: what is trained on, how long they are, and that no marker group is ever split."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pause_ray.core.errors import SourceError, TextError
from pause_ray.data.packing import (
    RowDraw,
    Window,
    draw_row,
    longest_stretch,
    needle_sft_row,
    pack_language_modeling,
    pause_mask,
    take_window,
)
from pause_ray.data.shards import NO_LOSS, PackedRow
from pause_ray.data.spec import CorpusSpec
from pause_ray.data.staging import Span
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import PromptSpec
from pause_ray.text.segments import JOINT
from pause_ray.text.tokenizer import ModelTokenizer, TokenDocument, resolve_marker

FACTS = {
    "facts": [
        {
            "needle": "The key of {room} hangs {place}.",
            "question": "Where is the key of {room}?",
            "slots": {"room": ["the attic", "the cellar"], "place": ["on a nail", "in a box"]},
        }
    ]
}
SPEC = CorpusSpec.parse(
    {"sources": [{"path": "x"}], "facts": FACTS, "sequence_len": 700, "min_context_tokens": 500},
    origin="test",
)
PROMPT = PromptSpec(system=None)
STORY = [
    Span(text="\n\n".join(f"Story {story}, part {part}. It rained. We went on." for part in range(20)), paragraph_rule="blank_line")
    for story in range(4)
]
POLICIES = [
    None,
    PausePolicy(),
    PausePolicy(unit="sentence", count=3),
    PausePolicy(unit="sentence", token="added"),
    PausePolicy(budget="total"),
    PausePolicy(unit="sentence", count=3, budget="total"),
]


@pytest.fixture(scope="module")
def tokenizer(byte_model: Path) -> ModelTokenizer:
    return ModelTokenizer.load(byte_model)


def window_of(tokenizer: ModelTokenizer, draw: RowDraw) -> Window:
    return take_window(STORY, tokens=draw.row_tokens, tokenizer=tokenizer)


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_is_on_the_hidden_fact_and_the_end_of_the_turn_only(tokenizer: ModelTokenizer, policy: PausePolicy | None) -> None:
    marker = resolve_marker(tokenizer, policy)
    for number in range(8):
        draw = draw_row(SPEC, seed=3, row=number)
        row = needle_sft_row(window_of(tokenizer, draw), draw=draw, prompt=PROMPT, tokenizer=tokenizer, policy=policy, marker=marker)
        trained = row.labels != NO_LOSS
        assert row.input_ids[trained].tolist() == [*tokenizer.encode(draw.fact.needle).ids, tokenizer.answer_end_id]
        assert np.array_equal(row.input_ids[trained], row.labels[trained])
        assert trained[-1]
        assert not trained[: -int(trained.sum())].any()
        asked = tokenizer.decode(row.input_ids[~trained])
        assert asked.count(draw.fact.needle) == 1
        assert draw.fact.question in asked
        if policy is None or policy.budget == "total":
            assert len(row.input_ids) <= draw.row_tokens
        if policy is None:
            assert len(row.input_ids) == draw.row_tokens
            assert row.num_pauses == 0
        else:
            group = pause_mask(row.input_ids, group_ids=marker.group_ids)
            assert int(group.sum()) == row.num_pauses * len(marker.group_ids) > 0


@pytest.mark.parametrize(
    "policy",
    [
        PausePolicy(),
        PausePolicy(unit="sentence", count=2),
        PausePolicy(unit="sentence", count=8, token="added"),
        PausePolicy(unit="tokens", unit_tokens=3, token="added"),
        PausePolicy(placement="random", rate=200),
        PausePolicy(placement="pattern", pattern=r"\."),
        PausePolicy(instruction="Stop and think at every <PAUSE>. " * 4),
    ],
)
def test_arms_train_on_the_same_content(tokenizer: ModelTokenizer, policy: PausePolicy) -> None:
    def row_of(draw: RowDraw, policy: PausePolicy | None) -> PackedRow:
        marker = resolve_marker(tokenizer, policy)
        return needle_sft_row(window_of(tokenizer, draw), draw=draw, prompt=PROMPT, tokenizer=tokenizer, policy=policy, marker=marker)

    for number in range(10):
        draw = draw_row(SPEC, seed=0, row=number)
        plain, paused = row_of(draw, None), row_of(draw, policy)
        assert paused.num_pauses > 0
        assert paused.content_tokens == plain.content_tokens
        context = paused.input_ids[~pause_mask(paused.input_ids, group_ids=resolve_marker(tokenizer, policy).group_ids)].tolist()
        # Between the context and the question stands the instruction, and nothing else is different.
        told = f"{policy.instruction.replace('<PAUSE>', '').strip()} " if policy.instruction else ""
        before, question, after = tokenizer.decode(plain.input_ids).rpartition(draw.fact.question)
        assert tokenizer.decode(context) == f"{before}{told}{question}{after}"


def test_a_row_is_segmented_by_the_rule_of_each_of_its_documents(tokenizer: ModelTokenizer) -> None:
    glued = Span(text="It was deep.The rest of it was not. Why.Nobody knew. " * 3, paragraph_rule="glued")
    spaced = Span(text="A slip.Here it is. So we went on.\n\nThen it stopped. " * 3, paragraph_rule="blank_line")
    draw = draw_row(SPEC, seed=0, row=0)
    policy = PausePolicy()
    window = take_window([glued, spaced] * 4, tokens=draw.row_tokens, tokenizer=tokenizer)
    row = needle_sft_row(window, draw=draw, prompt=PROMPT, tokenizer=tokenizer, policy=policy, marker=resolve_marker(tokenizer, policy))
    text = tokenizer.decode(row.input_ids)
    assert "deep.<PAUSE>The" in text
    assert "deep.The" not in text
    assert "slip.Here" in text
    assert "slip.<PAUSE>" not in text


def test_what_chance_decides_follows_from_number_and_seed() -> None:
    draws = [draw_row(SPEC, seed=0, row=number) for number in range(50)]
    assert draws == [draw_row(SPEC, seed=0, row=number) for number in range(50)]
    assert len({draw.start for draw in draws}) == 50
    assert draws[0] != draw_row(SPEC, seed=1, row=0)
    assert all(SPEC.min_context_tokens <= draw.row_tokens <= SPEC.sequence_len for draw in draws)


def test_a_row_counts_the_documents_it_reads(tokenizer: ModelTokenizer) -> None:
    short = [Span(text=f"Note {number}. Nothing else was written.", paragraph_rule="blank_line") for number in range(40)]
    draw = draw_row(SPEC, seed=0, row=0)
    window = take_window(short, tokens=draw.row_tokens, tokenizer=tokenizer)
    row = needle_sft_row(window, draw=draw, prompt=PROMPT, tokenizer=tokenizer, policy=None, marker=resolve_marker(tokenizer, None))
    assert row.num_documents == tokenizer.decode(row.input_ids).count("Note ")


def test_neighbouring_documents_are_joined_until_there_is_enough(tokenizer: ModelTokenizer) -> None:
    window = take_window(STORY, tokens=len(STORY[0].text) + 10, tokenizer=tokenizer)
    assert window.text.startswith(STORY[0].text + JOINT + STORY[1].text[:10])
    assert all(window.text[begin:].startswith("Story") for begin, _ in window.rules)
    whole = sum(len(span.text) for span in STORY) + 3 * len(JOINT)
    assert len(take_window(STORY, tokens=whole, tokenizer=tokenizer).text) == whole
    with pytest.raises(SourceError, match=f"holds {whole} tokens.*up to {whole + 1}"):
        take_window(STORY, tokens=whole + 1, tokenizer=tokenizer)


def test_a_row_too_short_for_its_fact_and_question_is_an_error(tokenizer: ModelTokenizer) -> None:
    spec = CorpusSpec.parse({"sources": [{"path": "x"}], "facts": FACTS, "sequence_len": 64, "min_context_tokens": 64}, origin="test")
    draw = draw_row(spec, seed=0, row=0)
    with pytest.raises(TextError, match="too short"):
        needle_sft_row(
            window_of(tokenizer, draw),
            draw=draw,
            prompt=PromptSpec(),
            tokenizer=tokenizer,
            policy=None,
            marker=resolve_marker(tokenizer, None),
        )


END, PAUSE = 999, 900
BUDGETS: list[Literal["content", "total"]] = ["content", "total"]


def is_marker(token: int) -> bool:
    return PAUSE <= token < END


@st.composite
def token_documents(draw: st.DrawFn, group: int) -> TokenDocument:
    """Content tokens 0, 1, 2, … with whole marker groups between some of them, no two groups side by side."""
    ids: list[int] = []
    is_pause: list[bool] = []
    for token in range(draw(st.integers(1, 25))):
        ids.append(token)
        is_pause.append(False)
        if draw(st.booleans()):
            ids += range(PAUSE, PAUSE + group)
            is_pause += [True] * group
    starts = np.arange(is_pause.count(False), dtype=np.int64)
    return TokenDocument(np.array(ids, np.int32), np.array(is_pause, bool), starts)


def whole(documents: list[TokenDocument]) -> list[tuple[TokenDocument, bool]]:
    return [(document, True) for document in documents]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), group=st.integers(1, 4), length=st.integers(5, 30), budget=st.sampled_from(BUDGETS))
def test_packed_rows_are_the_documents_end_to_end(
    data: st.DataObject, group: int, length: int, budget: Literal["content", "total"]
) -> None:
    documents = whole(data.draw(st.lists(token_documents(group), max_size=6)))
    if data.draw(st.booleans()):
        documents[-1:] = [(document, False) for document, _ in documents[-1:]]
    rows = list(pack_language_modeling(documents, sequence_len=length, end_id=END, group_tokens=group, budget=budget))
    stream = [token for document, is_ended in documents for token in [*document.ids.tolist(), *[END] * is_ended]]
    packed = [token for row in rows for token in row.input_ids.tolist()]
    assert packed == stream[: len(packed)]
    left = [token for token in stream[len(packed) :] if not is_marker(token)]
    assert len(left) <= 1, "only a single last token, which predicts nothing, may be left out"
    for row in rows:
        counted = row.input_ids.tolist() if budget == "total" else [token for token in row.input_ids.tolist() if not is_marker(token)]
        assert 2 <= len(counted) <= length
        assert row.num_pauses * group == sum(token >= PAUSE and token != END for token in row.input_ids.tolist())
        assert row.document_starts.tolist() == [0, *(place + 1 for place in np.flatnonzero(row.input_ids[:-1] == END))]
        assert row.num_documents == len(row.document_starts)
        assert [place for place, label in enumerate(row.labels.tolist()) if label != NO_LOSS] == [
            place
            for place, token in enumerate(row.input_ids.tolist())
            if not PAUSE <= token < PAUSE + group and place not in row.document_starts
        ]
        assert np.array_equal(row.labels[row.labels != NO_LOSS], row.input_ids[row.labels != NO_LOSS])
        inside = "".join(chr(token) for token in row.input_ids)
        assert inside.count(chr(PAUSE)) == inside.count(chr(PAUSE + group - 1)), "a marker group was split"
    for row, following in itertools.pairwise(rows):
        room = length - sum(budget == "total" or not is_marker(token) for token in row.input_ids.tolist())
        assert room < group
        assert room == 0 or budget == "total"
        assert room == 0 or following.input_ids[0] == PAUSE, "a row may be short only where a group did not fit"


@settings(max_examples=80, deadline=None)
@given(data=st.data(), length=st.integers(5, 30), budget=st.sampled_from(BUDGETS), leading=st.lists(st.integers(2000, 2009), max_size=2))
def test_every_document_and_every_rest_of_one_begins_as_the_model_expects(
    data: st.DataObject, length: int, budget: Literal["content", "total"], leading: list[int]
) -> None:
    documents = whole(data.draw(st.lists(token_documents(2), max_size=6)))

    def rows(leading_ids: list[int]) -> list[PackedRow]:
        return list(
            pack_language_modeling(documents, sequence_len=length, end_id=END, group_tokens=2, budget=budget, leading_ids=leading_ids)
        )

    for bare, led in zip(rows([]), rows(leading), strict=True):
        assert led.input_ids.dtype == led.labels.dtype == led.document_starts.dtype == np.int32
        assert (led.num_pauses, led.content_tokens, led.num_documents) == (bare.num_pauses, bare.content_tokens, bare.num_documents)
        ends = [*led.document_starts[1:].tolist(), len(led.input_ids)]
        told = [(led.input_ids[begin:end], led.labels[begin:end]) for begin, end in zip(led.document_starts, ends, strict=True)]
        assert all(ids[: len(leading)].tolist() == leading for ids, _ in told)
        assert all((labels[: len(leading)] == NO_LOSS).all() for _, labels in told)
        assert [token for ids, _ in told for token in ids[len(leading) :].tolist()] == bare.input_ids.tolist()
        assert [label for _, labels in told for label in labels[len(leading) :].tolist()] == bare.labels.tolist()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), length=st.integers(2, 30))
def test_packed_rows_of_content_do_not_depend_on_the_pauses(data: st.DataObject, length: int) -> None:
    documents = data.draw(st.lists(token_documents(3), max_size=6))
    bare = [TokenDocument(doc.ids[~doc.is_pause], np.zeros(doc.num_content, bool), doc.content_starts) for doc in documents]

    def contents(documents: list[TokenDocument], group: int) -> list[list[int]]:
        rows = pack_language_modeling(whole(documents), sequence_len=length, end_id=END, group_tokens=group, budget="content")
        return [[token for token in row.input_ids.tolist() if not is_marker(token)] for row in rows]

    assert contents(documents, 3) == contents(bare, 0)


def test_a_group_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(TextError, match=r"9 tokens.*8"):
        list(pack_language_modeling([], sequence_len=8, end_id=END, group_tokens=9, budget="total"))


@given(st.lists(st.booleans(), max_size=40))
def test_the_longest_stretch_is_the_longest_run_without_a_pause(is_pause: list[bool]) -> None:
    runs = "".join("|" if pause else "." for pause in is_pause).split("|")
    assert longest_stretch(np.array(is_pause, dtype=bool)) == max(map(len, runs))
