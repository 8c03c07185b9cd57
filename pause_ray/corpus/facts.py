"""Facts that are hidden in training contexts: drawing one, and holding them apart from the evaluation's. Pure.

Knows templates and their slots; knows no document and no token.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pause_ray.corpus.spec import SLOT, FactFile, FactSpec
from pause_ray.errors import SpecError
from pause_ray.text.plain import folded, plain

HELD_OUT_SHARE = 8
"""One fact of so many is for validation rows, where there are any."""
DRAWS = 1000
"""Until a file of facts counts as having none of the wanted kind."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact with its slots filled."""

    needle: str
    question: str

    @property
    def is_held_out(self) -> bool:
        """Whether it is one for validation rows; the fact alone decides, so that training and validation never share one."""
        return hashlib.sha256(self.needle.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw_fact(facts: FactFile, *, rng: random.Random, held_out: bool | None = None) -> Fact:
    """One template, evenly, then one word per slot, evenly; slots are drawn in the order of their names.

    Args:
        facts: Templates.
        rng: Decides.
        held_out: Draw again until the fact is one for validation rows (true) or none of them (false); None takes any.

    Raises:
        SpecError: there seems to be none of that kind.
    """
    for _ in range(DRAWS):
        chosen = rng.choice(facts.facts)
        words = {name: rng.choice(chosen.slots[name]) for name in sorted(chosen.slots)}
        fact = Fact(needle=_filled(chosen.needle, words), question=_filled(chosen.question, words))
        if held_out is None or fact.is_held_out == held_out:
            return fact
    raise SpecError(
        f"corpus.facts: too few to keep one in {HELD_OUT_SHARE} for validation rows alone; give slots more words, "
        "or set corpus.validation_rows: 0"
    )


def shared_with_evaluation(facts: FactFile, *, needles: Sequence[str], keywords: Sequence[str]) -> list[str]:
    """Where training facts touch the evaluation's, one sentence each.

    They touch where a keyword is in a template or in a slot's words, and where a template can make an evaluation needle.
    Letter case, runs of white space and Unicode compatibility forms do not count.
    """
    found = []
    for fact in facts.facts:
        texts = [fact.needle, *(word for words in fact.slots.values() for word in words)]
        for keyword in sorted(set(keywords)):
            holder = next((text for text in texts if plain(keyword) in plain(text)), None)
            if holder is not None:
                found.append(f"the training fact {fact.needle!r} has the evaluation's keyword {keyword!r} in {holder!r}")
        pattern = _pattern(fact)
        found += [
            f"the training fact {fact.needle!r} can make the evaluation's needle {needle!r}"
            for needle in needles
            if pattern.search(plain(needle))
        ]
    return found


def _filled(template: str, words: dict[str, str]) -> str:
    return SLOT.sub(lambda slot: words[slot[1]], template)


def _pattern(fact: FactSpec) -> re.Pattern[str]:
    """What a template can say, as an expression over ``plain`` text."""
    pieces = SLOT.split(" ".join(fact.needle.split()))
    for index, piece in enumerate(pieces):
        is_slot = index % 2 == 1
        pieces[index] = f"(?:{'|'.join(re.escape(plain(word)) for word in fact.slots[piece])})" if is_slot else re.escape(folded(piece))
    return re.compile("".join(pieces))
