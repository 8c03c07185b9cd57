"""A step's folder exists completely or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
from pathlib import Path

import pytest

from pause_ray.core.errors import StorageError
from pause_ray.core.storage import (
    MANIFEST,
    Storage,
    building,
    exclusive,
    is_complete,
    read_json,
    space_errors,
    whole_file,
    write_json,
    write_text,
)


def test_a_folder_appears_only_with_its_manifest(tmp_path: Path) -> None:
    with building(tmp_path / "step") as scratch:
        (scratch / "data").write_text("x")
        assert not (tmp_path / "step").exists()
        write_json(scratch / MANIFEST, {})
    assert is_complete(tmp_path / "step")
    assert os.listdir(tmp_path) == ["step"]


def test_an_error_while_building_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), building(tmp_path / "step") as scratch:
        (scratch / "data").write_text("x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def _die_while_building(folder: Path) -> None:
    with building(folder) as scratch:
        (scratch / "data").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_build_is_invisible_and_the_next_one_starts_afresh(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(tmp_path / "step",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not is_complete(tmp_path / "step")
    [stale] = tmp_path.glob(".step.*.partial")
    with building(tmp_path / "step") as scratch:
        assert os.listdir(scratch) == []
        assert scratch != stale, "a worker that outlived the killed build would write into this one's files"
        assert not stale.exists()
        write_json(scratch / MANIFEST, {})
    assert is_complete(tmp_path / "step")
    assert os.listdir(tmp_path) == ["step"]


@pytest.mark.parametrize("other", ["model-1.2", "model-1.2-0123abcd", "model", "model-1.20-01234567.partial"])
def test_a_build_leaves_alone_what_is_built_under_a_like_name(tmp_path: Path, other: str) -> None:
    with building(tmp_path / other) as theirs:
        with building(tmp_path / "model-1") as ours:
            write_json(ours / MANIFEST, {})
        assert theirs.exists()
        write_json(theirs / MANIFEST, {})
    assert is_complete(tmp_path / other)


def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"the disk is full; free space"), building(tmp_path / "step"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_really_full_device_is_recognised() -> None:
    with pytest.raises(StorageError, match=r"disk is full"), space_errors(Path("/dev/full")), open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def test_other_errors_are_not_disguised() -> None:
    with pytest.raises(ConnectionResetError), space_errors(Path("x")):
        raise ConnectionResetError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_broken_json_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    write_text(tmp_path / "a.json", content)
    with pytest.raises(StorageError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_a_second_holder_of_a_lock_is_told_who_has_it(tmp_path: Path) -> None:
    with exclusive(tmp_path / ".lock"):
        with pytest.raises(StorageError, match=rf"in use by process {os.getpid()}"), exclusive(tmp_path / ".lock"):
            pass
    with exclusive(tmp_path / ".lock"):
        pass


def _hold(path: Path, held: multiprocessing.synchronize.Event) -> None:
    with exclusive(path):
        held.set()
        signal.pause()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / ".lock", held))
    process.start()
    assert held.wait(120)
    with pytest.raises(StorageError, match=rf"process {process.pid}"), exclusive(tmp_path / ".lock"):
        pass
    process.kill()
    process.join()
    with exclusive(tmp_path / ".lock"):
        pass


def test_a_root_that_cannot_be_written_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"choose another with --storage"):
        Storage.open(tmp_path / "file" / "runs")


def test_a_uri_is_refused_with_the_remedy() -> None:
    with pytest.raises(StorageError, match=r"shared file system"):
        Storage.open("s3://bucket/runs")


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_root_of_another_format_is_refused_in_one_line(difference: int, tmp_path: Path) -> None:
    Storage.open(tmp_path)
    mark = tmp_path / "format.json"
    written = json.loads(mark.read_text())
    Storage.open(tmp_path)
    assert json.loads(mark.read_text()) == written
    mark.write_text(json.dumps({"format": written["format"] + difference, "version": "99.0"}))
    with pytest.raises(StorageError, match=r"written by pause_ray 99\.0.* only; choose an empty folder with --storage") as refused:
        Storage.open(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "new"}'])
def test_a_damaged_mark_of_a_root_is_told_apart_from_a_new_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text(text)
    with pytest.raises(StorageError, match=r"format\.json: does not say which version"):
        Storage.open(tmp_path)


def test_a_root_from_before_there_were_marks_gets_one(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    Storage.open(tmp_path)
    assert (tmp_path / "format.json").is_file()


def test_a_whole_file_does_not_make_the_folder_that_another_machine_has(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "staged" / "a.parquet") as scratch:
        scratch.write_text("x")
    assert os.listdir(tmp_path) == []
