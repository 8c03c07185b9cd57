"""Whether several adapters fit beside each other on one GPU, from sizes alone. Pure: no torch, no model, no GPU."""

from __future__ import annotations

from collections.abc import Sequence

from pause_ray.engines.cost import ModelShape
from pause_ray.errors import SpecError
from pause_ray.train.memory import DOUBT, MemoryPlan, Workers, gigabytes, plan_memory
from pause_ray.train.spec import TrainSpec

SHARED_PARTS = ("weights", "logits", "buffers", "runtime")
"""Of a plan, what adapters on one base have once; all else each has for itself, since a forward pass holds the rows of all."""


def side_by_side_bytes(plans: Sequence[MemoryPlan]) -> int:
    """Peak of one worker that trains what ``plans`` were made for, all at stage 0, on one copy of the base weights."""
    shared = sum(max(plan.worker.get(part, 0) for plan in plans) for part in SHARED_PARTS)
    return shared + sum(size for plan in plans for part, size in plan.worker.items() if part not in SHARED_PARTS)


def check_room(
    trains: Sequence[TrainSpec], *, shape: ModelShape | None, workers: int, memory_bytes: int, longest_row_tokens: Sequence[int]
) -> None:
    """Refuse more adapters than a GPU has memory for.

    Args:
        trains: What is trained side by side.
        shape: Of the base model; None where its config does not tell, which leaves everything unchecked.
        workers: How many train together.
        memory_bytes: Free on the GPU that has least.
        longest_row_tokens: Of each training, pauses included.

    Raises:
        SpecError: they cannot fit, even if the plan is off by as much as plans are; the message says how many do.
    """
    if shape is None:
        return
    who = Workers(number=workers, per_node=workers)
    plans = [
        plan_memory(train, shape=shape, workers=who, stage=0, longest_row_tokens=tokens)
        for train, tokens in zip(trains, longest_row_tokens, strict=True)
    ]
    fits = [side_by_side_bytes(plans[: number + 1]) * (1 - DOUBT) <= memory_bytes for number in range(len(plans))]
    if all(fits):
        return
    remedy = f"set train_together to {fits.index(False)}" if fits[0] else "train them one after another, at another train.zero.stage"
    checkpointing = "" if trains[0].gradient_checkpointing else ", or train.gradient_checkpointing to true"
    raise SpecError(
        f"train_together: {len(plans)} adapters side by side need {gigabytes(side_by_side_bytes(plans))}, but {gigabytes(memory_bytes)} of "
        f"a GPU are free; {remedy}{checkpointing}"
    )
