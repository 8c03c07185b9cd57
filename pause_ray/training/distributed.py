"""The workers of one training: what they tell each other, and what they are asked. Knows torch's process group; starts none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from pause_ray.models.checkpoint import STOP

Chosen = TypeVar("Chosen")
LOOK_SECONDS = 5.0
"""Between two questions whether a node goes away, which all workers must ask together; Ray itself looks as often."""


class Crew:
    """The workers that train together, this one among them. All must call the same methods in the same order."""

    def __init__(self, device: torch.device) -> None:
        """Read this worker's place in torch's process group, whose messages go through tensors on ``device``."""
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def most(self, value: float) -> float:
        """The largest of all workers' values."""
        if self.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
        return box.item()

    def first_ones(self, choose: Callable[[], Chosen]) -> Chosen:
        """What the first worker chooses, for all: files may be there for one machine and not yet for another."""
        box: list[Any] = [choose() if self.rank == 0 else None]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        chosen: Chosen = box[0]
        return chosen


class Requests:
    """What is asked of a training from outside while it runs."""

    def __init__(self, crew: Crew, folder: Path, *, loses_a_node: Callable[[], bool]) -> None:
        """Nothing is asked yet.

        Args:
            crew: The workers.
            folder: The first worker looks for ``STOP`` in it.
            loses_a_node: Whether a node with workers on it is about to go away; all workers call it together.
        """
        self._crew, self._folder, self._loses_a_node = crew, folder, loses_a_node
        self._looked = time.monotonic()

    def look(self) -> tuple[bool, bool]:
        """Whether to end after a checkpoint, and whether one is due because a node goes away; the same on all workers."""
        stop, look = False, False
        if self._crew.rank == 0:
            stop = (self._folder / STOP).exists()
            look = time.monotonic() - self._looked >= LOOK_SECONDS
        asked = int(self._crew.most(2 * stop + look))
        if not asked % 2:
            return asked >= 2, False
        self._looked = time.monotonic()
        return asked >= 2, self._loses_a_node()
