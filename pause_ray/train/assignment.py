"""What the launcher tells every training worker. Imports no model library, so that the launcher's process needs none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pause_ray.checkpoint import RunningTraining
from pause_ray.spec import JsonObject
from pause_ray.text.tokens import MarkerToken
from pause_ray.train.spec import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Steps after which the adapter is written as it is then, as a checkpoint that can be scored while training goes on."""

    steps: tuple[int, ...]
    base_digest: str
    """This and the following stand in the checkpoint's manifest."""
    tokenizer_digest: str
    spec: JsonObject


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker needs; picklable, with paths that every node sees."""

    train: TrainSpec
    model_dir: Path
    shards: Path
    marker: MarkerToken | None
    seed: int
    threads: int | None
    on_gpu: bool | None
    """None: on the process's GPU if it has one."""
    folder: Path
    """Where the first worker writes log and adapter."""
    running: RunningTraining
    """Where it keeps checkpoints of the training itself."""
    rungs: Rungs | None = None
    """None writes the adapter at the end only."""
