"""Keyed facts that all stand in one context and are asked for one by one: the cheap look at a whole length in one pass.

The prompts of a length differ in their question only, so whoever shares common beginnings computes the context once.
"""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar, Literal

from pause_ray.core.spec import Spec
from pause_ray.evaluation.question import Fact, LabelScorer, Question
from pause_ray.evaluation.tasks.keys_values import distinct, fact_name, fact_number

MOST_FACTS = 256
"""In one context. There are names for 1,352, and a question is drawn with all facts beside it."""


class KeyedTask(Spec):
    """A name and a number at each depth of the suite; every cell's context holds all of them, its question asks for one."""

    has_filler: ClassVar[bool] = False
    label_scorer: ClassVar[LabelScorer | None] = None
    kind: Literal["keyed"]

    def questions(self, draw: random.Random, *, count: int) -> tuple[Question, ...]:
        """One question for each of ``count`` positions. Its own fact comes first, the others follow in the order of their positions."""
        drawn = distinct([fact_name] * count + [fact_number] * count, draw)
        pairs = list(zip(drawn[:count], drawn[count:], strict=True))
        facts = [Fact(text=f"The locker {name} opens with the number {number}.") for name, number in pairs]
        return tuple(
            Question(
                facts=(dataclasses.replace(facts[place], references=(number,)), *facts[:place], *facts[place + 1 :]),
                question=f"Which number opens the locker {name}? Answer with the number only.",
                draft=number,
            )
            for place, (name, number) in enumerate(pairs)
        )
