"""The workers of one training: what they agree on. Knows torch's process group; starts none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed

Chosen = TypeVar("Chosen")


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
