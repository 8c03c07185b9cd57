"""All that must be known of a trial before a process is started for it: model, marker, haystack, lengths, identity.

Everything a user can get wrong about a trial is found here, in seconds, without a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from pause_ray.core.errors import ModelError, SpecError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import MANIFEST
from pause_ray.data.pipeline import Evaluation, ShardJob, shards_digest
from pause_ray.data.spec import CorpusSpec
from pause_ray.evaluation.haystack import Haystack, ask, check_fits, check_lengths, load_haystack, prompt_builder
from pause_ray.evaluation.suite import Cell, cells, known_facts
from pause_ray.inference.engine import HfEngineSpec
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.models.sources import model_digest, model_limit_tokens, read_config, resolve_model, row_limit_tokens
from pause_ray.text.tokenizer import Marker, ModelTokenizer, resolve_marker
from pause_ray.training.launch import FORMAT as TRAINING_FORMAT
from pause_ray.trial.spec import TrialSpec

TRIAL_FORMAT = 2
"""Part of a trial's identity; raised when the same spec begins to ask or grade differently."""


@dataclass(frozen=True, kw_only=True)
class PreparedTrial:
    """A trial that can be run: everything named is there and fits together."""

    spec: TrialSpec
    digest: str
    """Of the spec's defining fields and of the content of everything they name."""
    model_dir: Path
    base_digest: str
    """Of the base weights, or of what names them where a server holds them."""
    marker: Marker
    shards: ShardJob | None
    """None when nothing is trained."""

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """What it is asked; made when it is needed, since a sweep keeps a thousand trials and asks the cells of a few."""
        return tuple(cells(self.spec.eval, identity=self.digest, replicate=self.spec.replicate, seed=self.spec.data_seed))


@dataclass(frozen=True)
class Seen:
    """What was read and checked for other trials of the same process, most of which share text and prompts."""

    haystacks: dict[str, Haystack] = field(default_factory=dict)
    """By digest of what decides them; the last one only, which is what neighbouring trials share."""
    tokenizers: dict[Path, ModelTokenizer] = field(default_factory=dict)
    """By model folder."""
    fitting: set[str] = field(default_factory=set)
    """Digests of prompts' ingredients that are known to fit."""


def prepare(spec: TrialSpec, *, cache: Path, seen: Seen | None = None) -> PreparedTrial:
    """Fetch and check what a trial names.

    Args:
        spec: The trial.
        cache: For packages and models.
        seen: Of other trials, and added to; what they share is not read and checked again. Files must not change in between.

    Raises:
        UserError: a model, text, marker, adapter or length that does not fit; the message says which and what to do.
    """
    has_weights = spec.train is not None or isinstance(spec.engine, HfEngineSpec)
    model_dir = resolve_model(spec.model, cache=cache, weights=has_weights)
    seen = seen or Seen()
    if model_dir not in seen.tokenizers:
        seen.tokenizers[model_dir] = ModelTokenizer.load(model_dir)
    tokenizer = seen.tokenizers[model_dir]
    base_digest = model_digest(model_dir, cache=cache) if has_weights else digest([spec.engine.identity(), tokenizer.digest])
    limit_tokens = model_limit_tokens(model_dir)
    check_lengths(spec.eval, limit_tokens=limit_tokens, origin=spec.model.source)
    row_tokens = row_limit_tokens(model_dir)
    if spec.train and spec.corpus and spec.corpus.sequence_len > row_tokens:
        raise ModelError(
            f"corpus.sequence_len {spec.corpus.sequence_len} exceeds the {row_tokens} tokens of which {spec.model.source} can learn"
        )
    if spec.train:
        config = read_config(model_dir / "config.json")
        spec.train.lora.check_rank(int(config.get("text_config", config).get("hidden_size", spec.train.lora.rank)))
    marker = resolve_marker(tokenizer, spec.pauses)
    haystack = _haystack(spec, cache=cache, seen=seen)
    shards = _shard_job(spec, spec.corpus, model_dir, haystack) if spec.train and spec.corpus else None
    adapter = Checkpoint.open(Path(spec.adapter)) if spec.adapter is not None else None
    if adapter is not None:
        if has_weights:
            adapter.check_fits(base_digest=base_digest, tokenizer_digest=tokenizer.digest, marker=marker.token)
        _check_unseen(adapter, haystack)
    identity = digest(
        {
            "formats": [TRIAL_FORMAT, TRAINING_FORMAT],
            "spec": _named_by_content(spec),
            "model": base_digest,
            "tokenizer": tokenizer.digest,
            "haystack": list(haystack.document_digests),
            "shards": shards_digest(shards) if shards else None,
            "adapter": digest((adapter.folder / MANIFEST).read_bytes()) if adapter else None,
        }
    )
    pauses = spec.pauses.resolved() if spec.pauses else None
    prompts = digest([spec.eval.resolved(), pauses, str(model_dir), tokenizer.digest, limit_tokens, spec.seed, spec.replicate])
    if prompts not in seen.fitting:
        _check_lengths(spec, haystack, tokenizer, marker, limit_tokens=limit_tokens, cache=cache)
        seen.fitting.add(prompts)
    return PreparedTrial(spec=spec, digest=identity, model_dir=model_dir, base_digest=base_digest, marker=marker, shards=shards)


def _haystack(spec: TrialSpec, *, cache: Path, seen: Seen) -> Haystack:
    key = digest([spec.eval.resolved(), spec.seed, spec.replicate])
    if key not in seen.haystacks:
        seen.haystacks.clear()
        seen.haystacks[key] = load_haystack(spec.eval, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
    return seen.haystacks[key]


def _check_unseen(adapter: Checkpoint, haystack: Haystack) -> None:
    shared = adapter.document_digests & frozenset(haystack.document_digests)
    if shared:
        raise SpecError(
            f"adapter {adapter.folder}: was trained on {len(shared)} of the {len(haystack.document_digests)} documents of eval.haystack; "
            "choose documents it was not trained on (haystack from_percent, to_percent), or train an adapter on others"
        )


def _named_by_content(spec: TrialSpec) -> JsonObject:
    """The defining fields without those that only say where content is; its digests stand for them."""
    data = spec.defining()
    for place in ("source", "sha256", "revision", "rope"):
        del data["model"][place]
    del data["eval"]["haystack"], data["adapter"]
    data.pop("corpus", None)
    return data


def _shard_job(spec: TrialSpec, corpus: CorpusSpec, model_dir: Path, haystack: Haystack) -> ShardJob:
    facts = known_facts(spec.eval, seed=spec.data_seed, replicate=spec.replicate)
    return ShardJob(
        spec=corpus,
        prompt=corpus.prompt or spec.eval.prompt,
        policy=spec.pauses,
        model_dir=model_dir,
        seed=spec.data_seed,
        evaluation=Evaluation(
            document_digests=frozenset(haystack.document_digests),
            needles=tuple(fact.text for fact in facts),
            keywords=tuple(reference for fact in facts for reference in fact.references),
        ),
    )


def _check_lengths(
    spec: TrialSpec, haystack: Haystack, tokenizer: ModelTokenizer, marker: Marker, *, limit_tokens: int, cache: Path
) -> None:
    """Build the shortest prompts and a longest one: the first may have no room for their facts, the last may exceed the model."""
    grid = cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed)
    builder = prompt_builder(
        haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed, cache=cache
    )
    shortest, longest = min(spec.eval.context_tokens), max(spec.eval.context_tokens)
    extremes = [cell for cell in grid if cell.context_tokens == shortest]
    for cell in [*extremes, next(cell for cell in reversed(grid) if cell.context_tokens == longest)]:
        check_fits(ask(cell, builder), max_new_tokens=spec.eval.max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
