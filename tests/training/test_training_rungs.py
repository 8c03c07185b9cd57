"""Adapters that a training leaves on its way: whole checkpoints, what the training was then, and no part of what it becomes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from pause_ray.core.errors import StoppedError
from pause_ray.core.storage import Storage, is_complete
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, STATE_TENSORS, Checkpoint, RunningTraining, rung_folder, training_folder
from pause_ray.training.launch import TrainJob, fit, train_digest
from pause_ray.training.spec import LoraSpec, TrainSpec
from tests.training.tiny_llama import added_marker

pytestmark = pytest.mark.torch


def job_of(llama: Path, shards: Path, **changes: Any) -> TrainJob:
    settings = {
        "max_steps": 6,
        "micro_batch_size": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "precision": "float32",
        "checkpoint_every": 2,
    }
    return TrainJob(
        train=TrainSpec(lora=LoraSpec(rank=4, alpha=4), **(settings | changes)),
        model_dir=llama,
        base_digest="tiny",
        shards=shards,
        marker=added_marker(llama),
        policy=None,
        seed=0,
        threads=1,
    )


def run(
    job: TrainJob, root: Path, *, rungs: Sequence[int] = (), stop: threading.Event | None = None, progress: Any = lambda *_: None
) -> Checkpoint:
    return fit(
        job, storage=Storage.open(root), num_workers=0, cpus_per_worker=1, gpus_per_worker=0, progress=progress, rungs=rungs, stop=stop
    )


def folder_of(job: TrainJob, root: Path) -> Path:
    return training_folder(Storage.open(root).checkpoints / train_digest(job))


def test_a_rung_is_a_whole_checkpoint_of_what_the_training_was_then(llama: Path, shards: Path, tmp_path: Path) -> None:
    job, held = job_of(llama, shards, keep_checkpoints=9), {}
    training = folder_of(job, tmp_path)

    def look(done: int, total: int, row: object) -> None:
        saved = training / "step-2" / STATE_TENSORS
        if saved.exists():
            held["state"] = safetensors.torch.load_file(saved)

    finished = run(job, tmp_path, rungs=(2, 5), progress=look)
    for step in (2, 5):
        rung = Checkpoint.open(rung_folder(training, step=step))
        rung.check_fits(base_digest="tiny", tokenizer_digest=finished.tokenizer_digest, marker=added_marker(llama))
        assert rung.num_steps == step
        assert rung.losses() == finished.losses()[:step]
        assert rung.document_digests == finished.document_digests
        assert rung.spec == finished.spec
    early, late = (safetensors.torch.load_file(rung_folder(training, step=step) / ADAPTER_WEIGHTS) for step in (2, 5))
    masters = {
        name.removeprefix("master/").replace(".default", ""): part for name, part in held["state"].items() if name.startswith("master/")
    }
    same = [name for name in early if name in masters]
    assert [name for name in same if "lora_B" in name]
    assert all(early[name].equal(masters[name]) for name in same)
    assert not any(early[name].equal(late[name]) for name in early if "lora_B" in name)


def test_rungs_change_neither_the_digest_nor_the_adapter(llama: Path, shards: Path, tmp_path: Path) -> None:
    job = job_of(llama, shards)
    with_rungs, without = run(job, tmp_path / "a", rungs=(1, 3)), run(job, tmp_path / "b")
    assert with_rungs.folder.name == without.folder.name
    assert (with_rungs.folder / ADAPTER_WEIGHTS).read_bytes() == (without.folder / ADAPTER_WEIGHTS).read_bytes()


def test_rungs_stay_until_the_training_is_asked_for_without(llama: Path, shards: Path, tmp_path: Path) -> None:
    job = job_of(llama, shards, checkpoint_every=1, keep_checkpoints=1)
    training = folder_of(job, tmp_path)
    for _ in range(2):
        run(job, tmp_path, rungs=(2,))
        assert [path.name for path in training.iterdir()] == ["rung-2"]
    run(job, tmp_path)
    assert not training.exists()


def test_a_training_in_a_thread_ends_when_it_is_asked_to_and_goes_on(llama: Path, shards: Path, tmp_path: Path) -> None:
    job, stop, raised = job_of(llama, shards, max_steps=400, checkpoint_every=None), threading.Event(), list[Exception]()

    def train() -> None:
        try:
            run(job, tmp_path, rungs=(1,), stop=stop, progress=lambda done, *_: stop.set() if done >= 2 else None)
        except StoppedError as error:
            raised.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(240)
    assert not thread.is_alive()
    assert raised
    training = RunningTraining(folder=folder_of(job, tmp_path), belongs_to={})
    reached = training.last_step()
    assert 2 <= reached < 400
    rung = rung_folder(training.folder, step=1)
    written = (rung / ADAPTER_WEIGHTS).stat().st_mtime_ns
    steps: list[int] = []
    ends = threading.Event()
    with pytest.raises(StoppedError):
        run(job, tmp_path, rungs=(1,), stop=ends, progress=lambda done, *_: (steps.append(done), ends.set() if done > reached else None))
    assert training.last_step() > reached
    assert is_complete(rung)
    assert (rung / ADAPTER_WEIGHTS).stat().st_mtime_ns == written, "a rung that was there was written again"


def test_a_training_that_shall_not_begin_leaves_nothing(llama: Path, shards: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError, match="before it began"):
        run(job_of(llama, shards), tmp_path, stop=stop)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
