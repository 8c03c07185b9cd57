"""Prepares a trial before any process is started for it: model, marker, haystack, lengths, identity.

Mistakes in a trial are found here, in seconds and without a GPU. Ray is not imported.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pause_ray.core.errors import ModelError, SpecError, TextError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import MANIFEST
from pause_ray.data.spec import CorpusSpec, Evaluation, ShardJob
from pause_ray.evaluation.haystack import Haystack, ask, check_fits, check_lengths, load_haystack, prompt_builder
from pause_ray.evaluation.suite import Cell, SuiteSpec, cells, known_facts, proxy_suite
from pause_ray.inference.engine import HfEngineSpec
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.models.sources import model_digest, model_limit_tokens, read_config, resolve_model, row_limit_tokens
from pause_ray.text.tokenizer import Marker, ModelTokenizer, resolve_marker
from pause_ray.training.spec import FORMAT as TRAINING_FORMAT
from pause_ray.trial.spec import TrialSpec

TRIAL_FORMAT = 2
"""Part of a trial's identity; raised when the same spec begins to give other prompts or scores."""


@dataclass(frozen=True, kw_only=True)
class PreparedTrial:
    """A trial that can be run: everything that its spec names exists and fits together."""

    spec: TrialSpec
    digest: str
    """The digest of the spec's defining fields and of the content of everything they name."""
    model_dir: Path
    base_digest: str
    """The digest of the base weights, or of what names them where a server holds them."""
    marker: Marker
    shards: ShardJob | None
    """The job that makes the training data; None when nothing is trained."""

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The trial's cells, made on demand, since a sweep keeps a thousand trials and needs the cells of a few."""
        return tuple(cells(self.spec.eval, identity=self.digest, replicate=self.spec.replicate, seed=self.spec.data_seed))


@dataclass(frozen=True)
class PrepareCache:
    """Texts, tokenizers and checks of earlier trials in this process, most of which share them."""

    haystacks: dict[str, Haystack] = field(default_factory=dict)
    """The last haystack, which neighboring trials share, by the digest of what decides it."""
    tokenizers: dict[Path, ModelTokenizer] = field(default_factory=dict)
    """Tokenizers by model folder."""
    fitting: set[str] = field(default_factory=set)
    """Digests of what decides prompts, for prompts that are known to fit."""

    def tokenizer(self, model_dir: Path) -> ModelTokenizer:
        """Return the tokenizer of a model folder."""
        if model_dir not in self.tokenizers:
            self.tokenizers[model_dir] = ModelTokenizer.load(model_dir)
        return self.tokenizers[model_dir]

    def haystack(self, spec: TrialSpec, *, cache: Path, proxy: SuiteSpec | None = None) -> Haystack:
        """Return the haystack of a trial, or of a proxy suite for it; ``cache`` is the folder of packages."""
        suite = proxy or spec.eval
        key = digest([suite.resolved(), spec.seed, spec.replicate])
        if key not in self.haystacks:
            self.haystacks.clear()
            self.haystacks[key] = load_haystack(suite, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
        return self.haystacks[key]


def prepare(spec: TrialSpec, *, cache: Path, shared: PrepareCache | None = None) -> PreparedTrial:
    """Fetch and check what a trial names.

    Args:
        spec: The trial.
        cache: The folder of packages and models.
        shared: The cache of other trials, which is added to; what trials share is not read and checked again. Files must not
            change in between.

    Raises:
        UserError: a model, text, marker, adapter or length does not fit; the message says which and what to do.
    """
    has_weights = spec.train is not None or isinstance(spec.engine, HfEngineSpec)
    model_dir = resolve_model(spec.model, cache=cache, weights=has_weights)
    shared = shared or PrepareCache()
    tokenizer = shared.tokenizer(model_dir)
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
    haystack = shared.haystack(spec, cache=cache)
    shards, training = None, None
    if spec.train and spec.corpus:
        shards = _shard_job(spec, spec.corpus, model_dir, haystack, tokenizer_digest=tokenizer.digest)
        training = [TRAINING_FORMAT, digest(shards.identity())]
    adapter = Checkpoint.open(Path(spec.adapter)) if spec.adapter is not None else None
    if adapter is not None:
        if has_weights:
            adapter.check_fits(base_digest=base_digest, tokenizer_digest=tokenizer.digest, marker=marker.token)
        _check_unseen(adapter, haystack)
    identity = digest(
        {
            "format": TRIAL_FORMAT,
            "spec": _named_by_content(spec),
            "model": base_digest,
            "tokenizer": tokenizer.digest,
            "haystack": list(haystack.document_digests),
            "training": training,
            "adapter": digest((adapter.folder / MANIFEST).read_bytes()) if adapter else None,
        }
    )
    prompts = _prompt_digest(spec, model_dir)
    if prompts not in shared.fitting:
        _check_lengths(spec, model_dir, shared=shared, cache=cache)
        shared.fitting.add(prompts)
    return PreparedTrial(spec=spec, digest=identity, model_dir=model_dir, base_digest=base_digest, marker=marker, shards=shards)


def _check_unseen(adapter: Checkpoint, haystack: Haystack) -> None:
    shared = adapter.document_digests & frozenset(haystack.document_digests)
    if shared:
        raise SpecError(
            f"adapter {adapter.folder}: was trained on {len(shared)} of the {len(haystack.document_digests)} documents of eval.haystack; "
            "choose documents it was not trained on (haystack from_percent, to_percent), or train an adapter on others"
        )


def _named_by_content(spec: TrialSpec) -> JsonObject:
    """Return the defining fields without those that only locate content, which digests of the content replace."""
    data = spec.defining()
    for place in ("source", "sha256", "revision", "rope"):
        del data["model"][place]
    del data["eval"]["haystack"], data["adapter"]
    data.pop("corpus", None)
    return data


def _shard_job(spec: TrialSpec, corpus: CorpusSpec, model_dir: Path, haystack: Haystack, *, tokenizer_digest: str) -> ShardJob:
    facts = known_facts(spec.eval, seed=spec.data_seed, replicate=spec.replicate)
    return ShardJob(
        spec=corpus,
        prompt=corpus.prompt or spec.eval.prompt,
        policy=spec.pauses,
        model_dir=model_dir,
        tokenizer_digest=tokenizer_digest,
        seed=spec.data_seed,
        evaluation=Evaluation(
            document_digests=frozenset(haystack.document_digests),
            needles=tuple(fact.text for fact in facts),
            keywords=tuple(reference for fact in facts for reference in fact.references),
        ),
    )


def proxy_lengths(trials: Collection[PreparedTrial], *, facts: int, context_tokens: Sequence[int] | None, cache: Path) -> tuple[int, ...]:
    """Return the lengths at which the proxy can be asked of all ``trials`` of a sweep, so that their scores compare.

    Args:
        trials: The trials that early stopping compares.
        facts: The number of facts in the proxy's context.
        context_tokens: The wanted lengths; None takes the longest length that all suites have and that fits all trials.
        cache: The folder of fetched packages.

    Raises:
        SpecError: the suites have no length in common, or no text to hide facts in.
        ModelError: a prompt is longer than the model takes.
        TextError: a length leaves no room for the facts.
    """
    distinct = {_prompt_digest(trial.spec, trial.model_dir): trial for trial in trials}
    common = set.intersection(*(set(trial.spec.eval.context_tokens) for trial in distinct.values()))
    if context_tokens is None and not common:
        raise SpecError("scheduler: the trials' suites have no length in common; set scheduler.proxy.context_tokens")
    candidates = [tuple(context_tokens)] if context_tokens is not None else [(length,) for length in sorted(common, reverse=True)]
    shared = PrepareCache()
    for lengths in candidates:
        try:
            for trial in distinct.values():
                proxy = proxy_suite(trial.spec.eval, facts=facts, context_tokens=lengths)
                check_lengths(proxy, limit_tokens=model_limit_tokens(trial.model_dir), origin=trial.spec.model.source)
                _check_lengths(trial.spec, trial.model_dir, shared=shared, cache=cache, proxy=proxy)
        except (ModelError, TextError):
            if lengths == candidates[-1]:
                raise
        else:
            return lengths
    raise AssertionError("every suite has a length")


def _prompt_digest(spec: TrialSpec, model_dir: Path) -> str:
    """Return a digest of what decides the prompts of a trial with this model folder."""
    pauses = spec.pauses.resolved() if spec.pauses else None
    return digest([spec.eval.resolved(), pauses, str(model_dir), spec.seed, spec.replicate])


def _check_lengths(spec: TrialSpec, model_dir: Path, *, shared: PrepareCache, cache: Path, proxy: SuiteSpec | None = None) -> None:
    """Build the shortest prompts, which may have no room for their facts, and a longest one, which may exceed the model's limit.

    The prompts of a length of the ``proxy`` differ in the question only, so that one of them is enough.
    """
    tokenizer, haystack = shared.tokenizer(model_dir), shared.haystack(spec, cache=cache, proxy=proxy)
    marker, limit_tokens = resolve_marker(tokenizer, spec.pauses), model_limit_tokens(model_dir)
    suite = proxy or spec.eval
    grid = cells(suite, identity="", replicate=spec.replicate, seed=spec.data_seed)
    builder = prompt_builder(
        haystack, suite=suite, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed, cache=cache
    )
    shortest, longest = min(suite.context_tokens), max(suite.context_tokens)
    extremes = [cell for cell in grid if cell.context_tokens == shortest][: 1 if proxy else None]
    for cell in [*extremes, next(cell for cell in reversed(grid) if cell.context_tokens == longest)]:
        check_fits(ask(cell, builder), max_new_tokens=suite.max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
