"""Planned memory is that of a real training, within 15 %."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pause_ray.models.shape import ModelShape
from pause_ray.training.memory import Workers, plan_memory
from pause_ray.training.spec import TrainSpec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (256, {"precision": "float32"}),
    "sharded": (768, {"precision": "bfloat16", "zero": {"stage": 2}, "lora": {"rank": 32}}),
    "recomputed": (512, {"precision": "float32", "gradient_checkpointing": True, "zero": {"stage": 1}}),
    "dealt": (256, {"precision": "float32", "gradient_checkpointing": True, "zero": {"stage": 3}}),
}
LEARNED = 32


def measured(model_dir: Path, folder: Path, asked: dict[str, Any], **environment: str) -> int:
    command = [sys.executable, "-m", "tests.real.peak_of_training", str(model_dir), str(folder), json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is asked of Linux")
@pytest.mark.parametrize("case", CASES)
def test_a_training_takes_what_is_planned(model_dir: Path, tmp_path: Path, case: str) -> None:
    """Where the heap gives freed blocks back. With its usual ways it keeps up to ``heap holes`` more, by the version of the C library."""
    tokens, fields = CASES[case]
    train = TrainSpec.parse(
        {"max_steps": 2, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0} | fields, origin="test"
    )
    plan = plan_memory(
        train,
        shape=ModelShape.load(model_dir),
        workers=Workers(number=1, per_node=1, on_gpu=False),
        stage=train.zero.stage if train.zero.stage != "auto" else 0,
        longest_row_tokens=tokens,
        loss_tokens=LEARNED,
    )
    asked = {"train": train.resolved(), "tokens": tokens, "learned": LEARNED}
    peak = measured(model_dir, tmp_path / "tight", asked, MALLOC_MMAP_THRESHOLD_="262144")
    tight = dataclasses.replace(plan, worker={part: size for part, size in plan.worker.items() if part != "heap holes"})
    assert tight.worker_bytes == pytest.approx(peak, rel=0.15)
    if case == "plain":
        usual = measured(model_dir, tmp_path / "usual", asked)
        assert 0.85 * peak < usual < 1.15 * plan.worker_bytes
