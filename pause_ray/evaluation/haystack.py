"""The text that facts are hidden in, and the prompt of a cell. Knows documents and prompts, no engine and no Ray."""

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
from pause_ray.text.prompts import BuiltPrompt, HiddenText, PromptBuilder, encode_cached
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
    """In the text's order, each once, even where the text repeats them; none where the text is noise or a task's own lines."""
    joiner: str
    """Between a hidden text and what follows it: a line end where the text is made of lines, else a space."""


@runtime_checkable
class _MakesLines(Protocol):
    """A task with a text of its own."""

    def filler_lines(self, draw: random.Random) -> Iterator[str]:
        """Lines without their ends, for ever."""


def load_haystack(suite: SuiteSpec, *, cache: Path, seed: int, replicate: int, data_seed: int | None = None) -> Haystack:
    """The suite's text: documents, noise, or lines of its task.

    It depends on suite, seed and replicate, and not on how documents are stored. Where it holds something of an answer
    although no fact was hidden in it, a warning says so.

    Args:
        suite: The suite.
        cache: Where packages are kept.
        seed: Of the documents' order and of a task's lines.
        replicate: Which repetition it is for.
        data_seed: The seed of the cells' questions; default: ``seed``.

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
        return _made_of_lines("\n".join([noise] * -(-most_chars // len(noise))))
    if not isinstance(suite.task, _MakesLines):
        raise SourceError(f"suite {suite.name}: task {suite.task.kind} makes no lines of its own; give haystack or noise")
    draw = random.Random(digest([str(seed), str(replicate), "lines"]))  # noqa: S311 (the same lines everywhere)
    text = "\n".join(_long_enough(suite.task.filler_lines(draw), chars=most_chars))
    for _ in _without_facts(suite, facts, [("the text of its task", text)]):
        pass
    return _made_of_lines(text)


def _documents(suite: SuiteSpec, facts: Sequence[Fact], *, cache: Path, seed: int, replicate: int) -> Haystack:
    """The suite's documents in an order of the replicate, repeated where the suite allows it."""
    documents = {document.digest: document for source in suite.haystack for document in read_documents(source, cache=cache)}
    order = sorted(documents, key=lambda name: digest([seed, replicate, name]))
    _check(suite, facts, ((f"document {document.id} of the haystack", document.text) for document in documents.values()))
    texts = [(documents[name].text, detect_paragraph_rule(documents[name].text)) for name in order]
    if suite.repeat_haystack:
        once = sum(len(text) for text, _ in texts)
        times = -(-max(suite.context_tokens) * _CHARS_PER_TOKEN // once)
        if times > 1:
            _say_once(f"suite {suite.name}: its documents hold {once:,} characters; contexts of more read them again (repeat_haystack)")
        texts *= times
    text, rules = join_documents(texts)
    return Haystack(text=text, rules=rules, document_digests=tuple(order), joiner=" ")


def _made_of_lines(text: str) -> Haystack:
    return Haystack(text=text, rules=((0, "newline"),), document_digests=(), joiner="\n")


def _long_enough(lines: Iterable[str], *, chars: int) -> Iterator[str]:
    """The first ``lines`` that, joined, have at least ``chars`` characters."""
    for line in lines:
        yield line
        chars -= len(line) + 1
        if chars < 0:
            return


def _check(suite: SuiteSpec, facts: Sequence[Fact], texts: Iterable[tuple[str, str]]) -> None:
    """Refuse texts that hold a fact; warn of references that they hold. ``texts``: what a message calls each, and the text."""
    references = {reference: plain(reference) for fact in facts for reference in fact.references}
    told: dict[str, list[str]] = {}
    for name, content in _without_facts(suite, facts, texts):
        for reference, wanted in references.items():
            if wanted in content:
                told.setdefault(reference, []).append(name)
    if told:
        shown = [f"{reference!r} ({names[0]}{_and_more(len(names) - 1)})" for reference, names in list(told.items())[:_MOST_NAMED]]
        _say_once(
            f"suite {suite.name}: what a right answer has is in the text already, so it can come from there and not from the needle: "
            f"{', '.join(shown)}{_and_more(len(told) - len(shown))}"
        )


def _without_facts(suite: SuiteSpec, facts: Sequence[Fact], texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The texts as ``plain`` has them, if none holds a fact."""
    hidden = {fact.text: plain(fact.text) for fact in facts}
    for name, text in texts:
        content = plain(text)
        for needle, wanted in hidden.items():
            if wanted in content:
                raise SourceError(
                    f"suite {suite.name}: {name} already contains the needle {needle!r}; use other documents or another needle"
                )
        yield name, content


def _and_more(number: int) -> str:
    return f" and {number} more" if number else ""


@functools.cache
def _say_once(message: str) -> None:
    """In each process; a haystack is loaded for every trial."""
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
    """Prompts of cells over ``haystack``; ``seed`` is the cells'. Tokens of a long haystack are kept in ``cache``."""
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
    """The prompt of one cell, exactly as long as it asks.

    Raises:
        TextError: the length leaves no room for facts and question, or the haystack is too short for it.
    """
    facts = [HiddenText(text=fact.text, depth_percent=fact.depth_percent, position_tokens=fact.position_tokens) for fact in cell.facts]
    return builder.build(facts, question=cell.question, context_tokens=cell.context_tokens, answer_prefix=cell.answer_prefix)


def check_lengths(suite: SuiteSpec, *, limit_tokens: int, origin: str) -> None:
    """Refuse a suite whose contexts, without pauses, are longer than the model takes; needs no model and no text.

    Args:
        suite: The suite.
        limit_tokens: The model's limit (``engines.model_source.model_limit_tokens``).
        origin: The model's name, for the message.

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
