"""The benchmark of training runs, compares like with like, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.torch
@pytest.mark.slow
def test_both_sides_train_the_same_and_every_variant_has_a_row(tmp_path: Path) -> None:
    size = ["--shapes", "tiny", "--tokens", "64", "--steps", "3", "--batch", "2", "--accumulation", "2", "--repeats", "1", "--threads", "1"]
    command = [sys.executable, "bench/train.py", *size, "--sides", "step", "trainer", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr  # it refuses losses that lie apart
    step, trainer = json.loads((tmp_path / "rows.json").read_text())
    assert [step["name"], trainer["name"]] == ["tiny LoRA 64/step", "tiny LoRA 64/trainer"]
    assert trainer["ratio"] == 1.0
    assert step["ratio"] == pytest.approx(step["tokens_per_second"] / trainer["tokens_per_second"])
    assert step["final_loss"] == pytest.approx(trainer["final_loss"], abs=1e-3)
    assert min(row["peak_memory_bytes"] for row in (step, trainer)) > 100 * 2**20, "a process with torch in it"
