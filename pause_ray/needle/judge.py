"""Builds the prompt for a model that grades answers, and reads the grade from its reply. Calls no model and reads no files.

A reply counts only if it has a grade from the scale that the prompt states. After any other reply the answer is ``Unscored``; it never
gets the lowest grade instead.
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
    """The instructions for a judge and the scale of its grades (``eval/judges/*.yaml``)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name, which becomes part of the ledger's ``scorer``."""
    lowest: int = 1
    """Grade of a completely wrong answer, which is a score of 0."""
    highest: int = 10
    """Grade of a completely right answer, which is a score of 1."""
    system: str | None = None
    """System message; null sends none."""
    prompt: str
    """User message. The placeholders {question}, {references} (texts that a right answer contains), {facts} (the hidden texts that
    contain them, one per line), {answer}, {lowest} and {highest} are replaced; placeholders in the inserted texts are not."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Token limit of a reply; a reply that reaches it leaves the answer unscored."""

    @model_validator(mode="after")
    def _check_prompt_and_scale(self) -> Self:
        named = set(_PLACEHOLDER.findall(self.prompt))
        if unknown := sorted(named - set(_VALUES)):
            raise ValueError(f"prompt names {{{unknown[0]}}}, which is no placeholder; use {', '.join(_VALUES)}")
        if "answer" not in named or not named & {"references", "facts"}:
            raise ValueError("prompt must contain {answer}, and {references} or {facts} to compare it with")
        if self.lowest < 0 or self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} must be at least 0 and below highest {self.highest}")
        return self

    def user_message(self, *, question: str, references: Sequence[str], facts: Sequence[str], answer: str) -> str:
        """Return the prompt with its placeholders replaced for one answer."""
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
        """Convert a grade to the ledger's scale from 0 to 1."""
        return (grade - self.lowest) / (self.highest - self.lowest)


def judge_step(message: str, *, spec: JudgeSpec, tokenizer: ModelTokenizer | None) -> Step:
    """Return the request to the judge's engine.

    Args:
        message: The user message, as ``spec.user_message`` returns it.
        spec: The judge's instructions.
        tokenizer: The judge's tokenizer. None for a chat endpoint, whose server tokenizes; the prompt then has no token ids.

    Raises:
        TextError: The message cannot be tokenized, for example because the answer ends within a Unicode character.
        ModelError: The judge's chat template rejects the messages.
    """
    prefix: Sequence[int] = ()
    suffix: Sequence[int] = ()
    text = np.empty(0, dtype=np.int32)
    if tokenizer is not None:
        prefix, suffix = tokenizer.chat_frame(spec.system, "", "")
        # ``encode`` treats control tokens that are written out in an answer as plain text.
        text = tokenizer.encode(message).ids
    ids = np.concatenate([np.array(prefix, dtype=np.int32), text, np.array(suffix, dtype=np.int32)])
    prompt = BuiltPrompt.plain(ids, system=spec.system, user="" if tokenizer else message)
    return Step(prompt=prompt, keep_tokens=0, draft_ids=(), max_new_tokens=spec.max_new_tokens)


# A number with or without decimals that is not negative and not part of a word, a list number, a version or a percentage.
_NUMBER = r"(?<![\w.,/\u2212-])(?>\d+(?:[.,]\d+)?)(?![\w%])"
_OUT_OF = r"(?:\s*(?:/|out\s+of)\s*(?P<{0}>\d++))?+"
_RANGE = r"(?P<{0}>\s*(?:-|\u2013|\u2026|\.\.|to|or|and)\s*\d)?+"
# A number followed by such a verb explains the scale and is not the grade: "a score of 10 would need the park", "grade 10 means right".
_NOT_EXPLAINED = r"(?!\s+(?:would|could|might|should|means?|needs?|requires?|stands?)\b)"
_LABELLED = re.compile(
    r"\b(?:grade|graded|score|scored|rating|rated|mark|verdict|final)\b(?:\s*\([^)\n]*\)|\s+out\s+of\s+\d+)?"
    r"(?:[^\w\u2212-]|-(?!\d)|\b(?:is|of|as|be|at|a|an|the|this|it|answer|grade|score|rating|mark|verdict|would|will)\b)*"
    rf"(?P<number>{_NUMBER}){_OUT_OF.format('scale')}{_RANGE.format('range')}{_NOT_EXPLAINED}",
    re.IGNORECASE,
)
_BRACKETED = re.compile(rf"\[\[\s*(?P<number>{_NUMBER}){_OUT_OF.format('scale')}{_RANGE.format('range')}\s*\]\]", re.IGNORECASE)
_FRACTION = re.compile(
    rf"(?<!\bnot )(?P<number>{_NUMBER})\s*(?:/|out\s+of)\s*(?P<scale>\d+)(?P<range>)(?=[^\w\n]*(?:$|\n)|\s*[.,;:!)\]*])", re.IGNORECASE
)
_ALONE = re.compile(rf"^[^\w\n\u2212-]*(?P<number>{_NUMBER})(?P<scale>)(?P<range>)[^\w\n]*$", re.MULTILINE)


def read_grade(reply: str, spec: JudgeSpec) -> int | Unscored:
    """Read the last grade in a judge's reply.

    A grade is a whole number on the scale: after a word such as ``grade``, ``score``, ``rating`` or ``final``; in double brackets; as
    ``8/10`` or ``8 out of 10``; or alone on a line. Judges that reason in their reply often mention a grade before they decide, so the
    last one counts. If the last one is outside the scale, on another scale or a range, there is no grade.

    Returns:
        The grade, or ``Unscored`` with the reason and the beginning of the reply.
    """
    # Only the text after a model's reasoning counts; if the reasoning has no end, nothing does.
    answer = reply.rpartition("</think>")[2].partition("<think>")[0]
    candidates = [match for pattern in (_LABELLED, _BRACKETED, _FRACTION, _ALONE) for match in pattern.finditer(answer)]
    # "Two of three, 2/3" is no grade. After the word "score" it would be one, but on the wrong scale.
    candidates = [match for match in candidates if match.re is not _FRACTION or match["scale"] == str(spec.highest)]
    if not candidates:
        return Unscored(reason=f"the judge gave no grade: {_beginning(answer)}")
    last = max(candidates, key=lambda match: (match.start("number"), match.re is _LABELLED))
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
