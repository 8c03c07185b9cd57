"""Texts put into a tokenised text: the tokens are those of the whole, and only what lies near is tokenised again."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pause_ray.text.tokenizer import REACH_TOKENS, Encoding, Insertion, LazyEncoding, ModelTokenizer, insert_texts
from tests.text.conftest import SPECIAL, write_model_folder
from tests.text.texts import texts

# A control token in the text is refused (test_tokenizer); Hypothesis finds them among the constants of the tests.
any_text = texts.filter(lambda text: not any(token in text for token in SPECIAL))
PROSE = "She counted the boats twice: eleven, then twelve.\n\nWhat had she missed? The twelfth lay behind the pier [1]. " * 60
NUMBERS = "".join(str(number) for number in range(2_000))
offsets = st.lists(st.integers(0, len(PROSE)), min_size=1, max_size=4).map(sorted)


class Counting(ModelTokenizer):
    """Knows how many characters it was given."""

    seen_chars = 0

    def encode(self, text: str) -> Encoding:
        self.seen_chars += len(text)
        return super().encode(text)


def written_out(text: str, insertions: list[Insertion]) -> str:
    edges = [0, *(each.offset for each in insertions), len(text)]
    parts = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(parts, [each.text for each in insertions], fillvalue="")))


def assert_same(one: Encoding, other: Encoding) -> None:
    assert one.text == other.text
    assert one.ids.tolist() == other.ids.tolist()
    assert one.starts.tolist() == other.starts.tolist()


@settings(max_examples=80)
@given(offsets=offsets, text=any_text, base=st.sampled_from([PROSE, PROSE.replace(" ", "\n"), PROSE.replace("\n\n", ""), NUMBERS * 2]))
def test_the_tokens_are_those_of_the_text_written_out(tokenizer, offsets, text, base):
    insertions = [Insertion(min(offset, len(base)), text) for offset in offsets]
    wanted = tokenizer.encode(written_out(base, insertions))
    assert_same(insert_texts(tokenizer.encode(base), insertions, tokenizer=tokenizer), wanted)


def test_nothing_put_in_is_the_text_itself(tokenizer):
    base = tokenizer.encode(PROSE)
    assert_same(insert_texts(base, [], tokenizer=tokenizer), base)


@pytest.mark.parametrize("places", [[0], [3_000], [len(PROSE)], [100, 2_000, 6_000]])
def test_only_what_lies_near_is_tokenised_again(model_folder: Path, places: list[int]) -> None:
    tokenizer = Counting.load(model_folder)
    base = tokenizer.encode(PROSE)
    tokenizer.seen_chars = 0
    insert_texts(base, [Insertion(place, "A grey horse waits. ") for place in places], tokenizer=tokenizer)
    chars_per_token = len(PROSE) / len(base.ids)
    assert 0 < tokenizer.seen_chars < 1.3 * len(places) * 4 * REACH_TOKENS * chars_per_token + 20 * len(places)


def digits_by_threes() -> Tokenizer:
    """As Llama 3: a number is cut from its beginning, so one more digit moves every cut after it."""
    tokenizer = Tokenizer(models.BPE())
    by_threes = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_threes, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([NUMBERS], trainer)
    return tokenizer


@pytest.mark.parametrize("digits", ["7", "77", "777"])
@pytest.mark.parametrize("base", [NUMBERS, "0" * 3_000, "123" * 1_000])
def test_a_change_that_reaches_far_is_followed_to_its_end(tmp_path: Path, digits: str, base: str) -> None:
    tokenizer = ModelTokenizer.load(write_model_folder(tmp_path, digits_by_threes()))
    insertions = [Insertion(1_501, digits)]
    wanted = tokenizer.encode(written_out(base, insertions))
    assert_same(insert_texts(tokenizer.encode(base), insertions, tokenizer=tokenizer), wanted)


@settings(max_examples=40)
@given(asked=st.lists(st.integers(0, 2_500), min_size=1, max_size=6))
def test_a_beginning_has_the_tokens_of_the_whole_whatever_was_asked_before(tokenizer, asked):
    whole = tokenizer.encode(PROSE)
    beginning = LazyEncoding(PROSE, encode=tokenizer.encode)
    for tokens in asked:
        first = beginning.first(tokens)
        assert len(first.ids) == min(tokens, len(whole.ids))
        assert np.array_equal(first.ids, whole.ids[:tokens])
        assert np.array_equal(first.starts, whole.starts[:tokens])
        assert PROSE.startswith(first.text)
    assert beginning.is_all or len(beginning.read.text) < 20 * (max(asked) + REACH_TOKENS)


@pytest.mark.real
def test_the_real_tokenizer_is_back_in_step_soon(model_dir: Path) -> None:
    tokenizer = Counting.load(model_dir)
    base = tokenizer.encode(PROSE * 10)
    for offset in range(0, len(base.text), 997):
        insertions = [Insertion(offset, "The blue key lies under the third bell. ")]
        tokenizer.seen_chars = 0
        got = insert_texts(base, insertions, tokenizer=tokenizer)
        assert tokenizer.seen_chars < 6 * 4 * REACH_TOKENS
        assert_same(got, tokenizer.encode(written_out(base.text, insertions)))
