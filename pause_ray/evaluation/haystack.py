"""The text that facts are hidden in, and the prompt of a cell. The module knows no engine and no Ray."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from pause_ray.core.errors import ModelError, SourceError
from pause_ray.core.spec import digest
from pause_ray.data.documents import read_documents
from pause_ray.evaluation.question import Fact
from pause_ray.evaluation.suite import Cell, SuiteSpec, known_facts
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt, PromptBuilder, encode_cached
from pause_ray.text.segments import DocumentRules, detect_paragraph_rule, join_documents, plain
from pause_ray.text.tokenizer import Marker, ModelTokenizer

log = logging.getLogger("pause_ray")

_CHARS_PER_TOKEN = 32
"""More than any tokenizer makes of prose; only bounds how often a short haystack is repeated, and how many lines are made."""
_MOST_NAMED = 3
"""References that one warning names."""


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """The text of one replicate."""

    text: str
    rules: DocumentRules
    """Where each document begins in ``text``, and what ends a paragraph in it."""
    document_digests: tuple[str, ...]
    """Digests in the text's order, each once, even where the text repeats a document; none for noise or a task's own lines."""
    joiner: str
    """Separator of a hidden text and its successor: a line end where the text is made of lines, else a space."""


@runtime_checkable
class _MakesLines(Protocol):
    """A task with a text of its own."""

    def filler_lines(self, draw: random.Random) -> Iterator[str]:
        """Yield lines without their ends, for ever."""


def load_haystack(suite: SuiteSpec, *, cache: Path, seed: int, replicate: int, data_seed: int | None = None) -> Haystack:
    """Return the suite's text: documents, noise, or lines of its task; ``cache`` holds downloaded packages.

    The text depends on suite, ``seed`` and ``replicate``, and not on how documents are stored. Questions depend on ``data_seed``
    (None: ``seed``); a warning says where the text has a part of an answer although no fact was hidden in it.

    Raises:
        SourceError: no documents, or one that already contains a fact of the suite.
    """
    facts = known_facts(suite, seed=seed if data_seed is None else data_seed, replicate=replicate)
    if suite.haystack:
        return _documents(suite, facts, cache=cache, seed=seed, replicate=replicate)
    most_chars = max(suite.context_tokens) * _CHARS_PER_TOKEN
    if suite.noise is not None:
        noise = suite.noise.strip()
        _check(suite, facts, [("its noise", noise)])
        lines = [noise] * -(-most_chars // len(noise))
    elif isinstance(suite.task, _MakesLines):
        lines, num_chars = list[str](), 0
        for line in suite.task.filler_lines(random.Random(digest([str(seed), str(replicate), "lines"]))):  # noqa: S311
            lines.append(line)
            num_chars += len(line) + 1
            if num_chars > most_chars:
                break
        _check(suite, facts, [("the text of its task", "\n".join(lines))], references=False)
    else:
        raise SourceError(f"suite {suite.name}: task {suite.task.kind} makes no lines of its own; give haystack or noise")
    return Haystack(text="\n".join(lines), rules=((0, "newline"),), document_digests=(), joiner="\n")


def _documents(suite: SuiteSpec, facts: Sequence[Fact], *, cache: Path, seed: int, replicate: int) -> Haystack:
    """Return the suite's documents in the replicate's order, repeated where the suite allows it."""
    documents = {document.digest: document for source in suite.haystack for document in read_documents(source, cache=cache)}
    order = sorted(documents, key=lambda name: digest([seed, replicate, name]))
    _check(suite, facts, ((f"document {document.id} of the haystack", document.text) for document in documents.values()))
    texts = [(documents[name].text, detect_paragraph_rule(documents[name].text)) for name in order]
    if suite.repeat_haystack:
        once = sum(len(text) for text, _ in texts)
        times = -(-max(suite.context_tokens) * _CHARS_PER_TOKEN // once)
        if times > 1:
            _warn_once(f"suite {suite.name}: its documents hold {once:,} characters; contexts of more read them again (repeat_haystack)")
        texts *= times
    text, rules = join_documents(texts)
    return Haystack(text=text, rules=rules, document_digests=tuple(order), joiner=" ")


def _check(suite: SuiteSpec, facts: Sequence[Fact], texts: Iterable[tuple[str, str]], *, references: bool = True) -> None:
    """Refuse texts that have a fact and, with ``references``, warn of those that have a reference; ``texts`` are pairs of name and text."""
    needles = {fact.text: plain(fact.text) for fact in facts}
    answers = {reference: plain(reference) for fact in facts for reference in fact.references if references}
    found: dict[str, list[str]] = {}
    for name, text in texts:
        content = plain(text)
        for needle, wanted in needles.items():
            if wanted in content:
                raise SourceError(
                    f"suite {suite.name}: {name} already contains the needle {needle!r}; use other documents or another needle"
                )
        for reference, wanted in answers.items():
            if wanted in content:
                found.setdefault(reference, []).append(name)
    if found:
        shown = [f"{reference!r} ({names[0]}{_and_more(len(names) - 1)})" for reference, names in list(found.items())[:_MOST_NAMED]]
        _warn_once(
            f"suite {suite.name}: what a right answer has is in the text already, so it can come from there and not from the needle: "
            f"{', '.join(shown)}{_and_more(len(found) - len(shown))}"
        )


def _and_more(number: int) -> str:
    return f" and {number} more" if number else ""


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning once in each process, because a haystack is loaded for every trial."""
    log.warning("%s", message)


def prompt_builder(
    haystack: Haystack,
    *,
    suite: SuiteSpec,
    tokenizer: ModelTokenizer,
    policy: PausePolicy | None,
    marker: Marker,
    seed: int,
    cache: Path | None = None,
) -> PromptBuilder:
    """Return the builder of prompts over ``haystack``; ``seed`` is that of the cells. ``cache`` keeps the tokens of a long haystack."""
    return PromptBuilder(
        haystack.text,
        rules=haystack.rules,
        joiner=haystack.joiner,
        prompt=suite.prompt,
        tokenizer=tokenizer,
        policy=policy,
        marker=marker,
        seed=seed,
        encode=functools.partial(encode_cached, tokenizer=tokenizer, folder=cache / "tokens") if cache else None,
    )


def ask(cell: Cell, builder: PromptBuilder) -> BuiltPrompt:
    """Return the prompt of one cell, exactly as long as it asks.

    Raises:
        TextError: the length leaves no room for facts and question, or the haystack is too short for it.
    """
    return builder.build(cell.facts, question=cell.question, context_tokens=cell.context_tokens, answer_prefix=cell.answer_prefix)


def check_lengths(suite: SuiteSpec, *, limit_tokens: int, origin: str) -> None:
    """Refuse a suite whose contexts, without pauses, are longer than model ``origin`` takes; needs no model and no text.

    Raises:
        ModelError: naming the length, the limit and the longest that fits.
    """
    longest = max(suite.context_tokens)
    if longest + suite.max_new_tokens > limit_tokens:
        raise ModelError(
            f"suite {suite.name}: context_tokens {longest} and an answer of {suite.max_new_tokens} are longer than the {limit_tokens} "
            f"tokens that model {origin} takes; ask for at most {limit_tokens - suite.max_new_tokens} (pauses come on top of that)"
        )


def check_fits(prompt: BuiltPrompt, *, max_new_tokens: int, limit_tokens: int, origin: str) -> None:
    """Refuse a prompt, its pauses included, that leaves no room for its answer; arguments as ``check_lengths``.

    Raises:
        ModelError: naming its lengths and the limit.
    """
    if prompt.prompt_tokens + max_new_tokens > limit_tokens:
        raise ModelError(
            f"eval.context_tokens {prompt.context_tokens}: {prompt.prompt_tokens} prompt tokens ({prompt.num_pauses} pauses included) "
            f"and {max_new_tokens} for the answer exceed the {limit_tokens} that {origin} can read; "
            "lower eval.context_tokens, or use pauses.budget: total"
        )
