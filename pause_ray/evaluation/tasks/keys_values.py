"""Drawn keys and values: two-word names, seven-digit numbers, UUIDs. Knows no task and no wording.

Names and numbers come in two classes that no reader can tell apart: those that facts are drawn from, and those that a
task's filler lines are drawn from. So a line can never hold what a question asks for or about, however many there are.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pause_ray.core.errors import SpecError

KeyKind = Literal["words", "uuids"]
ValueKind = Literal["numbers", "uuids", "words"]

_ADJECTIVES = """
amber ancient awkward barren bashful blunt bold brisk broad bronze brittle bumpy candid careful chalky cheerful chilly clever
cloudy coarse cosy crooked curious damp dapper daring dizzy dreamy drowsy dusty eager early earnest elegant empty faded
faithful fancy feeble fierce fluffy foggy formal fragile frosty gentle giddy glossy grand grateful grumpy hasty hidden
hollow humble icy idle jagged jolly keen lazy lively lonely loyal lucid mellow merry mighty misty modest mossy muddy narrow
nimble noble patient placid polite proud quaint quiet rapid rugged rusty salty shabby shiny silent sleepy slender solemn
spotted steady stormy sturdy subtle sunny tidy timid tranquil velvet vivid wary wooden zesty
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
"""None ends with another, so that no name lies within another."""
_NOUNS = """
acorn almanac anchor anvil apricot badger bakery banjo barrel basket beacon beetle bellows biscuit blanket bonnet bridge bucket
cactus camel candle canoe caravan cello chimney cobbler comet compass cottage cricket cupboard cushion dolphin donkey drawer easel
falcon feather ferry fiddle flannel fountain garland glacier goblet hammock harbor hazelnut heron hinge jacket jigsaw kettle lagoon
lantern lizard lobster locket magnet mallet marmot meadow mitten muffin napkin nugget orchard otter oyster paddle parsnip pebble
pelican pigeon pillow pitcher puddle quarry quill raven ribbon saddle sandal scarf shovel sparrow spindle squirrel teapot thimble
thistle toboggan trumpet tulip turnip urchin violin walnut whistle willow windmill wrench zeppelin
"""
NOUNS = tuple(_NOUNS.split())
"""None begins with another, so that no name lies within another."""
MOST_DRAWS = 10_000
"""For one text; there are 1,352 names for facts, so the last of them is missed once in 1,600 times."""
_FACT_SHARE = 8
"""One name in this many is for facts."""
_NUMBER_SHARE = 7
"""One number in this many is for facts."""
_NUMBERS = range(1_000_000, 10_000_000)
"""Seven digits, as in RULER."""


def fact_name(draw: random.Random) -> str:
    """An adjective and a noun, for a fact."""
    first = draw.randrange(len(ADJECTIVES))
    return _name(first, draw.choice([second for second in range(len(NOUNS)) if _is_for_facts(first, second)]))


def filler_names(draw: random.Random) -> Iterator[str]:
    """Names that no fact has, without end: every one of them once before any is there again."""
    pairs = [(first, second) for first in range(len(ADJECTIVES)) for second in range(len(NOUNS)) if not _is_for_facts(first, second)]
    draw.shuffle(pairs)
    return (_name(*pair) for pair in itertools.cycle(pairs))


def fact_number(draw: random.Random) -> str:
    """Seven digits, for a fact."""
    return str(_multiple(draw))


def filler_number(draw: random.Random) -> str:
    """Seven digits that no fact has."""
    return str(_multiple(draw) + draw.randrange(1, _NUMBER_SHARE))


def drawn_uuid(draw: random.Random) -> str:
    """A UUID of version 4; with 122 random bits no two are equal."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def distinct(makes: Sequence[Callable[[random.Random], str]], draw: random.Random) -> list[str]:
    """One text per function, none of which occurs within another.

    Raises:
        SpecError: so many are wanted that no further one is found.
    """
    texts: list[str] = []
    for make in makes:
        drawn = (make(draw) for _ in range(MOST_DRAWS))
        text = next((text for text in drawn if not any(text in other or other in text for other in texts)), None)
        if text is None:
            raise SpecError(
                f"task: only {len(texts)} of the {len(makes)} names and numbers that it asks for are different; let it hide fewer"
            )
        texts.append(text)
    return texts


def listed(texts: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def _is_for_facts(first: int, second: int) -> bool:
    return (first + second) % _FACT_SHARE == 0


def _name(first: int, second: int) -> str:
    return f"{ADJECTIVES[first]}-{NOUNS[second]}"


def _multiple(draw: random.Random) -> int:
    return draw.randrange(-(-_NUMBERS.start // _NUMBER_SHARE), _NUMBERS.stop // _NUMBER_SHARE) * _NUMBER_SHARE
