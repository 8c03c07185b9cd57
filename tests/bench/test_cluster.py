"""The benchmark of a cluster grows one, measures the pool and the shard writers on it, and says what a thousand GPUs would take."""

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
def test_two_sizes_have_a_row_of_each_kind_and_the_arithmetic_follows(tmp_path: Path) -> None:
    size = ["--nodes", "1", "2", "--kinds", "scripted", "shards", "--cells", "18", "--cell-seconds", "0.2", "--rows", "32"]
    command = [sys.executable, "bench/cluster.py", *size, "--json", str(tmp_path / "cluster.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]  # it refuses cells and rows that are missing
    written = json.loads((tmp_path / "cluster.json").read_text())
    rows = {(row["kind"], row["nodes"]): row for row in written["rows"]}
    assert list(rows) == [("scripted", 1), ("shards", 1), ("scripted", 2), ("shards", 2)]
    one, two = rows["scripted", 1], rows["scripted", 2]
    assert one["seconds"] >= 18 * 0.2, "a node answers one cell at a time"
    assert two["seconds"] >= 18 * 0.2 / 2
    assert two["efficiency"] == pytest.approx(two["per_second"] / 2 / one["per_second"])
    assert one["store_bytes"] == two["store_bytes"] == 0, "cells and answers are small enough to travel in messages"
    assert rows["shards", 2]["store_bytes"] > 0
    for row in (one, two):
        assert 0 < row["controller_cpu_seconds"] < row["wait_seconds"]
        assert row["message_bytes"] > 1000
    slow, fast = (its for its in written["at_a_thousand"] if its["seconds_per_cell"] in (2.0, 0.5))
    assert {slow["seconds_per_cell"], fast["seconds_per_cell"]} == {2.0, 0.5}
    for its in (slow, fast):
        assert its["controller_cores"] == pytest.approx(1000 / its["seconds_per_cell"] * two["controller_cpu_seconds"])
        assert its["gpus_that_a_controller_feeds"] == pytest.approx(1000 / its["controller_cores"])
