"""A model as judge: what it is shown, and what its reply says. Pure; asks no model and knows no file.

A judge's word counts only where it is a grade that was offered. Everything else is ``Unscored``, never the lowest grade.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from pause_ray.engines.engine import Step
from pause_ray.needle.score import Unscored
from pause_ray.spec import Spec
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokens import ModelTokenizer

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_VALUES = ("question", "references", "facts", "answer", "lowest", "highest")
_QUOTED_CHARS = 120


class JudgeSpec(Spec):
    """What a judge is told, and the grades it may give (``eval/judges/*.yaml``)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name; part of the ledger's ``scorer``."""
    lowest: int = 1
    """Grade of an answer with nothing right in it: a score of 0."""
    highest: int = 10
    """Grade of an answer with nothing wrong in it: a score of 1."""
    system: str | None = None
    """System message, or null for none."""
    prompt: str
    """User message. {question}, {references} (what a right answer contains), {facts} (the hidden texts that hold it, a line each),
    {answer}, {lowest} and {highest} are replaced; what replaces them is not read again."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply; one that is cut there leaves the answer unscored."""

    @model_validator(mode="after")
    def _shows_what_it_asks_about(self) -> Self:
        named = set(_PLACEHOLDER.findall(self.prompt))
        if unknown := sorted(named - set(_VALUES)):
            raise ValueError(f"prompt names {{{unknown[0]}}}, which is none of {', '.join(_VALUES)}")
        if "answer" not in named or not named & {"references", "facts"}:
            raise ValueError("prompt must show {answer} and what it is compared with, {references} or {facts}")
        if self.lowest < 0 or self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} must be at least 0 and below highest {self.highest}")
        return self

    def user_message(self, *, question: str, references: Sequence[str], facts: Sequence[str], answer: str) -> str:
        """The prompt about one answer."""
        values = {
            "question": question,
            "references": "; ".join(references),
            "facts": "\n".join(facts),
            "answer": answer,
            "lowest": str(self.lowest),
            "highest": str(self.highest),
        }
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.prompt)

    def share(self, grade: int) -> float:
        """A grade on the ledger's scale of 0 to 1."""
        return (grade - self.lowest) / (self.highest - self.lowest)


def judge_step(message: str, *, spec: JudgeSpec, tokenizer: ModelTokenizer | None) -> Step:
    """A judge's question as an engine gets it.

    Args:
        message: ``spec.user_message``.
        spec: Of the judge.
        tokenizer: The judge's. None for a chat endpoint, whose tokenizer nobody has; the prompt then has no ids.

    Raises:
        TextError: the message, an answer with half a character in it for example, cannot be tokenised.
        ModelError: the judge's chat template refuses the messages.
    """
    prefix: Sequence[int] = ()
    suffix: Sequence[int] = ()
    text = np.empty(0, dtype=np.int32)
    if tokenizer is not None:
        prefix, suffix = tokenizer.chat_frame(spec.system, "", "")
        # Where a context stands: control tokens that an answer writes out stay text there.
        text = tokenizer.encode(message).ids
    ids = np.concatenate([np.array(prefix, dtype=np.int32), text, np.array(suffix, dtype=np.int32)])
    prompt = BuiltPrompt.plain(ids, system=spec.system, user="" if tokenizer else message)
    return Step(prompt=prompt, keep_tokens=0, draft_ids=(), max_new_tokens=spec.max_new_tokens)


# A whole number or one with decimals, not inside a word, a list number, a version or a percentage, and not negative.
_NUMBER = r"(?<![\w.,/\u2212-])(?>\d+(?:[.,]\d+)?)(?![\w%])"
_OUT_OF = r"(?:\s*(?:/|out\s+of)\s*(?P<{0}>\d++))?+"
_RANGE = r"(?P<{0}>\s*(?:-|\u2013|\u2026|\.\.|to|or|and)\s*\d)?+"
# What a grade would take, or stands for, is not given: "a score of 10 would need the park", "grade 10 means right".
_GIVEN = r"(?!\s+(?:would|could|might|should|means?|needs?|requires?|stands?)\b)"
_LABELLED = re.compile(
    r"\b(?:grade|graded|score|scored|rating|rated|mark|verdict|final)\b(?:\s*\([^)\n]*\)|\s+out\s+of\s+\d+)?"
    r"(?:[^\w\u2212-]|-(?!\d)|\b(?:is|of|as|be|at|a|an|the|this|it|answer|grade|score|rating|mark|verdict|would|will)\b)*"
    rf"(?P<number>{_NUMBER}){_OUT_OF.format('scale')}{_RANGE.format('range')}{_GIVEN}",
    re.IGNORECASE,
)
_BRACKETED = re.compile(rf"\[\[\s*(?P<number>{_NUMBER}){_OUT_OF.format('scale')}{_RANGE.format('range')}\s*\]\]", re.IGNORECASE)
_FRACTION = re.compile(
    rf"(?<!\bnot )(?P<number>{_NUMBER})\s*(?:/|out\s+of)\s*(?P<scale>\d+)(?P<range>)(?=[^\w\n]*(?:$|\n)|\s*[.,;:!)\]*])", re.IGNORECASE
)
_ALONE = re.compile(rf"^[^\w\n\u2212-]*(?P<number>{_NUMBER})(?P<scale>)(?P<range>)[^\w\n]*$", re.MULTILINE)


def read_grade(reply: str, spec: JudgeSpec) -> int | Unscored:
    """The last grade that ``reply`` offers.

    A grade is a whole number of the scale: after a word such as ``grade``, ``score``, ``rating`` or ``final``; in double
    brackets; as ``8/10`` or ``8 out of 10``; or alone on a line. A judge that thinks aloud often names a grade before it
    settles, so the last one counts; if that one is outside the scale, of another scale, or a range, there is no grade.

    Returns:
        The grade, or ``Unscored`` with the reason and the beginning of what was said instead.
    """
    # Of a reasoning model's reply only what follows its reasoning; nothing if it came to no end.
    said = reply.rpartition("</think>")[2].partition("<think>")[0]
    offers = [match for pattern in (_LABELLED, _BRACKETED, _FRACTION, _ALONE) for match in pattern.finditer(said)]
    # "Two of three, 2/3" is no grade; the same after the word "score" is one, of a scale that was not asked for.
    offers = [match for match in offers if match.re is not _FRACTION or match["scale"] == str(spec.highest)]
    if not offers:
        return Unscored(reason=f"the judge gave no grade: {_beginning(said)}")
    last = max(offers, key=lambda match: (match.start("number"), match.re is _LABELLED))
    value = float(last["number"].replace(",", "."))
    if last["range"]:
        return Unscored(reason=f"the judge gave no single grade: {_beginning(last[0])}")
    if last["scale"] and last["scale"] != str(spec.highest):
        return Unscored(reason=f"the judge graded out of {_shortened(last['scale'])}, not out of {spec.highest}")
    if not value.is_integer() or not spec.lowest <= value <= spec.highest:
        return Unscored(
            reason=f"the judge gave {_shortened(last['number'])}, which is no whole number from {spec.lowest} to {spec.highest}"
        )
    return int(value)


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return repr(_shortened(line)) if line else "nothing"


def _shortened(line: str) -> str:
    return line if len(line) <= _QUOTED_CHARS else f"{line[: _QUOTED_CHARS - 3]}..."
