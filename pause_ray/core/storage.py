"""Folders that exist completely or not at all, locks, and atomic files under one storage root.

Every step writes into a scratch folder and is renamed when its ``manifest.json`` is there, so a folder without a
manifest does not exist. The root is a path that every node of a cluster sees, on a file system that can lock, append and
rename (NFS, EFS, Filestore, Lustre; not a mounted bucket). It knows nothing of what the folders mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pause_ray import __version__
from pause_ray.core.errors import PauseRayError, StorageError

MANIFEST = "manifest.json"
ROOT_FORMAT = 2
"""Version of the root's layout: its folders and the meaning of their files. Raised when another version would misread or harm a root.
What only decides a result has versions of its own, inside digests."""
FORMAT_FILE = "format.json"


@dataclass(frozen=True)
class Storage:
    """The storage root and its folders."""

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> Storage:
        """Create the root if needed and try to write in it.

        Raises:
            StorageError: the root is a URI, is not a folder, cannot be written, or has another format.
        """
        if "://" in str(root):
            raise StorageError(f"storage root {root}: must be a path that every node sees, not a URI; use a shared file system such as NFS")
        path = Path(root).expanduser().absolute()
        probe = path / f".write-probe-{os.getpid()}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise StorageError(f"storage root {path}: cannot be written ({error.strerror}); choose another with --storage") from error
        _check_format(path)
        return cls(path)

    @property
    def cache(self) -> Path:
        """The folder of packages, hub snapshots and converted models; ``PAUSE_RAY_CACHE`` puts it elsewhere."""
        return Path(os.environ.get("PAUSE_RAY_CACHE") or self.root / "cache").expanduser().absolute()

    @property
    def shards(self) -> Path:
        """The folder of shard sets, by digest."""
        return self.root / "shards"

    @property
    def checkpoints(self) -> Path:
        """The folder of adapters, by digest."""
        return self.root / "checkpoints"

    @property
    def trials(self) -> Path:
        """The folder of ledgers, by trial digest."""
        return self.root / "trials"

    @property
    def sweeps(self) -> Path:
        """The folder of reports and trial lists, by sweep name and digest."""
        return self.root / "sweeps"


def _check_format(root: Path) -> None:
    """Mark a root without a mark, and refuse one of another format."""
    mark = root / FORMAT_FILE
    if not mark.exists():
        write_json(mark, {"format": ROOT_FORMAT, "version": __version__})
        return
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        written, version = int(found["format"]), str(found["version"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{mark}: does not say which version wrote this storage root ({error}); remove this one file") from error
    if written != ROOT_FORMAT:
        raise StorageError(
            f"storage root {root}: has format {written} (written by pause_ray {version}), and pause_ray {__version__} reads and writes "
            f"format {ROOT_FORMAT} only; choose an empty folder with --storage, or use the version that wrote it"
        )


def is_complete(folder: Path) -> bool:
    """Return whether a step's folder was finished."""
    return (folder / MANIFEST).is_file()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        StorageError: missing or not JSON.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as JSON ({error}); remove its folder and run again") from error
    if not isinstance(data, dict):
        raise StorageError(f"{path}: holds no JSON object; remove its folder and run again")
    return data


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects, one per line, of a file that may still be growing; an unfinished last line is ignored, a missing file is empty.

    Raises:
        StorageError: a line holds no JSON object.
    """
    try:
        complete, _, _ = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise StorageError(f"{path}: line {number} holds no JSON object; remove the line and run again")
        found.append(row)
    return found


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a scratch file that becomes ``path`` when the block ends well; readers and other writers never see a part of it.

    The folder must exist: made here, it would hide that a node does not see the storage root.

    Raises:
        StorageError: the disk is full or not writable.
    """
    scratch = _scratch_path(path)
    with space_errors(path):
        try:
            yield scratch
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file with ``whole_file``, on the disk itself and not only in the system's memory.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with space_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON with ``write_text``."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a ``StorageError`` that says what to do; other errors pass."""
    try:
        yield
    except PauseRayError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{path}: the disk is full; free space and run the same command again, finished work is kept") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(
                f"{path}: cannot be written ({os.strerror(number)}); choose another folder, or another root with --storage"
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """Return the operating system's error number, from an OSError or from the message of a Rust error of tokenizers or safetensors."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def exclusive(path: Path, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` while inside; the kernel frees it when the process dies, however it dies.

    Args:
        path: Lock file; made if missing, left in place.
        waiting: Called once with the holder's name when another process has the lock; then this waits. Without it,
            a held lock is an error.

    Raises:
        StorageError: another process holds the lock and ``waiting`` is None.
    """
    with space_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        if not _locked(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if waiting is None:
                raise StorageError(f"{path.parent}: in use by {holder}; wait for it to end, or stop it, and run again") from None
            waiting(holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        with space_errors(path):
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    """Try to take the file's lock. It tries twice, since a process that only asks for the holder has the lock for an instant."""
    for pause_seconds in (0.05, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause_seconds)
        else:
            return True
    return False


def holder_of(path: Path) -> str | None:
    """Return the holder of the lock file ``path`` as ``exclusive`` names it; None if nobody holds it, or this node cannot tell."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes ``folder`` if the block ends well and leaves nothing if it does not.

    The block must write ``manifest.json`` last. Hold ``exclusive`` on the folder's lock around this. The scratch folder's
    name is this build's own: workers of a killed one may live on for a while, and must not write into its successor's.
    """
    stale = re.compile(rf"\.{re.escape(folder.name)}\.\d+-[0-9a-f]{{8}}\.partial")  # not the scratch folders of a similar name
    for path in folder.parent.glob(".*.partial"):
        if stale.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    scratch = _scratch_path(folder)
    with space_errors(folder):
        try:
            scratch.mkdir(parents=True)
            yield scratch
            if not is_complete(scratch):
                raise AssertionError(f"{folder}: a step ended without writing {MANIFEST}")
            if folder.exists():
                shutil.rmtree(folder)
            scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def lock_of(folder: Path) -> Path:
    """Return the lock file beside a step's folder."""
    return folder.with_name(f".{folder.name}.lock")
