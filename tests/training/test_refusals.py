"""What cannot be trained is refused before Ray or a model starts, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import Storage
from pause_ray.training.launch import fit
from pause_ray.training.spec import TrainJob, TrainSpec
from tests.training.tiny_llama import make_model, make_rows, make_shards

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("num_rows", "train", "num_workers", "told"),
    [
        (7, {}, 0, r"corpus has 7 rows.*train.micro_batch_size 2 × train.gradient_accumulation_steps 4 = 8"),
        (8, {"sequence_parallel": 5}, 5, r"train.sequence_parallel 5 .* the model's 4 attention heads"),
        (8, {"sequence_parallel": 2}, 3, "needs groups of 2 workers, but there are 3"),
    ],
)
def test_a_misfit_is_told_before_anything_starts(tmp_path: Path, num_rows: int, train: dict[str, Any], num_workers: int, told: str) -> None:
    with pytest.raises(SpecError, match=told) as caught:
        run(tmp_path, make_rows(num_rows), TrainSpec(**train), num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_a_row_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    rows = make_rows(8)
    long = rows[0].input_ids.repeat(30)
    rows[3] = type(rows[3])(input_ids=long, labels=long, num_pauses=0, num_documents=1)
    with pytest.raises(SpecError, match=f"a row of {len(long)} tokens, but the model takes 256; lower corpus.sequence_len"):
        run(tmp_path, rows, TrainSpec(), num_workers=0)


def run(folder: Path, rows: list[Any], train: TrainSpec, *, num_workers: int) -> None:
    job = TrainJob(
        train=train,
        model_dir=make_model(folder / "model"),
        base_digest="tiny",
        shards=make_shards(folder / "set", rows),
        marker=None,
        policy=None,
        seed=0,
        threads=1,
    )
    storage = Storage.open(folder / "runs")
    try:
        fit(job, storage=storage, num_workers=num_workers, cpus_per_worker=1, gpus_per_worker=0, progress=lambda *_: None)
    finally:
        assert not any(path.is_dir() for path in storage.checkpoints.glob("*")), "nothing was begun"


def test_an_offload_to_nvme_that_cannot_work_here_is_told_in_one_line(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("this machine has what DeepSpeed's async_io needs")
    zero = {"stage": 2, "offload_optimizer": "nvme", "nvme_path": str(tmp_path / "disk")}
    with pytest.raises(SpecError, match=r"offload to nvme needs DeepSpeed's async_io.*or offload to cpu") as caught:
        run(tmp_path, make_rows(8), TrainSpec.model_validate({"zero": zero}), num_workers=0)
    assert "\n" not in str(caught.value)
