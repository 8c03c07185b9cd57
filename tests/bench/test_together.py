"""The benchmark of training together runs, compares like with like, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.torch
def test_both_sides_train_the_same_adapters_and_have_a_row(tmp_path: Path) -> None:
    size = ["--shapes", "tiny", "--tokens", "64", "--adapters", "2", "--steps", "2", "--accumulation", "2", "--threads", "1"]
    command = [sys.executable, "bench/together.py", *size, "--precision", "float32", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr  # it refuses losses that lie apart
    alone, together = json.loads((tmp_path / "rows.json").read_text())
    assert [alone["name"], together["name"]] == ["tiny float32 64/one_by_one", "tiny float32 64/together"]
    assert alone["times"] == 1.0
    assert together["times"] == pytest.approx(alone["seconds"] / together["seconds"])
    for row in (alone, together):
        assert 0 < row["step_seconds"] < row["seconds"]
        assert row["adapters"] == 2
