"""UUIDs that no model can know or guess: one asked for by its label, or the end of a chain.

After github.com/gkamradt/needle-in-a-haystack 2.0, in own wording.
"""

from __future__ import annotations

import itertools
import random
from typing import ClassVar, Literal

from pydantic import Field

from pause_ray.core.spec import Spec
from pause_ray.evaluation.question import Fact, LabelScorer, Question
from pause_ray.evaluation.tasks.keys_values import drawn_uuid, fact_name


class UuidTask(Spec):
    """One UUID, asked for by the name that stands with it."""

    has_filler: ClassVar[bool] = False
    label_scorer: ClassVar[LabelScorer | None] = None
    kind: Literal["uuid"]

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """A name and a UUID."""
        name, code = fact_name(draw), drawn_uuid(draw)
        return Question(
            facts=(Fact(text=f"The access code of the vault {name} is {code}.", references=(code,)),),
            question=f"What is the access code of the vault {name}? Answer with the code only.",
            draft=code,
        )


class UuidChainTask(Spec):
    """UUIDs that each lead to the next; asked from the first for the last."""

    has_filler: ClassVar[bool] = False
    label_scorer: ClassVar[LabelScorer | None] = "chain_progress"
    kind: Literal["uuid_chain"]
    chain_length: int = Field(default=5, ge=2)
    """UUIDs, one more than facts; the original's default."""

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """A chain; its labels are the UUIDs after the first, in order."""
        chain = [drawn_uuid(draw) for _ in range(self.chain_length)]
        steps = list(itertools.pairwise(chain))
        facts = tuple(
            Fact(text=f"The code {one} leads to {other}.", references=(other,) if other == chain[-1] else ()) for one, other in steps
        )
        return Question(
            facts=facts,
            question=f"Which code does one arrive at in the end, starting from {chain[0]}?",
            draft=chain[-1],
            labels=tuple(chain[1:]),
            spread="spaced",
            in_order=True,
        )
