"""Steps of a walk made from bare token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pause_ray.inference.engine import PromptStep
from pause_ray.text.prompts import BuiltPrompt


def step_of(ids: Sequence[int], *, keep: int = 0, draft: Sequence[int] = (), most: int = 12) -> PromptStep:
    return PromptStep(
        prompt=BuiltPrompt.plain(np.asarray(ids, dtype=np.int32)), keep_tokens=keep, draft_ids=tuple(draft), max_new_tokens=most
    )


def shared(before: Sequence[int], after: Sequence[int]) -> int:
    """Leading ids that both have in common, without the last of either."""
    most = min(len(before), len(after)) - 1
    return next((place for place in range(most) if before[place] != after[place]), most)


def walk_of(prompts: Sequence[Sequence[int]], *, grain: int = 1, drafts: Sequence[Sequence[int]] = (), most: int = 12) -> list[PromptStep]:
    """Each prompt keeps all it can of the one before."""
    kept = [0, *(shared(before, after) // grain * grain for before, after in itertools.pairwise(prompts))]
    given = drafts or [()] * len(prompts)
    return [step_of(ids, keep=keep, draft=draft, most=most) for ids, keep, draft in zip(prompts, kept, given, strict=True)]
