"""Haystacks are orders of documents that depend on the seed and on nothing else; needles are not in them before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pause_ray.documents import Document
from pause_ray.errors import ModelError, SourceError, TextError
from pause_ray.needle.haystack import Haystack, ask, check_lengths, load_haystack
from pause_ray.needle.task import cells
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokens import ModelTokenizer, resolve_marker
from tests.needle.tiny import STOCK, make_haystack_folder, make_suite


def test_the_order_is_that_of_seed_and_replicate_not_of_the_files(essays_dir: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(essays_dir.iterdir(), reverse=True)):
        shutil.copy(path, renamed / f"{number}.txt")
    suite, other_names = make_suite(essays_dir), make_suite(renamed)

    def load(seed: int, replicate: int) -> Haystack:
        return load_haystack(suite, cache=tmp_path, seed=seed, replicate=replicate)

    first = load(0, 0)
    assert load_haystack(other_names, cache=tmp_path, seed=0, replicate=0) == first
    assert len({load(seed, replicate).text for seed in range(2) for replicate in range(2)}) == 4
    assert {frozenset(load(seed, 0).document_digests) for seed in range(3)} == {frozenset(first.document_digests)}


def test_the_digests_are_those_of_the_documents_in_the_text(essays_dir: Path, tmp_path: Path) -> None:
    haystack = load_haystack(make_suite(essays_dir), cache=tmp_path, seed=3, replicate=0)
    documents = {document.digest: document.text for path in essays_dir.iterdir() for document in [Document(id="", text=path.read_text())]}
    assert haystack.text == "\n\n".join(documents[name] for name in haystack.document_digests)


def test_each_document_is_segmented_by_its_own_rule(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = {
        "glued": "It was made deep.The next one was not. Nobody knew.They went home. " * 40,
        "blank_line": "It rained all day. A slip.Here it is. So we went on.\n\nThen it stopped. " * 40,
    }
    essays = tmp_path / "essays"
    essays.mkdir()
    for rule, text in texts.items():
        (essays / f"{rule}.txt").write_text(text)
    tokenizer = ModelTokenizer.load(tokenizer_dir)
    suite = make_suite(essays, context_tokens=[12_000], repeat_haystack=True)
    for replicate in range(2):
        haystack = load_haystack(suite, cache=tmp_path, seed=0, replicate=replicate)
        assert all(haystack.text.startswith(texts[rule], begin) for begin, rule in haystack.rules)
        assert len(haystack.rules) > 2
        for policy in (None, PausePolicy()):
            marker = resolve_marker(tokenizer, policy)
            for cell in cells(suite, identity="", replicate=0, seed=0):
                built = ask(cell, haystack=haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker)
                assert built.rule == "blank_line+glued"
                text = tokenizer.decode(built.ids)
                assert ("deep.<PAUSE>The" in text) == (policy is not None)
                assert ("deep.The" in text) == (policy is None)
                assert "slip.<PAUSE>" not in text


def test_a_needle_that_is_there_already_is_refused_with_the_document(essays_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(essays_dir, tmp_path / "essays")
    told = tmp_path / "essays" / "essay3.txt"
    told.write_text(told.read_text() + "\n" + STOCK.needle.upper().replace(" ", "\n"))
    with pytest.raises(SourceError, match=r"essay3\.txt.*already contains the needle 'The best thing"):
        load_haystack(make_suite(tmp_path / "essays"), cache=tmp_path, seed=0, replicate=0)


def test_a_short_haystack_is_repeated_only_on_request(tokenizer_dir: Path, tmp_path: Path) -> None:
    essays_dir = make_haystack_folder(tmp_path / "essays", num_documents=1)
    tokenizer = ModelTokenizer.load(tokenizer_dir)
    marker = resolve_marker(tokenizer, None)
    lengths = [20_000]
    for repeat in (False, True):
        suite = make_suite(essays_dir, context_tokens=lengths, repeat_haystack=repeat)
        haystack = load_haystack(suite, cache=tmp_path, seed=0, replicate=0)
        [cell, *_] = cells(suite, identity="", replicate=0, seed=0)
        if repeat:
            built = ask(cell, haystack=haystack, suite=suite, tokenizer=tokenizer, policy=None, marker=marker)
            assert built.prompt_tokens == lengths[0]
        else:
            with pytest.raises(TextError, match="repeat_haystack"):
                ask(cell, haystack=haystack, suite=suite, tokenizer=tokenizer, policy=None, marker=marker)


def test_contexts_longer_than_the_model_takes_are_refused_with_the_longest_that_fits(essays_dir: Path) -> None:
    suite = make_suite(essays_dir, max_new_tokens=48)
    check_lengths(suite, limit_tokens=4096 + 48, origin="tiny")
    with pytest.raises(ModelError, match=r"context_tokens 4096 .* at most 4095"):
        check_lengths(suite, limit_tokens=4096 + 47, origin="tiny")
