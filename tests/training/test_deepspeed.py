"""A training that was interrupted comes out as if it had not been: on the ranks it had, or on others, under its ZeRO stage or another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import StoppedError, TrainingError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import read_json_lines
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, STATE_TENSORS, STOP, TRAINING_LOG, RunningTraining
from pause_ray.training.spec import LoraSpec, TrainSpec, ZeroSpec
from tests.training.ranks import train_on_ranks
from tests.training.tiny_llama import added_marker, make_rows, make_shards

pytestmark = pytest.mark.torch
STEPS, INTERRUPTED_AFTER = 5, 2
TOLERANCE = 1e-4
"""Of float32 weights of size 0.1 and losses of size 5, summed in another order."""


@pytest.fixture(scope="module")
def shards(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three held-out rows, which do not go round among two ranks."""
    rows = make_rows(23, marker_id=added_marker(llama).token_id)
    return make_shards(tmp_path_factory.mktemp("shards") / "set", rows[:20], validation=rows[20:])


def config(llama: Path, shards: Path, folder: Path, *, stage: int = 0, dropout: float = 0.0, **changes: Any) -> Any:
    from pause_ray.training.spec import TrainJob, WorkerConfig

    (folder / "out").mkdir(parents=True, exist_ok=True)
    settings = {
        "max_steps": STEPS,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "precision": "float32",
    }
    settings |= {"checkpoint_every": INTERRUPTED_AFTER, "keep_checkpoints": 9, "validate_every": 2}
    return WorkerConfig(
        job=TrainJob(
            train=TrainSpec(lora=LoraSpec(rank=4, alpha=4, dropout=dropout), zero=ZeroSpec(stage=stage), **(settings | changes)),
            model_dir=llama,
            base_digest="tiny",
            shards=shards,
            marker=added_marker(llama),
            policy=None,
            seed=0,
            threads=1,
        ),
        until=STEPS,
        on_gpu=False,
        folder=folder / "out",
        running=RunningTraining(folder=folder / "training", belongs_to={"training": "tiny"}),
    )


def interrupted(whole: Path, folder: Path) -> Path:
    """What a training leaves that ended after its first checkpoint."""
    shutil.copytree(whole / "training" / f"step-{INTERRUPTED_AFTER}", folder / "training" / f"step-{INTERRUPTED_AFTER}")
    return folder


def weights(folder: Path) -> dict[str, Any]:
    import safetensors.torch

    return {name: tensor.float() for name, tensor in safetensors.torch.load_file(folder / "out" / ADAPTER_WEIGHTS).items()}


def curve(folder: Path) -> list[tuple[float, ...]]:
    rows = read_json_lines(folder / "out" / TRAINING_LOG)
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4, 5]
    return [(row["step"], row["loss"], row["gradient_norm"], row.get("validation_loss", 0.0)) for row in rows]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_ranks_give_the_same_bytes(llama: Path, shards: Path, tmp_path: Path, stage: int, precision: str) -> None:
    """With dropout, whose draws must be the same too; the first rows of the log are those of the first attempt, seconds and all."""
    settings = {"stage": stage, "precision": precision, "dropout": 0.2}
    whole, second = tmp_path / "whole", tmp_path / "second"
    assert train_on_ranks(config(llama, shards, whole, **settings), num_ranks=2) == [None, None]
    interrupted(whole, second)
    assert train_on_ranks(config(llama, shards, second, **settings), num_ranks=2) == [None, None]
    assert (second / "out" / ADAPTER_WEIGHTS).read_bytes() == (whole / "out" / ADAPTER_WEIGHTS).read_bytes()
    assert curve(second) == curve(whole)
    rows = [read_json_lines(folder / "out" / TRAINING_LOG) for folder in (whole, second)]
    assert rows[0][:INTERRUPTED_AFTER] == rows[1][:INTERRUPTED_AFTER]
    assert rows[0][INTERRUPTED_AFTER:] != rows[1][INTERRUPTED_AFTER:], "seconds differ where steps were taken again"
    states = [folder / "training" / "step-4" / STATE_TENSORS for folder in (whole, second)]
    assert states[0].read_bytes() == states[1].read_bytes()


@pytest.fixture(scope="module")
def undisturbed(llama: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """(ranks, stage) → a training that ran through."""
    folders = {key: tmp_path_factory.mktemp("undisturbed") for key in [(1, 0), (2, 0), (2, 3)]}
    for (num_ranks, stage), folder in folders.items():
        assert set(train_on_ranks(config(llama, shards, folder, stage=stage), num_ranks=num_ranks)) == {None}
    return folders


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 0), (1, 0)), ((1, 0), (2, 0)), ((2, 3), (1, 2)), ((1, 0), (2, 3)), ((2, 3), (2, 1)), ((2, 0), (2, 2)), ((1, 0), (3, 3))],
)
def test_other_ranks_or_another_stage_give_the_same_within_rounding(
    llama: Path, shards: Path, tmp_path: Path, undisturbed: dict[tuple[int, int], Path], before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Four rows do not go round among three ranks: two places stay idle."""
    whole = undisturbed[before]
    folder = interrupted(whole, tmp_path)
    assert set(train_on_ranks(config(llama, shards, folder, stage=after[1]), num_ranks=after[0])) == {None}
    expected, found = weights(whole), weights(folder)
    assert expected.keys() == found.keys()
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < TOLERANCE
    for row, other in zip(curve(folder), curve(whole), strict=True):
        assert row == pytest.approx(other, abs=TOLERANCE)


def test_a_request_to_end_is_followed_after_the_running_step_by_every_rank(
    llama: Path, shards: Path, tmp_path: Path, undisturbed: dict[tuple[int, int], Path]
) -> None:
    """Asked again and again, it gets one step further each time, and nothing is lost."""
    job = config(llama, shards, tmp_path, checkpoint_every=None)
    for step in range(1, STEPS):
        (job.folder / STOP).touch()
        ended = train_on_ranks(job, num_ranks=2)
        assert [type(error) for error in ended] == [StoppedError, StoppedError]
        assert f"after step {step} of {STEPS}" in str(ended[0])
    (job.folder / STOP).unlink()
    assert train_on_ranks(job, num_ranks=2) == [None, None]
    assert curve(tmp_path) == curve(undisturbed[2, 0])


def test_a_loss_that_is_no_number_stops_every_rank_before_its_optimizer_step(llama: Path, shards: Path, tmp_path: Path) -> None:
    """The weights are huge but numbers: the step before made them so."""
    import safetensors.torch
    import torch

    job = config(llama, shards, tmp_path, checkpoint_every=1, learning_rate=1e30, warmup_steps=0)
    ended = train_on_ranks(job, num_ranks=2)
    assert [type(error) for error in ended] == [TrainingError, TrainingError]
    assert str(ended[0]) == str(ended[1])
    done = job.running.latest()
    assert done is not None
    assert f"at step {done.step + 1}, rows [" in str(ended[0])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in safetensors.torch.load_file(done.tensors).values())
    rows: list[JsonObject] = read_json_lines(job.folder / TRAINING_LOG)
    assert [row["step"] for row in rows] == list(range(1, done.step + 1))
