"""Scores an answer by comparing it with references. The scorers are deterministic and need no model, so rescoring is cheap.

On the pause-tuning paper's released answers, the share of keywords correlates with its GPT judge at 0.965. It does not reproduce the
judge's false positives, which are answers that the judge gave 5 or more although they lack the keywords. If the prompt ends with the
beginning of an answer, that beginning is not scored.

A reference also counts when it occurs within a longer word or number (``42`` in ``1423``), as in RULER, needlehaystack 2.0 and
*Lost in the Middle*. References should therefore be long; those that the tasks draw have at least five letters or digits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from pause_ray.core.spec import Spec
from pause_ray.evaluation.suite import Scorer
from pause_ray.inference.engine import PromptStep
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.segments import plain
from pause_ray.text.tokenizer import ModelTokenizer

_EXAMPLE_BEGINS = re.compile(r"<context>|<example>|question:")
"""Text with which a model begins another example of the task. BABILong looks for ``Question`` in lower-case text, so it never finds it."""


class HasReferences(Protocol):
    """A hidden fact, as far as scorers need it."""

    @property
    def references(self) -> tuple[str, ...]:
        """Return the texts from the fact that a right answer contains; a distractor has none."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of scoring one answer."""

    value: float
    """The score, from 0 (wrong) to 1 (right)."""
    fact_scores: tuple[float | None, ...]
    """The share of each fact's references that the answer contains, for every scorer; None for a fact without references."""

    @property
    def rubric(self) -> int:
        """Return the value on the needle-in-a-haystack scale from 1 to 10: 1 + 9 × value, rounded half up.

        An answer with no keyword gets 1 and an answer with all of them 10; with one or two of three keywords it gets 4 or 7, as in the
        paper's rubric.
        """
        return int(1.5 + 9 * self.value)


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """An answer that has no score. Such answers are counted and reported; they do not enter averages and are not zeros."""

    reason: str
    """The reason why there is no score."""


def grade(
    response: str, facts: Sequence[HasReferences], *, scorer: Scorer, labels: Sequence[str] = (), question: str = ""
) -> Score | Unscored:
    """Score one answer.

    An empty response contains no reference and scores 0. A cell without a response is unscored, and its caller does not call this.

    Args:
        response: The text that the model wrote, without the answer prefix that the prompt gave it.
        facts: The hidden facts; their order matters only to ``exact``.
        scorer: The rule by which the answer is scored.
            ``keywords``: the share of all references that occur in the answer, after normalisation by ``text.plain.plain``.
            ``all``: 1 if all references occur.
            ``exact``: 1 if the answer consists of the references in their order, ignoring letter case, punctuation, white space and the
            word ``and`` (SQuAD's exact match, arXiv 1606.05250, without its rule for articles).
            ``string_match``: RULER's metric for retrieval and tracking (arXiv 2404.06654): the share of references that occur letter by
            letter, ignoring case.
            ``label``: BABILong's metric (arXiv 2406.10149): 1 if the first sentence contains the reference and no other label; labels
            that the question names are ignored.
            ``chain_progress``: the labels form a chain, and the score is the position of the last one that occurs, as a share of the
            chain's length (as in needlehaystack 2.0, which also counts the label in the question).
        labels: All possible answers of the task, for ``label`` and ``chain_progress``.
        question: The question, for ``label``.

    Returns:
        The score, or ``Unscored`` if there are no references, or no labels for a scorer that needs them.
    """
    references = [reference for fact in facts for reference in fact.references]
    if not references:
        return Unscored(reason="no references: nothing says what a right answer contains")
    if scorer in ("label", "chain_progress") and not labels:
        return Unscored(reason=f"no labels: scorer {scorer} compares them with the answer")
    normal = _lowercase if scorer == "string_match" else plain
    fact_scores = tuple(_share(fact.references, response, normal=normal) if fact.references else None for fact in facts)
    share = _share(references, response, normal=normal)
    if scorer in ("keywords", "string_match"):
        value = share
    elif scorer == "all":
        value = float(share == 1)
    elif scorer == "exact":
        value = float(_words(response) == _words(" ".join(references)))
    elif scorer == "label":
        value = float(_named_labels(response, labels=labels, question=question) == {plain(reference) for reference in references})
    else:
        value = _chain_progress(response, labels=labels)
    return Score(value=value, fact_scores=fact_scores)


def _share(references: Sequence[str], response: str, *, normal: Callable[[str], str]) -> float:
    answer = normal(response)
    return sum(normal(reference) in answer for reference in references) / len(references)


def _lowercase(text: str) -> str:
    return text.lower()


def _words(text: str) -> list[str]:
    """Return the normalised words without punctuation and without the word ``and``."""
    kept = "".join(letter for letter in plain(text) if not unicodedata.category(letter).startswith("P"))
    return [word for word in kept.split() if word != "and"]


def _named_labels(response: str, *, labels: Sequence[str], question: str) -> set[str]:
    """Return the labels that the first sentence names and the question does not."""
    sentence = _EXAMPLE_BEGINS.split(plain(response).split(".")[0])[0]
    return {name for name in map(plain, labels) if name in sentence and name not in plain(question)}


def _chain_progress(response: str, *, labels: Sequence[str]) -> float:
    answer = plain(response)
    reached: Iterable[int] = (place for place, label in enumerate(labels, start=1) if plain(label) in answer)
    return max(reached, default=0) / len(labels)


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


def judge_step(message: str, *, spec: JudgeSpec, tokenizer: ModelTokenizer | None) -> PromptStep:
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
    return PromptStep(prompt=prompt, keep_tokens=0, draft_ids=(), max_new_tokens=spec.max_new_tokens)


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
