"""A corpus' sources as work: which files are read together, what comes out of them, and what identifies their content.

Knows files and documents; knows no segment, no token and no Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pause_ray.documents import Document, SourceSpec, in_share, list_files, read_file
from pause_ray.errors import SourceError
from pause_ray.source_files import SourceFile, one_line_errors
from pause_ray.spec import JsonObject
from pause_ray.storage import file_sha256

FILES_PER_READING = 64
"""Consecutive files that one task reads: essays come by the hundred, and a task costs milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Consecutive files of one source, read by one task."""

    number: int
    """Place in the corpus."""
    source: SourceSpec
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class ReadingDocuments:
    """The documents of a reading that are kept, and how many were not; counts are complete after the iteration."""

    reading: Reading
    passed_over: Counter[str] = field(default_factory=Counter)
    """``empty``: without any visible character; ``outside``: not in the source's share."""

    def __iter__(self) -> Iterator[Document]:
        """Documents by file name and row.

        Raises:
            SourceError: a file cannot be read or breaks its format's rules.
        """
        source = self.reading.source
        for file in self.reading.files:
            for document in read_file(file, source):
                if not document.text.strip():
                    self.passed_over["empty"] += 1
                elif not in_share(document, source):
                    self.passed_over["outside"] += 1
                else:
                    yield document


def plan_readings(sources: Sequence[SourceSpec], *, cache: Path) -> list[Reading]:
    """The files of all sources, in order, in groups; packages are fetched into ``cache``.

    Raises:
        SourceError: a source that matches nothing, is out of reach, or has another digest.
    """
    readings: list[Reading] = []
    for source in sources:
        files = list_files(source, cache=cache)
        for begin in range(0, len(files), FILES_PER_READING):
            readings.append(Reading(number=len(readings), source=source, files=files[begin : begin + FILES_PER_READING]))
    return readings


def source_identity(source: SourceSpec) -> JsonObject:
    """What decides which documents a source gives: how it is read, and its content, not the folder it lies in.

    A source with a ``sha256`` is identified by it, and nothing is fetched. Local files are hashed; remote ones go by name,
    size and time of change, because hashing them would mean to download them.

    Raises:
        SourceError: nothing matches, or the place is out of reach.
    """
    how: JsonObject = source.model_dump(mode="json", exclude={"path"})
    if source.path.startswith("pypi:"):
        return {**how, "path": source.path}
    return {**how, "files": [[file.name, _content(file)] for file in list_files(source, cache=Path())]}


def _content(file: SourceFile) -> str:
    if not file.file_system:
        with one_line_errors(file.address):
            status = Path(file.path).stat()
            return _sha256(file.path, status.st_size, status.st_mtime_ns)
    from pyarrow.fs import FileSystem

    with one_line_errors(file.address):
        info = FileSystem.from_uri(file.file_system)[0].get_file_info(file.path)
    return f"{info.size} bytes, changed {info.mtime_ns}"


@lru_cache(maxsize=65_536)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """Of a local file; kept while size and time stay, since a sweep asks once per trial."""
    digest = file_sha256(Path(path))
    if size != Path(path).stat().st_size:
        raise SourceError(f"{path}: changed while it was read; wait until it is written, and run again")
    return digest
