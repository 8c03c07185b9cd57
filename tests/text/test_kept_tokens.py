"""Long texts are tokenised once, short ones as ever, and a damaged file is read as if it were not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pause_ray.text import prompts
from pause_ray.text.prompts import LONG_CHARS, encode_cached
from pause_ray.text.tokenizer import Encoding, ModelTokenizer
from tests.evaluation.tiny import make_text, make_tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return ModelTokenizer.load(make_tokenizer_folder(tmp_path_factory.mktemp("kept") / "model"))


LONG = (make_text(4000, seed=3) * 2)[: LONG_CHARS + 5]


def same(one: Encoding, other: Encoding) -> bool:
    return one.text == other.text and np.array_equal(one.ids, other.ids) and np.array_equal(one.starts, other.starts)


def test_a_long_text_is_tokenised_once_and_comes_back_as_it_was(
    tokenizer: ModelTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode_cached(LONG, tokenizer=tokenizer, folder=tmp_path)
    assert same(first, tokenizer.encode(LONG))

    def refuse(self: ModelTokenizer, text: str) -> Encoding:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ModelTokenizer, "encode", refuse)
    again = encode_cached(LONG, tokenizer=tokenizer, folder=tmp_path)
    assert same(first, again)
    assert again.ids.dtype == first.ids.dtype
    with pytest.raises(AssertionError, match="again"):
        encode_cached(LONG[1:], tokenizer=tokenizer, folder=tmp_path)


def test_a_short_text_leaves_no_file(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    encode_cached(LONG[: LONG_CHARS - 1], tokenizer=tokenizer, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", b"not a zip file at all"])
def test_a_damaged_file_is_replaced(damage: bytes, tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    first = encode_cached(LONG, tokenizer=tokenizer, folder=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert same(encode_cached(LONG, tokenizer=tokenizer, folder=tmp_path), first)
    assert path.read_bytes() == whole


def test_another_format_is_another_file(tokenizer: ModelTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_cached(LONG, tokenizer=tokenizer, folder=tmp_path)
    monkeypatch.setattr(prompts, "FORMAT", prompts.FORMAT + 1)
    encode_cached(LONG, tokenizer=tokenizer, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
