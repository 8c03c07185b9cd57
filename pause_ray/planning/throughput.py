"""How fast a model was trained and scored on this storage before. Reads ledgers and training logs; knows no sweep."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pause_ray.core.storage import MANIFEST, Storage, is_complete, read_json
from pause_ray.evaluation.ledger import Ledger
from pause_ray.models.checkpoint import TRAINING_LOG, read_training_log
from pause_ray.models.shape import ModelShape
from pause_ray.models.spec import ModelSpec

MOST_TRIALS = 20
"""The latest ones: more say little more, and ledgers take time to read."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that one model took, all that was measured together."""

    num_steps: int
    trained_tokens: int
    trained_seconds: float
    num_answers: int
    scored_flops: float
    """Of prompts; their answers' time is in ``scored_seconds`` too."""
    scored_seconds: float
    """As one actor would have taken."""

    @classmethod
    def measure(cls, storage: Storage, model: ModelSpec, *, shape: ModelShape) -> Self:
        """Of the latest trials of exactly this model spec."""
        trials = _latest(storage, model)
        rows = [row for folder in trials for row in Ledger(folder / "cells.jsonl").rows() if row.response is not None]
        flops = (
            shape.forward_flops(new_tokens=row.prefilled_tokens, past_tokens=max(0, row.prompt_tokens - row.prefilled_tokens), logit_rows=1)
            for row in rows
        )
        checkpoints = {str(read_json(folder / MANIFEST).get("checkpoint") or "") for folder in trials if is_complete(folder)} - {""}
        steps = [step for checkpoint in sorted(checkpoints) for step in _training(Path(checkpoint))]
        return cls(
            num_steps=len(steps),
            trained_tokens=sum(tokens for tokens, _ in steps),
            trained_seconds=math.fsum(seconds for _, seconds in steps),
            num_answers=len(rows),
            scored_flops=math.fsum(flops),
            scored_seconds=math.fsum(row.seconds for row in rows),
        )

    def training_seconds(self, tokens: int) -> float | None:
        """That so many tokens of training rows will take; None where nothing was measured."""
        return tokens * self.trained_seconds / self.trained_tokens if self.trained_tokens else None

    def scoring_seconds(self, flops: float) -> float | None:
        """That prompts of so many operations will take one actor, with their answers; None where nothing was measured."""
        return flops * self.scored_seconds / self.scored_flops if self.scored_flops else None

    @property
    def words(self) -> str:
        """For people."""
        measured = [f"{self.num_steps} training steps"] * bool(self.num_steps) + [f"{self.num_answers} answers"] * bool(self.num_answers)
        if not measured:
            return "no times: nothing of this model is measured on this storage; name a GPU with --gpu, or run one trial (--max-trials 1)"
        return f"as fast as {' and '.join(measured)} of this model on this storage were"


def _latest(storage: Storage, model: ModelSpec) -> list[Path]:
    """Folders of the trials that were worked on last."""
    begun = [path.parent for path in storage.trials.glob("*/cells.jsonl")]
    newest = heapq.nlargest(10 * MOST_TRIALS, begun, key=lambda folder: (folder / "cells.jsonl").stat().st_mtime)
    return list(itertools.islice((folder for folder in newest if _is_of(folder, model)), MOST_TRIALS))


def _is_of(folder: Path, model: ModelSpec) -> bool:
    """Whether a trial was of this model, computed here."""
    if not (folder / "spec.json").is_file():
        return False
    spec = read_json(folder / "spec.json")
    return bool(spec.get("model") == model.resolved() and spec["engine"]["kind"] == "hf")


def _training(checkpoint: Path) -> list[tuple[int, float]]:
    """Tokens and seconds of each step."""
    return [(row["tokens"], row["seconds"]) for row in read_training_log(checkpoint / TRAINING_LOG)]
