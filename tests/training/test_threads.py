"""A training computes on the cores it may have, whatever Ray's number of logical CPUs makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from joblib import cpu_count

from pause_ray.core.storage import Storage
from pause_ray.training.launch import fit
from pause_ray.training.spec import LoraSpec, TrainJob, TrainSpec
from tests.training.tiny_llama import make_model, make_rows, make_shards

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("threads", "expected"), [(None, cpu_count()), (3, 3)])
def test_a_trial_of_one_logical_cpu_trains_on_all_cores_unless_told_otherwise(tmp_path: Path, threads: int | None, expected: int) -> None:
    job = TrainJob(
        train=TrainSpec(
            max_steps=1, micro_batch_size=1, gradient_accumulation_steps=1, precision="float32", lora=LoraSpec(rank=2, alpha=2)
        ),
        model_dir=make_model(tmp_path / "model"),
        base_digest="tiny",
        shards=make_shards(tmp_path / "set", make_rows(4)),
        marker=None,
        policy=None,
        seed=0,
        threads=threads,
    )
    threads_before, threads_in_step = ray.get(ray.remote(num_cpus=1)(_threads_of_a_training).remote(job, tmp_path / "root"))
    assert threads_before == 1
    assert threads_in_step == expected


@pytest.fixture
def one_core() -> Iterator[None]:
    """For this process, of all that the machine has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_core")
def test_a_process_computes_on_no_more_cores_than_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pause_ray.data import pipeline
    from pause_ray.evaluation.scoring_actor import ScoringActor
    from pause_ray.training import worker

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ScoringActor(None, threads=None, num_neighbors=1)._threads == 1
    with worker._threads(None):
        assert torch.get_num_threads() == 1
    assert pipeline._tasks_at_once() == 1


def _threads_of_a_training(job: TrainJob, root: Path) -> tuple[int, int]:
    import torch

    from pause_ray.training import worker

    class CountingTrainer(worker.Trainer):
        def run(self) -> None:
            seen.append(torch.get_num_threads())
            super().run()

    seen = [torch.get_num_threads()]
    worker.Trainer = CountingTrainer  # type: ignore[misc]
    try:
        fit(job, storage=Storage.open(root), num_workers=0, cpus_per_worker=1, gpus_per_worker=0, progress=_unseen)
    finally:
        worker.Trainer = CountingTrainer.__base__  # type: ignore[misc, assignment]
    return seen[0], seen[1]


def _unseen(done: int, total: int, row: object) -> None:
    """Nobody watches."""
