"""Training up to a step: a whole checkpoint of the adapter there, and an end that equals that of an uninterrupted training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import StoppedError
from pause_ray.core.process import Stage
from pause_ray.core.storage import Storage
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, Checkpoint, training_folder
from pause_ray.training.launch import fit, steps_on_storage, train_digest
from pause_ray.training.spec import LoraSpec, TrainJob, TrainSpec
from tests.training.tiny_llama import added_marker

pytestmark = pytest.mark.torch


def job_of(llama: Path, shards: Path) -> TrainJob:
    train = TrainSpec(
        lora=LoraSpec(rank=4, alpha=4), max_steps=6, micro_batch_size=2, warmup_steps=1, learning_rate=1e-2, precision="float32"
    )
    return TrainJob(
        train=train, model_dir=llama, base_digest="tiny", shards=shards, marker=added_marker(llama), policy=None, seed=0, threads=1
    )


def run(job: TrainJob, root: Path, **options: Any) -> Checkpoint:
    options = {"progress": lambda *_: None} | options
    return fit(job, storage=Storage.open(root), num_workers=0, cpus_per_worker=1, gpus_per_worker=0, **options)


def losses(checkpoint: Checkpoint) -> list[float]:
    return [row["loss"] for row in checkpoint.losses()]


def weights(checkpoint: Checkpoint) -> bytes:
    return (checkpoint.folder / ADAPTER_WEIGHTS).read_bytes()


def test_a_training_in_parts_gives_the_adapter_of_an_uninterrupted_one(llama: Path, shards: Path, tmp_path: Path) -> None:
    job = job_of(llama, shards)
    expected = run(job, tmp_path / "whole")
    training = training_folder(tmp_path / "parts" / "checkpoints" / train_digest(job))
    first = run(job, tmp_path / "parts", until=2)
    first.check_fits(base_digest="tiny", tokenizer_digest=expected.tokenizer_digest, marker=added_marker(llama))
    assert (first.num_steps, losses(first)) == (2, losses(expected)[:2])
    assert (first.document_digests, first.spec) == (expected.document_digests, expected.spec)
    first_weights = weights(first)
    steps: list[int] = []
    again = run(job, tmp_path / "parts", until=1, progress=lambda done, *_: steps.append(done))
    assert (again.num_steps, weights(again), steps) == (2, first_weights, []), "a training does not go back"
    (first.folder / "manifest.json").unlink()  # as if the process had died between the checkpoint and the adapter
    assert weights(run(job, tmp_path / "parts", until=2)) == first_weights
    second = run(job, tmp_path / "parts", until=5)
    assert (second.num_steps, losses(second)) == (5, losses(expected)[:5])
    assert weights(second) not in {first_weights, weights(expected)}
    whole = run(job, tmp_path / "parts")
    assert (whole.folder.name, weights(whole), losses(whole)) == (expected.folder.name, weights(expected), losses(expected))
    assert not training.exists()
    assert not second.folder.exists()
    assert run(job, tmp_path / "parts", until=2).folder == whole.folder, "a finished training gives its last adapter"


def test_a_training_that_shall_not_begin_leaves_nothing(llama: Path, shards: Path, tmp_path: Path) -> None:
    def stage(name: Stage) -> None:
        raise StoppedError(f"not {name}")

    with pytest.raises(StoppedError, match="not training"):
        run(job_of(llama, shards), tmp_path, stage=stage)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]


def test_a_training_whose_report_is_answered_by_a_stop_writes_a_checkpoint_and_ends(llama: Path, shards: Path, tmp_path: Path) -> None:
    job = job_of(llama, shards)
    job = dataclasses.replace(job, train=job.train.model_copy(update={"max_steps": 5000}))
    reported: list[int] = []

    def progress(done: int, *_: Any) -> None:
        reported.append(done)
        raise StoppedError("stop")

    with pytest.raises(StoppedError, match="asked to end after step"):
        run(job, tmp_path, progress=progress)
    last = steps_on_storage(job, storage=Storage.open(tmp_path))
    assert reported == list(range(1, last + 1)), "every step is reported, the one before the checkpoint included"
    assert 0 < last < job.train.max_steps
    assert run(job, tmp_path, until=last + 1).num_steps == last + 1
