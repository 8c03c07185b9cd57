"""Agreement among the workers of one training, and requests to it from outside. Knows torch's process group; starts none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from pause_ray.models.checkpoint import STOP

Chosen = TypeVar("Chosen")
NODE_CHECK_SECONDS = 5.0
"""Time between two checks for a node that goes away, which all workers must make together; Ray itself checks as often."""


class WorkerGroup:
    """The workers of one training. All of them must call the same methods in the same order."""

    def __init__(self, device: torch.device) -> None:
        """Read this worker's rank in torch's process group, whose messages are tensors on ``device``."""
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def maximum(self, value: float) -> float:
        """Return the largest of all workers' values."""
        if self.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
        return box.item()

    def from_first_worker(self, choose: Callable[[], Chosen]) -> Chosen:
        """Return what ``choose`` returns on the first worker: a new file may be visible on one machine and not yet on another."""
        box: list[Any] = [choose() if self.rank == 0 else None]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        chosen: Chosen = box[0]
        return chosen


class Requests:
    """Requests to a running training: to stop, or to save because a node goes away."""

    def __init__(self, workers: WorkerGroup, folder: Path, *, loses_a_node: Callable[[], bool]) -> None:
        """Begin without a request; the first worker looks for ``STOP`` in ``folder``.

        ``loses_a_node`` returns whether a node with workers on it is about to go away; all workers call it together.
        """
        self._workers, self._folder, self._loses_a_node = workers, folder, loses_a_node
        self._checked = time.monotonic()

    def check(self) -> tuple[bool, bool]:
        """Return whether to end after a checkpoint, and whether one is due because a node goes away; the same on all workers."""
        stop, check_nodes = False, False
        if self._workers.rank == 0:
            stop = (self._folder / STOP).exists()
            check_nodes = time.monotonic() - self._checked >= NODE_CHECK_SECONDS
        code = int(self._workers.maximum(2 * stop + check_nodes))
        if not code % 2:
            return code >= 2, False
        self._checked = time.monotonic()
        return code >= 2, self._loses_a_node()
