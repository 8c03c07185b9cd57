"""Haystacks are orders of documents that depend on the seed and on nothing else; needles are not in them before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError, SourceError, TextError
from pause_ray.data.documents import Document
from pause_ray.evaluation.haystack import Haystack, ask, check_lengths, load_haystack, prompt_builder
from pause_ray.evaluation.suite import SuiteSpec, ask_for, cells
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import PromptBuilder
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from tests.evaluation.tiny import STOCK, make_haystack_folder, make_suite


def builder_of(haystack: Haystack, suite: SuiteSpec, tokenizer: ModelTokenizer, policy: PausePolicy | None = None) -> PromptBuilder:
    marker = resolve_marker(tokenizer, policy)
    return prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=0)


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
            builder = builder_of(haystack, suite, tokenizer, policy)
            for cell in cells(suite, identity="", replicate=0, seed=0):
                built = ask(cell, builder)
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


def test_a_reference_that_is_there_already_is_told_once_with_the_documents(
    essays_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(essays_dir, tmp_path / "essays")
    for number in (3, 5):
        told = tmp_path / "essays" / f"essay{number}.txt"
        told.write_text(told.read_text() + "\nWe met in DOLORES\nPark once.")
    suite = make_suite(tmp_path / "essays", name="told")
    for replicate in range(2):
        load_haystack(suite, cache=tmp_path, seed=0, replicate=replicate)
    [message] = [record.getMessage() for record in caplog.records]
    assert "'Dolores Park'" in message
    assert "essay3.txt" in message
    assert "and 1 more" in message
    assert "sandwich" not in message


def test_a_short_haystack_is_repeated_only_on_request_and_that_is_said(
    tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    essays_dir = make_haystack_folder(tmp_path / "essays", num_documents=1)
    tokenizer = ModelTokenizer.load(tokenizer_dir)
    lengths = [20_000]
    for repeat in (False, True):
        suite = make_suite(essays_dir, name="short", context_tokens=lengths, repeat_haystack=repeat)
        haystack = load_haystack(suite, cache=tmp_path, seed=0, replicate=0)
        builder = builder_of(haystack, suite, tokenizer)
        [cell, *_] = cells(suite, identity="", replicate=0, seed=0)
        said = [record.getMessage() for record in caplog.records]
        if repeat:
            assert ask(cell, builder).prompt_tokens == lengths[0]
            assert len(said) == 1
            assert f"{len(next(essays_dir.iterdir()).read_text()):,} characters" in said[0]
        else:
            assert not said
            with pytest.raises(TextError, match="repeat_haystack"):
                ask(cell, builder)


def test_noise_is_repeated_in_lines_and_a_fact_is_a_line_of_it(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(tokenizer_dir)
    noise = "The river is slow. The stone is old."
    suite = make_suite(None, noise=f"{noise}\n", context_tokens=[700, 9_000])
    haystack = load_haystack(suite, cache=tmp_path, seed=0, replicate=0)
    assert haystack.document_digests == ()
    for policy in (None, PausePolicy(), PausePolicy(unit="sentence", token="added")):
        builder = builder_of(haystack, suite, tokenizer, policy)
        for cell in cells(suite, identity="", replicate=0, seed=0):
            built = ask(cell, builder)
            assert built.prompt_tokens - built.num_pauses * len(resolve_marker(tokenizer, policy).group_ids) == cell.context_tokens
            context = tokenizer.decode(built.ids[built.prefix_tokens : len(built.ids) - built.suffix_tokens]).replace("<PAUSE>", "")
            *whole, cut = context.split("\n")
            assert set(whole) <= {noise, STOCK.needle}
            assert [*whole, cut].count(STOCK.needle) == 1
            assert noise.startswith(cut) or cut == STOCK.needle


def test_noise_that_has_the_needle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="its noise already contains the needle"):
        load_haystack(make_suite(None, noise=f"So. {STOCK.needle}"), cache=tmp_path, seed=0, replicate=0)


def test_lines_of_a_task_depend_on_seed_and_replicate_and_on_the_length_only_by_where_they_end(tmp_path: Path) -> None:
    def load(seed: int, replicate: int, tokens: int) -> str:
        suite = make_suite(None, task={"kind": "key_value"}, context_tokens=[tokens])
        return load_haystack(suite, cache=tmp_path, seed=seed, replicate=replicate).text

    short, long = load(0, 0, 1_000), load(0, 0, 5_000)
    assert long.startswith(short)
    assert load(0, 0, 1_000) == short
    assert len({load(seed, replicate, 1_000) for seed in range(2) for replicate in range(2)}) == 4


def test_a_pair_among_pairs_is_a_line_at_its_depth(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(tokenizer_dir)
    suite = make_suite(None, task={"kind": "key_value"}, depth_percent=[0, 50, 100], context_tokens=[4_000])
    haystack = load_haystack(suite, cache=tmp_path, seed=0, replicate=0)
    builder = builder_of(haystack, suite, tokenizer)
    for cell in cells(suite, identity="", replicate=0, seed=0):
        built = ask(cell, builder)
        lines = tokenizer.decode(built.ids[built.prefix_tokens : len(built.ids) - built.suffix_tokens]).split("\n")
        place = lines.index(cell.facts[0].text)
        assert haystack.text.startswith("\n".join(lines[:place]))
        assert abs(place - cell.depth_percent / 100 * len(lines)) <= 2
        assert tokenizer.decode(built.ids).endswith(cell.answer_prefix)


def test_a_text_made_for_other_questions_may_have_their_facts(essays_dir: Path, tmp_path: Path) -> None:
    """Only what this replicate hides counts; its questions have a seed of their own."""
    suite = make_suite(essays_dir, task={"kind": "uuid"})
    [fact] = ask_for(suite, seed=7, replicate=0, sample=0).facts
    shutil.copytree(essays_dir, tmp_path / "essays")
    told = tmp_path / "essays" / "essay3.txt"
    told.write_text(f"{told.read_text()}\n{fact.text}")
    suite = make_suite(tmp_path / "essays", task={"kind": "uuid"})
    load_haystack(suite, cache=tmp_path, seed=0, replicate=0, data_seed=8)
    with pytest.raises(SourceError, match=r"essay3\.txt"):
        load_haystack(suite, cache=tmp_path, seed=0, replicate=0, data_seed=7)


def test_contexts_longer_than_the_model_takes_are_refused_with_the_longest_that_fits(essays_dir: Path) -> None:
    suite = make_suite(essays_dir, max_new_tokens=48)
    check_lengths(suite, limit_tokens=4096 + 48, origin="tiny")
    with pytest.raises(ModelError, match=r"context_tokens 4096 .* at most 4095"):
        check_lengths(suite, limit_tokens=4096 + 47, origin="tiny")
