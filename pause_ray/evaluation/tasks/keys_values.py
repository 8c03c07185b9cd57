"""Keys and values that no model can know or guess, and the tasks that ask for the value of a key.

Names and numbers come in two classes that no reader can tell apart: one for facts and one for a task's filler lines. A filler line
therefore never holds what a question asks for or about, however many there are.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.question import Fact, LabelScorer, Question, Task

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
"""No adjective ends with another, so that no name occurs within another."""
_NOUNS = """
acorn almanac anchor anvil apricot badger bakery banjo barrel basket beacon beetle bellows biscuit blanket bonnet bridge bucket
cactus camel candle canoe caravan cello chimney cobbler comet compass cottage cricket cupboard cushion dolphin donkey drawer easel
falcon feather ferry fiddle flannel fountain garland glacier goblet hammock harbor hazelnut heron hinge jacket jigsaw kettle lagoon
lantern lizard lobster locket magnet mallet marmot meadow mitten muffin napkin nugget orchard otter oyster paddle parsnip pebble
pelican pigeon pillow pitcher puddle quarry quill raven ribbon saddle sandal scarf shovel sparrow spindle squirrel teapot thimble
thistle toboggan trumpet tulip turnip urchin violin walnut whistle willow windmill wrench zeppelin
"""
NOUNS = tuple(_NOUNS.split())
"""No noun begins with another, so that no name occurs within another."""
MOST_DRAWS = 10_000
"""The largest number of draws for one text; the last of the 1,352 names for facts is missed once in 1,600 times."""
_FACT_SHARE = 8
"""One in this many names is for facts."""
_NUMBER_SHARE = 7
"""One in this many numbers is for facts."""
_NUMBERS = range(1_000_000, 10_000_000)
"""Seven digits, as in RULER."""


def fact_name(draw: random.Random) -> str:
    """Return an adjective and a noun, for a fact."""
    first = draw.randrange(len(ADJECTIVES))
    return _name(first, draw.choice([second for second in range(len(NOUNS)) if _is_for_facts(first, second)]))


def filler_names(draw: random.Random) -> Iterator[str]:
    """Yield names that no fact has, without end; none is repeated before all were yielded."""
    pairs = [(first, second) for first in range(len(ADJECTIVES)) for second in range(len(NOUNS)) if not _is_for_facts(first, second)]
    draw.shuffle(pairs)
    return (_name(*pair) for pair in itertools.cycle(pairs))


def fact_number(draw: random.Random) -> str:
    """Return seven digits, for a fact."""
    return str(_multiple(draw))


def filler_number(draw: random.Random) -> str:
    """Return seven digits that no fact has."""
    return str(_multiple(draw) + draw.randrange(1, _NUMBER_SHARE))


def drawn_uuid(draw: random.Random) -> str:
    """Return a UUID of version 4; with 122 random bits no two are equal."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def distinct(makes: Sequence[Callable[[random.Random], str]], draw: random.Random) -> list[str]:
    """Return one text per function, none of which occurs within another.

    Raises:
        SpecError: No further text is found because too many are asked for.
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
    """Join texts as ``a, b and c``."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def _is_for_facts(first: int, second: int) -> bool:
    return (first + second) % _FACT_SHARE == 0


def _name(first: int, second: int) -> str:
    return f"{ADJECTIVES[first]}-{NOUNS[second]}"


def _multiple(draw: random.Random) -> int:
    return draw.randrange(-(-_NUMBERS.start // _NUMBER_SHARE), _NUMBERS.stop // _NUMBER_SHARE) * _NUMBER_SHARE


class UuidTask(Task):
    """One UUID, asked for by the name that stands with it (as in github.com/gkamradt/needle-in-a-haystack 2.0, reworded)."""

    kind: Literal["uuid"]

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Draw a name and a UUID."""
        name, code = fact_name(draw), drawn_uuid(draw)
        return Question(
            facts=(Fact(text=f"The access code of the vault {name} is {code}.", references=(code,)),),
            question=f"What is the access code of the vault {name}? Answer with the code only.",
            draft=code,
        )


class UuidChainTask(Task):
    """UUIDs that each lead to the next; the question names the first and asks for the last (as in needle-in-a-haystack 2.0)."""

    label_scorer: ClassVar[LabelScorer | None] = "chain_progress"
    kind: Literal["uuid_chain"]
    chain_length: int = Field(default=5, ge=2)
    """Number of UUIDs, one more than facts."""

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Draw a chain; its labels are the UUIDs after the first, in order."""
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


class KeyValueTask(Task):
    """Pairs of UUIDs as the lines of a JSON object, one of which is asked for (*Lost in the Middle*, arXiv 2307.03172)."""

    kind: Literal["key_value"]

    @property
    def has_filler(self) -> bool:
        """The task brings its own lines."""
        return True

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Draw a pair."""
        key, value = drawn_uuid(draw), drawn_uuid(draw)
        return Question(
            facts=(Fact(text=_pair(key, value), references=(value,)),),
            question=f'Which value belongs to the key "{key}"?',
            answer_prefix=f'The value of "{key}" is "',
            draft=f'{value}"',
        )

    def filler_lines(self, draw: random.Random) -> Iterator[str]:
        """Yield other pairs, without end."""
        while True:
            yield _pair(drawn_uuid(draw), drawn_uuid(draw))


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}",'


MOST_FACTS = 256
"""The largest number of facts in one context; there are 1,352 names, and every question is drawn together with all facts."""


class MultiKeyTask(Task):
    """A name and a number at each depth of the suite. Every context holds all of them and every question asks for one.

    The prompts of a length differ in the question only, so prefix sharing prefills the context once.
    """

    kind: Literal["multi_key"]

    def questions(self, draw: random.Random, *, count: int) -> tuple[Question, ...]:
        """Draw a question for each of ``count`` positions; the fact it asks for comes first, the others in the order of positions."""
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
