"""The text that facts are hidden in, and the prompt of a cell. Knows documents and prompts, no engine and no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pause_ray.documents import Document, read_documents
from pause_ray.errors import ModelError, SourceError
from pause_ray.needle.task import Cell, SuiteSpec
from pause_ray.spec import digest
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.plain import plain
from pause_ray.text.prompts import BuiltPrompt, build_prompt
from pause_ray.text.segments import DocumentRules, detect_paragraph_rule, join_documents
from pause_ray.text.tokens import Marker, ModelTokenizer

_CHARS_PER_TOKEN = 32
"""More than any tokenizer makes of prose; only bounds how often a short haystack is repeated."""


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """The documents of one replicate in its order."""

    text: str
    rules: DocumentRules
    """Where each document begins in ``text``, and what ends a paragraph in it."""
    document_digests: tuple[str, ...]
    """In the text's order, each once, even where the text repeats them."""


def load_haystack(suite: SuiteSpec, *, cache: Path, seed: int, replicate: int) -> Haystack:
    """The suite's documents in an order that depends on seed, replicate and the documents, not on how they are stored.

    Raises:
        SourceError: no documents, or one that already contains a needle of the suite.
    """
    documents = {document.digest: document for document in _documents(suite, cache=cache)}
    order = sorted(documents, key=lambda name: digest([seed, replicate, name]))
    needles = [(spec.needle, plain(spec.needle)) for spec in suite.needles.needles]
    for document in documents.values():
        content = plain(document.text)
        for needle, wanted in needles:
            if wanted in content:
                raise SourceError(
                    f"suite {suite.name}: document {document.id} of the haystack already contains the needle {needle!r}; "
                    "use other documents or another needle"
                )
    texts = [(documents[name].text, detect_paragraph_rule(documents[name].text)) for name in order]
    if suite.repeat_haystack:
        texts *= -(-max(suite.context_tokens) * _CHARS_PER_TOKEN // sum(len(text) for text, _ in texts))
    text, rules = join_documents(texts)
    return Haystack(text=text, rules=rules, document_digests=tuple(order))


def _documents(suite: SuiteSpec, *, cache: Path) -> Iterator[Document]:
    for source in suite.haystack:
        yield from read_documents(source, cache=cache)


def ask(
    cell: Cell, *, haystack: Haystack, suite: SuiteSpec, tokenizer: ModelTokenizer, policy: PausePolicy | None, marker: Marker
) -> BuiltPrompt:
    """The prompt of one cell, exactly as long as it asks.

    Raises:
        TextError: the length leaves no room for needle and question, or the haystack is too short for it.
    """
    return build_prompt(
        haystack=haystack.text,
        rules=haystack.rules,
        needle=cell.needle.needle,
        question=cell.needle.question,
        context_tokens=cell.context_tokens,
        depth_percent=cell.depth_percent,
        prompt=suite.prompt,
        tokenizer=tokenizer,
        policy=policy,
        marker=marker,
        seed=cell.seed,
    )


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
