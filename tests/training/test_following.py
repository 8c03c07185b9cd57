"""What a launcher does beside a training: it reads the growing log on, and says when another process has to be waited for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pause_ray.core.errors import StoppedError
from pause_ray.core.storage import Storage, exclusive, lock_of, write_text
from pause_ray.training.launch import fit, train_digest
from pause_ray.training.metrics import TrainingLogReader, following
from pause_ray.training.spec import TrainJob, TrainSpec
from tests.training.tiny_llama import make_rows, make_shards


def lines(*steps: int, note: str = "") -> str:
    return "".join(json.dumps({"step": step, "note": note}) + "\n" for step in steps)


def steps_of(growing: TrainingLogReader) -> list[int]:
    return [row["step"] for row in growing.new_rows()]


def test_every_row_is_given_once_and_none_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    growing = TrainingLogReader(path)
    assert steps_of(growing) == []
    write_text(path, lines(1, 2))
    assert steps_of(growing) == [1, 2]
    with path.open("a") as file:
        for part, expected in ((lines(3)[:-4], []), (lines(3)[-4:] + lines(4), [3, 4]), ("", [])):
            file.write(part)
            file.flush()
            assert steps_of(growing) == expected


def test_a_row_that_was_read_is_not_parsed_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    growing = TrainingLogReader(path)
    write_text(path, lines(1, 2))
    assert steps_of(growing) == [1, 2]
    with path.open("r+") as file:
        file.write("?" * (len(lines(1)) - 1))
        file.seek(0, 2)
        file.write(lines(3))
    assert steps_of(growing) == [3]


@pytest.mark.parametrize("note", ["", "rows of another length"])
def test_steps_that_are_taken_again_are_not_told_again(tmp_path: Path, note: str) -> None:
    path = tmp_path / "log"
    growing = TrainingLogReader(path)
    write_text(path, lines(1, 2, 3, 4))
    assert steps_of(growing) == [1, 2, 3, 4]
    write_text(path, lines(1, 2, note=note))
    assert steps_of(growing) == []
    with path.open("a") as file:
        file.write(lines(3, 4, 5, note=note))
    assert steps_of(growing) == [5]


def test_rows_that_come_last_are_told_before_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with following(tmp_path / "log", steps=2, progress=lambda done, total, row: told.append((done, total))) as reports:
        write_text(tmp_path / "log", lines(1, 2))
    assert (told, reports.exception()) == ([(1, 2), (2, 2)], None)


def test_who_waits_for_the_same_training_says_so_and_can_leave(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "runs")
    job = TrainJob(
        train=TrainSpec.parse({"zero": {"stage": 0}}, origin="test"),
        model_dir=tmp_path,
        base_digest="a",
        shards=make_shards(tmp_path / "shards", make_rows(4)),
        marker=None,
        policy=None,
        seed=0,
        threads=None,
    )

    def stage(name: str) -> None:
        raise StoppedError(f"heard {name}")

    with exclusive(lock_of(storage.checkpoints / train_digest(job))), pytest.raises(StoppedError, match="heard waiting"):
        fit(job, storage=storage, num_workers=0, cpus_per_worker=1, gpus_per_worker=0, progress=lambda *_: None, stage=stage)
