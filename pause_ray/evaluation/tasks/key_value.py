"""Key-value retrieval of *Lost in the Middle* (arXiv 2307.03172): one pair among pairs of UUIDs that look alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar, Literal

from pause_ray.core.spec import Spec
from pause_ray.evaluation.question import Fact, LabelScorer, Question
from pause_ray.evaluation.tasks.keys_values import drawn_uuid


class KeyValueTask(Spec):
    """Pairs of UUIDs as the lines of a JSON object; the pair that is asked for stands at the cell's depth."""

    has_filler: ClassVar[bool] = True
    label_scorer: ClassVar[LabelScorer | None] = None
    kind: Literal["key_value"]

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """A pair."""
        key, value = drawn_uuid(draw), drawn_uuid(draw)
        return Question(
            facts=(Fact(text=_pair(key, value), references=(value,)),),
            question=f'Which value belongs to the key "{key}"?',
            answer_prefix=f'The value of "{key}" is "',
            draft=f'{value}"',
        )

    def filler_lines(self, draw: random.Random) -> Iterator[str]:
        """Other pairs, without end; that one of their UUIDs is a fact's has a chance of 2⁻¹²²."""
        while True:
            yield _pair(drawn_uuid(draw), drawn_uuid(draw))


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}",'
