"""Facts that answer only together, like bAbI's tasks 1 to 3 (arXiv 1502.05698) and BABILong (arXiv 2406.10149), with other words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pause_ray.evaluation.question import Fact, LabelScorer, Question, Task

PLACES = ("balcony", "courtyard", "laundry", "nursery", "pantry", "veranda")
"""All possible answers, as many as in bAbI."""
_PERSONS = ("Edgar", "Hugo", "Leila", "Mina", "Otto", "Pavel")
_THINGS = ("lantern", "notebook", "teapot", "umbrella")
_GO = ("went to", "walked over to", "moved to", "hurried to")
_TAKE = ("picked up", "took", "grabbed")
_DROP = ("put down", "left behind", "set down")
_LEAST_STEPS = {1: 3, 2: 6, 3: 7}
"""Facts of the longest story and one distractor, by the number of supporting facts."""


@dataclass(frozen=True)
class _Asked:
    """A story, its question, and the index of the fact that names the answer."""

    story: list[str]
    answer_step: int
    place: str
    question: str


class CombineTask(Task):
    """Persons who move, take things and put them down; the question asks where one is or was."""

    label_scorer: ClassVar[LabelScorer | None] = "label"
    kind: Literal["combine"]
    supporting: Literal[1, 2, 3]
    """Number of facts that the answer needs. 1: where is a person; 2: where is a thing that was carried; 3: where was it before."""
    steps: int = Field(ge=3)
    """Number of facts; those that the answer does not need are about other persons and things."""

    @model_validator(mode="after")
    def _story_has_room(self) -> Self:
        least = _LEAST_STEPS[self.supporting]
        if self.steps < least:
            raise ValueError(f"steps {self.steps} are too few for supporting {self.supporting} and a distractor; ask for at least {least}")
        return self

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Draw a story; the fact that names the answer has it as its reference, and the labels are all places."""
        persons, things = draw.sample(_PERSONS, len(_PERSONS)), draw.sample(_THINGS, len(_THINGS))
        asked = _about_person(draw, persons[0]) if self.supporting == 1 else _about_thing(draw, persons[0], things[0], self.supporting)
        others = _others(draw, persons[1:], things[1:], self.steps - len(asked.story))
        is_asked = [True] * len(asked.story) + [False] * len(others)
        draw.shuffle(is_asked)
        story, distractors = iter(enumerate(asked.story)), iter(others)
        facts = []
        for belongs in is_asked:
            step, text = next(story) if belongs else (-1, next(distractors))
            facts.append(Fact(text=text, references=(asked.place,) if step == asked.answer_step else ()))
        return Question(facts=tuple(facts), question=asked.question, draft=f"{asked.place}.", labels=PLACES, in_order=True)


def _about_person(draw: random.Random, person: str) -> _Asked:
    route = draw.sample(PLACES, 2)
    story = [_goes(draw, person, place) for place in route]
    return _Asked(story, 1, route[1], f"Where is {person} now?")


def _about_thing(draw: random.Random, person: str, thing: str, supporting: int) -> _Asked:
    """Draw a story of a thing that is carried along a route; half of the time it is put down and its bearer leaves."""
    *route, last, elsewhere = draw.sample(PLACES, supporting + 1)
    takes = f"{person} {draw.choice(_TAKE)} the {thing}."
    story = [_goes(draw, person, route[0]), takes, *(_goes(draw, person, place) for place in [*route[1:], last])]
    if draw.random() < 0.5:
        story += [f"{person} {draw.choice(_DROP)} the {thing}.", _goes(draw, person, elsewhere)]
    if supporting == 2:
        return _Asked(story, 2, last, f"Where is the {thing} now?")
    return _Asked(story, 2, route[1], f"Where was the {thing} before it was in the {last}?")


def _others(draw: random.Random, persons: list[str], things: list[str], steps: int) -> list[str]:
    """Draw distracting actions that are possible one after the other: nobody takes an item that another holds or that is elsewhere."""
    where: dict[str, str] = {}
    held: dict[str, str] = {}
    lying: dict[str, str | None] = dict.fromkeys(things)
    story = []
    for _ in range(steps):
        person = draw.choice(persons)
        near = [thing for thing, place in lying.items() if place in (None, where.get(person))]
        if person in where and person in held and draw.random() < 0.3:
            thing = held.pop(person)
            lying[thing] = where[person]
            story.append(f"{person} {draw.choice(_DROP)} the {thing}.")
        elif person in where and person not in held and near and draw.random() < 0.3:
            held[person] = draw.choice(near)
            del lying[held[person]]
            story.append(f"{person} {draw.choice(_TAKE)} the {held[person]}.")
        else:
            where[person] = draw.choice([place for place in PLACES if place != where.get(person)])
            story.append(_goes(draw, person, where[person]))
    return story


def _goes(draw: random.Random, person: str, place: str) -> str:
    return f"{person} {draw.choice(_GO)} the {place}."
