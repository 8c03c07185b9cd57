"""Sources and staged chunks: a place in the corpus is the same place however the corpus was cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.errors import SourceError
from pause_ray.data import transforms
from pause_ray.data.documents import Document, SourceSpec, read_documents, source_identity
from pause_ray.data.shards import DOCUMENTS, document_statistics, overlapping_documents
from pause_ray.data.staging import Chunk, StagedCorpus, cut_into_chunks, held_out_from, stage_chunk, write_document_list
from pause_ray.data.transforms import plan_read_tasks, read_chunks

TALES = [
    Document(id=f"tale-{number}", text=f"Tale {number} begins. " + f"It goes on for {number} days. " * number + "\n\nIt ends.")
    for number in range(30)
]


def staged(folder: Path, *, chunk_chars: int) -> tuple[Path, list[Chunk]]:
    folder.mkdir()
    chunks = [
        stage_chunk(folder, name=f"{number:03d}.parquet", documents=chunk, policy=None)
        for number, chunk in enumerate(cut_into_chunks(TALES, chunk_chars=chunk_chars))
    ]
    return folder, chunks


@pytest.mark.parametrize("chunk_chars", [1, 1000, 10**6])
def test_reading_from_a_place_gives_the_whole_corpus_once_around(tmp_path: Path, chunk_chars: int) -> None:
    corpus = StagedCorpus(*staged(tmp_path / "staged", chunk_chars=chunk_chars))
    whole = "".join(tale.text for tale in TALES)
    for start in (0.0, 0.25, 0.5, 0.999999):
        read = "".join(span.text for span in corpus.read_from(start))
        begin = (whole + whole).index(read)
        assert len(read) == len(whole)
        assert begin <= start * len(whole)
        sentence = read[: int(start * len(whole)) - begin + 1]
        assert not any(end in sentence for end in (". ", ".\n")), "the place lies in the first sentence"


def test_a_place_does_not_depend_on_the_pieces(tmp_path: Path) -> None:
    shelves = [StagedCorpus(*staged(tmp_path / str(chars), chunk_chars=chars)) for chars in (300, 2000, 10**6)]
    for start in (0.01, 0.37, 0.75):
        tasks = [list(corpus.read_from(start)) for corpus in shelves]
        assert tasks[0] == tasks[1] == tasks[2]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.45])
@pytest.mark.parametrize("chunk_chars", [300, 10**6])
def test_the_held_out_text_begins_with_a_sentence_and_nothing_is_read_across(tmp_path: Path, share: float, chunk_chars: int) -> None:
    folder, chunks = staged(tmp_path / "staged", chunk_chars=chunk_chars)
    whole = "".join(tale.text for tale in TALES)
    border = held_out_from(StagedCorpus(folder, chunks), num_chars=len(whole), share=share, least_chars=10)
    assert len(whole) - border >= share * len(whole)
    assert whole[border:].startswith(("Tale", "It"))
    for begin, end in ((0, border), (border, len(whole))):
        part = whole[begin:end]
        for start in (0.0, 0.4, 0.999999):
            read = "".join(span.text for span in StagedCorpus(folder, chunks, begin=begin, end=end).read_from(start))
            assert len(read) == len(part)
            assert read in part + part


def test_more_than_half_of_the_text_is_not_held_out(tmp_path: Path) -> None:
    corpus = StagedCorpus(*staged(tmp_path / "staged", chunk_chars=1000))
    with pytest.raises(SourceError, match=r"validation_rows need about 6\d\d characters .* has 1,000"):
        held_out_from(corpus, num_chars=1000, share=0.1, least_chars=600)


def test_a_sentence_that_is_most_of_the_text_leaves_none_to_train_on(tmp_path: Path) -> None:
    text = "And then, " * 1000
    chunk = stage_chunk(tmp_path, name="0.parquet", documents=[Document(id="a", text=text)], policy=None)
    with pytest.raises(SourceError, match=r"validation_rows need about 10,000 characters .* has 10,000"):
        held_out_from(StagedCorpus(tmp_path, [chunk]), num_chars=len(text), share=0.1, least_chars=10)


def test_the_list_of_documents_tells_what_the_corpus_is(tmp_path: Path) -> None:
    folder, chunks = staged(tmp_path / "staged", chunk_chars=500)
    write_document_list(folder, chunks, to=tmp_path / DOCUMENTS)
    found = document_statistics(tmp_path / DOCUMENTS)
    assert len(chunks) > 3
    assert found["documents"] == found["distinct_documents"] == len(TALES)
    assert sum(chunk.num_chars for chunk in chunks) == found["chars"] == sum(len(tale.text) for tale in TALES)
    assert found["documents_by_paragraph_rule"] == {"blank_line": len(TALES)}
    assert found["paragraphs"] == 2 * len(TALES)
    assert found["sentences"] == sum(2 + number for number in range(len(TALES)))
    digests = frozenset({TALES[7].digest, TALES[3].digest, "0" * 16})
    assert overlapping_documents(tmp_path / DOCUMENTS, digests) == ["tale-3", "tale-7"]


def test_a_long_sentence_is_read_from_its_beginning(tmp_path: Path) -> None:
    text = "First. And so " + "and then " * 2000 + "the end."
    chunk = stage_chunk(tmp_path, name="0.parquet", documents=[Document(id="a", text=text)], policy=None)
    first = next(iter(StagedCorpus(tmp_path, [chunk]).read_from(0.9)))
    assert first.text == text.removeprefix("First. ")


def test_readings_give_the_documents_of_read_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text(f"Text {number}." if number != 2 else " \n")
    source = SourceSpec(path=str(tmp_path), to_percent=60)
    expected = list(read_documents(source, cache=tmp_path))
    assert 0 < len(expected) < 6
    for files in (1, 3, 64):
        monkeypatch.setattr(transforms, "FILES_PER_TASK", files)
        read = [list(read_chunks(item)) for item in plan_read_tasks([source], cache=tmp_path)]
        found = [document for *chunks, _ in read for chunk in chunks for document in chunk["documents"]]
        assert found == expected
        assert sum(chunks[-1]["counts"]["empty"] for chunks in read) == 1
        assert sum(chunks[-1]["counts"]["outside"] for chunks in read) == 6 - len(expected)
        assert sum(chunks[-1]["counts"]["kept"] for chunks in read) == len(expected)


def test_a_source_is_its_content_and_how_it_is_read_not_its_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("One text.")
    here, there = (source_identity(SourceSpec(path=str(tmp_path / name))) for name in ("here", "there"))
    assert here == there
    assert source_identity(SourceSpec(path=str(tmp_path / "here"), to_percent=50)) != here
    (tmp_path / "here" / "a.txt").write_text("One Text.")
    assert source_identity(SourceSpec(path=str(tmp_path / "here"))) != here
    (tmp_path / "there" / "b.txt").write_text("Another text.")
    assert source_identity(SourceSpec(path=str(tmp_path / "there"))) != there


def test_a_package_is_identified_without_fetching_it() -> None:
    source = SourceSpec(path="pypi:no-such-package==1.0#*.txt", sha256="0" * 64)
    other = SourceSpec(path="pypi:no-such-package==1.0#*.txt", sha256="1" * 64)
    assert source_identity(source) != source_identity(other)
