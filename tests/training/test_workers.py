"""Training in worker processes of Ray Train gives the adapter that training in this process gives."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError, StoppedError, StorageError, TrainingError
from pause_ray.core.storage import Storage
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, RunningTraining
from pause_ray.training.launch import fit
from pause_ray.training.spec import LoraSpec, TrainJob, TrainSpec, ZeroSpec
from tests.training.tiny_llama import added_marker, make_model, make_rows, make_shards

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_the_adapter_of_one_process(tmp_path: Path) -> None:
    """ZeRO-3 over gloo."""
    import safetensors.torch

    llama = make_model(tmp_path / "model")
    marker = added_marker(llama)
    train = TrainSpec(
        max_steps=4, warmup_steps=1, learning_rate=1e-2, precision="float32", lora=LoraSpec(rank=4, alpha=4), zero=ZeroSpec(stage=3)
    )
    job = TrainJob(
        train=train,
        model_dir=llama,
        base_digest="tiny",
        shards=make_shards(tmp_path / "set", make_rows(20, marker_id=marker.token_id)),
        marker=marker,
        policy=None,
        seed=0,
        threads=1,
    )

    def adapter(root: str, num_workers: int) -> tuple[dict[str, Any], list[int]]:
        steps: list[int] = []
        checkpoint = fit(
            job,
            storage=Storage.open(tmp_path / root),
            num_workers=num_workers,
            cpus_per_worker=1,
            gpus_per_worker=0,
            progress=lambda done, total, row: steps.append(done),
        )
        assert not (checkpoint.folder / "ray").exists()
        return safetensors.torch.load_file(checkpoint.folder / ADAPTER_WEIGHTS), steps

    alone, steps_alone = adapter("alone", 0)
    together, steps_together = adapter("together", 2)
    assert steps_alone == steps_together == [1, 2, 3, 4]
    assert alone.keys() == together.keys()
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-4


@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_makes_workers_write_a_checkpoint_and_end(tmp_path: Path) -> None:
    llama = make_model(tmp_path / "model")
    job = TrainJob(
        train=TrainSpec(max_steps=5000, precision="float32", lora=LoraSpec(rank=4, alpha=4)),
        model_dir=llama,
        base_digest="tiny",
        shards=make_shards(tmp_path / "set", make_rows(20)),
        marker=None,
        policy=None,
        seed=0,
        threads=1,
    )

    def interrupt(done: int, steps: int, row: Any) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    storage = Storage.open(tmp_path / "runs")
    with pytest.raises(StoppedError, match="the same command goes on there"):
        fit(job, storage=storage, num_workers=1, cpus_per_worker=1, gpus_per_worker=0, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    [folder] = (path for path in storage.checkpoints.iterdir() if path.is_dir())
    assert RunningTraining(folder=folder, belongs_to={}).last_step() >= 1


@pytest.mark.parametrize("raised", [SpecError("train.lora.targets: …"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_a_worker_raised_is_what_the_caller_sees(raised: Exception) -> None:
    """Ray Train wraps it twice, or Recovery raised it in the controller; a full disk must still be known as one."""
    import ray.train
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    from pause_ray.training.launch import cause_of

    failures = {0: RuntimeError("lost its peers"), 1: UserExceptionWithTraceback(raised, traceback_str="…")}
    for wrapped in (ray.train.WorkerGroupError("…", failures), ray.train.ControllerError(ray.train.ControllerError(raised))):
        cause = cause_of(pickle.loads(pickle.dumps(wrapped)))
        assert (type(cause), cause.args) == (type(raised), raised.args)


def test_a_lost_worker_is_a_training_error() -> None:
    import ray.train

    from pause_ray.training.launch import cause_of

    assert isinstance(cause_of(ray.train.WorkerGroupError("worker 1 died", {1: RuntimeError("died")})), TrainingError)


def running(folder: Path) -> RunningTraining:
    return RunningTraining(folder=folder, belongs_to={})


def save(training: RunningTraining, step: int) -> None:
    training.save(step, write_tensors=lambda path: path.write_bytes(b"weights") and None, log_rows=[], facts={}, keep_last=1)


def lost_worker(*, preempted: bool = False) -> Exception:
    import ray.exceptions
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("worker 1 is gone", ray.exceptions.RayActorError("a1", "it died", preempted=preempted))


def test_lost_workers_are_replaced_as_long_as_training_gets_further(tmp_path: Path) -> None:
    from pause_ray.training.launch import FRUITLESS_ATTEMPTS, Recovery

    training = running(tmp_path)
    recovery = pickle.loads(pickle.dumps(Recovery(training)))
    for step in range(1, 5):
        for _ in range(FRUITLESS_ATTEMPTS - 1):
            recovery.after_exception(None, {1: lost_worker()})
        save(training, step)
    for _ in range(FRUITLESS_ATTEMPTS - 1):
        recovery.after_exception(None, {0: RuntimeError("connection closed by peer"), 1: lost_worker()})
    with pytest.raises(TrainingError, match=rf"{FRUITLESS_ATTEMPTS} times in a row after step 4"):
        recovery.after_exception(None, {0: RuntimeError()})


@pytest.mark.parametrize(
    "raised", [SpecError("rank"), TrainingError("loss is nan"), StorageError("disk is full"), TypeError("bug"), OSError()]
)
def test_what_would_happen_again_is_not_tried_again(tmp_path: Path, raised: Exception) -> None:
    from pause_ray.training.launch import Recovery

    with pytest.raises(type(raised)):
        Recovery(running(tmp_path)).after_exception(None, {0: RuntimeError("lost its peers"), 1: raised})


def test_an_announced_loss_of_a_node_is_no_failed_attempt(tmp_path: Path) -> None:
    """The controller reports it again and again until the node is gone; only other losses count towards the limit."""
    from pause_ray.training.launch import FRUITLESS_ATTEMPTS, Recovery

    recovery = Recovery(running(tmp_path))
    for _ in range(FRUITLESS_ATTEMPTS - 1):
        recovery.after_exception(None, {1: lost_worker()})
        for _ in range(20):
            recovery.after_exception(None, {0: RuntimeError("lost its peers"), 1: lost_worker(preempted=True)})
    with pytest.raises(TrainingError, match=rf"lost {FRUITLESS_ATTEMPTS} times in a row after step 0 \(worker 1: "):
        recovery.after_exception(None, {1: lost_worker()})
