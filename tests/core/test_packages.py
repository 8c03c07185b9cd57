"""Package files: fetched once by pip from a folder of wheels, and every way that can go wrong."""

import hashlib
import logging
import zipfile
from pathlib import Path

import pytest

from pause_ray.core.errors import SourceError, StorageError
from pause_ray.core.files import _pip_error, fetch_package, parse_package_source
from pause_ray.core.storage import MANIFEST, file_sha256

pytestmark = pytest.mark.seconds

ESSAY = "Pauses help.\n"


def build_wheel(folder: Path, *, name: str = "tiny_essays", version: str = "1.0") -> Path:
    """A complete wheel with one text file, as an index would hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/essays/one.txt", ESSAY)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that takes the place of the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def nothing_left(cache: Path) -> bool:
    """Whether the cache holds no file and no folder but locks, which are left in place on purpose."""
    return not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 400


def test_a_package_is_announced_unpacked_once_and_needs_no_index_afterwards(index, tmp_path, caplog):
    wheel = build_wheel(index)
    digest = file_sha256(wheel)
    with caplog.at_level(logging.INFO, logger="pause_ray"):
        first = fetch_package("tiny_essays==1.0", wheel_sha256=digest, cache=tmp_path / "cache")
    assert "tiny_essays==1.0" in caplog.text
    assert (first / "tiny_essays" / "essays" / "one.txt").read_text() == ESSAY
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".whl", ".partial")]
    wheel.unlink()
    assert fetch_package("tiny_essays==1.0", wheel_sha256=digest, cache=tmp_path / "cache") == first
    with pytest.raises(SourceError, match="sha256"):
        fetch_package("tiny_essays==1.0", wheel_sha256="0" * 64, cache=tmp_path / "cache")


def test_a_wrong_digest_names_both_and_leaves_nothing(index, tmp_path):
    wheel = build_wheel(index)
    expected = "0" * 64
    with pytest.raises(SourceError) as error:
        fetch_package("tiny_essays==1.0", wheel_sha256=expected, cache=tmp_path / "cache")
    assert expected in str(error.value)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(error.value)
    assert "\n" not in str(error.value)
    assert nothing_left(tmp_path / "cache")


@pytest.mark.parametrize(("kept", "pinned"), [(0.3, False), (0.9, True)], ids=["early_without_digest", "late_with_digest"])
def test_a_truncated_wheel_is_one_line_and_leaves_nothing(index, tmp_path, kept, pinned):
    wheel = build_wheel(index)
    whole = wheel.read_bytes()
    digest = file_sha256(wheel) if pinned else None
    wheel.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(SourceError) as error:
        fetch_package("tiny_essays==1.0", wheel_sha256=digest, cache=tmp_path / "cache")
    assert_one_line(error.value)
    assert nothing_left(tmp_path / "cache")
    wheel.write_bytes(whole)
    assert fetch_package("tiny_essays==1.0", wheel_sha256=digest, cache=tmp_path / "cache").is_dir()


def test_a_wheel_with_a_damaged_member_leaves_nothing(index, tmp_path):
    wheel = build_wheel(index)
    content = bytearray(wheel.read_bytes())
    content[content.index(ESSAY.encode())] ^= 0xFF
    wheel.write_bytes(content)
    with pytest.raises(SourceError, match="damaged") as error:
        fetch_package("tiny_essays==1.0", wheel_sha256=None, cache=tmp_path / "cache")
    assert_one_line(error.value)
    assert nothing_left(tmp_path / "cache")


def test_a_folder_without_manifest_is_fetched_anew(index, tmp_path):
    build_wheel(index)
    folder = fetch_package("tiny_essays==1.0", wheel_sha256=None, cache=tmp_path / "cache")
    (folder.parent / MANIFEST).unlink()
    (folder / "tiny_essays" / "essays" / "one.txt").write_text("half of it")
    again = fetch_package("tiny_essays==1.0", wheel_sha256=None, cache=tmp_path / "cache")
    assert (again / "tiny_essays" / "essays" / "one.txt").read_text() == ESSAY


def test_a_version_that_the_index_does_not_have_is_one_line(index, tmp_path):
    build_wheel(index)
    with pytest.raises(SourceError, match=r"tiny_essays==2\.0.*no such version") as error:
        fetch_package("tiny_essays==2.0", wheel_sha256=None, cache=tmp_path / "cache")
    assert_one_line(error.value)
    assert nothing_left(tmp_path / "cache")


def test_an_index_out_of_reach_is_not_called_an_unknown_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match="cannot be reached") as error:
        fetch_package("tiny_essays==1.0", wheel_sha256=None, cache=tmp_path / "cache")
    assert_one_line(error.value)
    assert nothing_left(tmp_path / "cache")


def test_a_full_disk_in_pip_is_a_storage_error():
    error = _pip_error("x==1", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    assert isinstance(error, StorageError)
    assert "disk is full" in str(error)


@pytest.mark.parametrize(
    "requirement", ["tiny", "tiny>=1", "tiny==", "tiny==1.*", "tiny==1 --index-url=http://evil", "-r==1", "../x==1", ""]
)
def test_only_one_exact_version_is_a_requirement(requirement, tmp_path):
    with pytest.raises(SourceError, match="exact version"):
        fetch_package(requirement, wheel_sha256=None, cache=tmp_path)


def test_a_package_source_splits_into_requirement_and_path():
    assert parse_package_source("pypi:a-b.c==1.2.3#x/*.txt") == ("a-b.c==1.2.3", "x/*.txt")


@pytest.mark.parametrize(
    "source", ["pypi:a==1", "pypi:a==1#", "a==1#x", "pypi:a#x", "pypi:a==1#../x", "pypi:a==1#/etc/passwd", "pypi:a==1#x/../../y"]
)
def test_a_package_source_without_version_or_path_or_outside_the_package_is_refused(source):
    with pytest.raises(SourceError):
        parse_package_source(source)
