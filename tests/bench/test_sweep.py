"""The benchmark of orchestration runs whole sweeps, says what a trial and a cell cost, and writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_two_sizes_have_a_row_each_and_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, "bench/sweep.py", "--sizes", "3x1", "3x12", "--json", str(tmp_path / "sweep.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr  # it refuses a sweep that did not finish
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["trials"], row["cells"]) for row in written["rows"]] == [(3, 1), (3, 12)]
    one, twelve = written["rows"]
    assert written["summary"]["seconds_per_cell"] == pytest.approx((twelve["run_seconds"] - one["run_seconds"]) / 3 / 11)
    assert min(row["driver_peak_mib"] for row in written["rows"]) > 50, "a process with Ray in it"
