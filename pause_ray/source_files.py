"""Files by path, folder, glob or bucket address, and their text. Knows pyarrow's file systems; knows no format and no document."""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import hashlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pause_ray.errors import SourceError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.fs import FileSystem

_COMPRESSED = (".gz", ".bz2", ".zst")
_READ_BYTES = 1 << 20
_GCS_PATIENCE = "retry_limit_seconds=30"  # without it, a bucket out of reach is retried for 15 minutes


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file: where it lies and what it is called there."""

    name: str
    """Path below the folder that was asked for: part of document ids, so the same on every machine."""
    address: str
    """Full path or URI, for messages."""
    path: str
    """Path on its file system."""
    file_system: str = ""
    """URI that the file system is made from; empty for local files."""

    @property
    def ending(self) -> str:
        """``.csv`` of ``essays.csv`` and of ``essays.csv.gz``, in small letters."""
        path = PurePosixPath(self.name.lower())
        return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def find_files(pattern: str, *, endings: Set[str]) -> tuple[SourceFile, ...]:
    """The files that a path, folder or glob stands for, by name; none is opened.

    Names that begin with a dot are passed over unless the glob asks for them.

    Args:
        pattern: Local, or ``s3://``, ``gs://``, ``file://``; in a URI, a question mark begins the file system's options
            (``?endpoint_override=http://localhost:9000``) and is no wildcard.
        endings: For a folder, the endings that are taken.

    Raises:
        SourceError: unknown kind of address, or a place out of reach.
    """
    with one_line_errors(pattern):
        file_system, uri, path = _connect(pattern)
        folder, paths = _matches(file_system, path)
    scheme = uri.partition("://")[0] + "://" if uri else ""
    files = [
        SourceFile(name=found.removeprefix(folder).lstrip("/"), address=scheme + found, path=found, file_system=uri) for found in set(paths)
    ]
    whole_folder = folder == path
    return tuple(sorted((file for file in files if not whole_folder or file.ending in endings), key=lambda file: file.name))


def is_seen(pattern: str) -> bool:
    """Whether a file or folder, or the folder that a glob begins with, can be seen from this machine.

    Args:
        pattern: As of ``find_files``.

    Raises:
        SourceError: unknown kind of address, or a place out of reach.
    """
    from pyarrow.fs import FileType

    with one_line_errors(pattern):
        file_system, _, path = _connect(pattern)
        return any(file_system.get_file_info(place).type != FileType.NotFound for place in {path, _split_glob(path)[0]})


def check_sha256(file: SourceFile, expected: str) -> None:
    """Refuse a file whose bytes, as they are stored, have another digest.

    Raises:
        SourceError: naming both digests.
    """
    sha256 = hashlib.sha256()
    with one_line_errors(file.address), _opened(file).open_input_stream(file.path, compression=None) as stream:
        while block := stream.read(_READ_BYTES):
            sha256.update(block)
    found = sha256.hexdigest()
    if found != expected:
        raise SourceError(f"{file.address}: its sha256 is {found}, the spec says {expected}; fetch the file anew or correct the spec")


def decoded(file: SourceFile, *, encoding: str) -> Iterator[str]:
    """The file's text in pieces, exactly: line ends stay as they are, only a leading byte order mark goes.

    Raises:
        SourceError: bytes that are not ``encoding``, naming the first one and its offset (after unpacking .gz, .bz2, .zst).
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    num_bytes = 0
    at_start = True
    with one_line_errors(file.address), _opened(file).open_input_stream(file.path) as stream:
        while True:
            block = stream.read(_READ_BYTES)
            num_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                wrong = error.object[error.start : error.start + 1].hex()
                offset = num_bytes - num_pending + error.start
                remedy = "set encoding, or convert the file to UTF-8"
                raise SourceError(f"{file.address}: byte 0x{wrong} at offset {offset} is not {encoding}; {remedy}") from error
            num_bytes += len(block)
            if text and at_start:
                text, at_start = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return


def lines(pieces: Iterator[str]) -> Iterator[str]:
    """Lines with their ends; only a newline ends one, since other separators occur inside JSON and CSV values."""
    started: list[str] = []
    for piece in pieces:
        *whole, last = piece.split("\n")
        for line in whole:
            yield "".join([*started, line, "\n"])
            started = []
        started.append(last)
    if any(started):
        yield "".join(started)


@contextlib.contextmanager
def random_access(file: SourceFile) -> Iterator[pyarrow.NativeFile]:
    """The open file, for formats that jump about in it."""
    with one_line_errors(file.address), _opened(file).open_input_file(file.path) as opened:
        yield opened


@contextlib.contextmanager
def one_line_errors(address: str) -> Iterator[None]:
    """Errors of file systems and of Arrow's readers as one line; their own messages run over many."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise SourceError(f"{address}: cannot be read ({reason[:240]}); check path, access and that the file is whole") from error


def _opened(file: SourceFile) -> FileSystem:
    from pyarrow.fs import FileSystem, LocalFileSystem

    return FileSystem.from_uri(file.file_system)[0] if file.file_system else LocalFileSystem()


def _connect(address: str) -> tuple[FileSystem, str, str]:
    """File system, the URI that it is made from (empty: local), and the path or glob on it."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    scheme, separator, rest = address.partition("://")
    if not separator:
        return LocalFileSystem(), "", str(Path(address).expanduser().absolute())
    if scheme in ("http", "https"):
        raise SourceError(f"{address}: web addresses are not read; download the file, or put it in a bucket (s3://, gs://)")
    place, _, options = rest.partition("?")
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in options:
        options = "&".join(filter(None, [options, _GCS_PATIENCE]))
    bucket, slash, path = place.partition("/")
    # only the bucket goes through the URI parser: keys may hold spaces and percent signs
    uri = f"{scheme}://{bucket or '/'}" + (f"?{options}" if options else "")
    file_system, root = FileSystem.from_uri(uri)
    return file_system, uri, (root.rstrip("/") + slash + path).rstrip("/")


def _matches(file_system: FileSystem, path: str) -> tuple[str, list[str]]:
    """The folder that names are relative to, and the paths of the files; a path that exists is never taken for a glob."""
    from pyarrow.fs import FileType

    kind = file_system.get_file_info(path).type
    if kind == FileType.File:
        return path.rpartition("/")[0], [path]
    if kind == FileType.Directory:
        return path, list(_walk(file_system, path, ["**", "*"]))
    folder, segments = _split_glob(path)
    if not segments:
        return path.rpartition("/")[0], []
    return folder, list(_walk(file_system, folder, segments))


def _split_glob(path: str) -> tuple[str, list[str]]:
    """The folder that a glob begins with, and its segments; of a path without wildcards the path, and none."""
    parts = path.split("/")
    first = next((index for index, part in enumerate(parts) if any(character in part for character in "*?[")), len(parts))
    return "/".join(parts[:first]), parts[first:]


def _walk(file_system: FileSystem, folder: str, segments: list[str]) -> Iterator[str]:
    """Files below ``folder`` that match the glob's segments, level by level; ``**`` stands for any number of folders."""
    from pyarrow.fs import FileSelector, FileType

    head, rest = segments[0], segments[1:]
    if head == "**":
        yield from _walk(file_system, folder, rest or ["*"])
    for info in file_system.get_file_info(FileSelector(folder, allow_not_found=True)):
        hidden = info.base_name.startswith(".") and not head.startswith(".")
        if hidden or not fnmatch.fnmatchcase(info.base_name, "*" if head == "**" else head):
            continue
        if info.type == FileType.Directory and (rest or head == "**"):
            yield from _walk(file_system, info.path, segments if head == "**" else rest)
        elif info.type == FileType.File and not rest and head != "**":
            yield info.path
