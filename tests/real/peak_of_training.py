"""A program: trains two steps in this very process and prints how far its resident memory rose above what the imports took.

A training of a tiny model comes first, so that everything is imported and set up; then the kernel's high-water mark is reset
(Linux only).
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np

from pause_ray.core.storage import Storage
from pause_ray.data.shards import NO_LOSS, PackedRow
from pause_ray.training.launch import fit
from pause_ray.training.spec import TrainJob, TrainSpec
from tests.training.tiny_llama import make_model, make_rows, make_shards


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def train(model_dir: Path, rows: list[PackedRow], spec: TrainSpec, *, folder: Path) -> None:
    shards = make_shards(folder / "shards", rows)
    job = TrainJob(train=spec, model_dir=model_dir, base_digest="0" * 16, shards=shards, marker=None, policy=None, seed=0, threads=None)
    fit(job, storage=Storage.open(folder / "runs"), num_workers=0, cpus_per_worker=1, gpus_per_worker=0, progress=lambda *_: None)


def rows_of(tokens: int, *, number: int, learned: int) -> list[PackedRow]:
    ids = np.random.default_rng(0).integers(100, 40_000, size=(number, tokens), dtype=np.int32)
    labels = np.full_like(ids, NO_LOSS)
    labels[:, -learned:] = ids[:, -learned:]
    return [PackedRow(input_ids=own, labels=its, num_pauses=0, num_documents=1) for own, its in zip(ids, labels, strict=True)]


def main(model_dir: str, folder: str, wanted: str) -> None:
    asked = json.loads(wanted)
    spec = TrainSpec.parse(asked["train"], origin="test")
    train(make_model(Path(folder) / "tiny"), make_rows(8), spec, folder=Path(folder) / "first")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    rows = rows_of(asked["tokens"], number=8, learned=asked["learned"])
    train(Path(model_dir), rows, spec, folder=Path(folder) / "second")
    print(json.dumps({"before": before, "peak": resident_bytes("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
