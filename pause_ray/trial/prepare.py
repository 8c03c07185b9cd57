"""All that must be known of a trial before a process is started for it: model, marker, haystack, lengths, identity.

Everything a user can get wrong about a trial is found here, in seconds, without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pause_ray.checkpoint import Checkpoint
from pause_ray.corpus.shards import Evaluation, ShardJob, shards_digest
from pause_ray.corpus.spec import CorpusSpec
from pause_ray.engines.model_source import model_digest, model_limit_tokens, resolve_model
from pause_ray.errors import ModelError, SpecError
from pause_ray.needle.haystack import Haystack, ask, check_lengths, load_haystack
from pause_ray.needle.task import Cell, cells
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import MANIFEST
from pause_ray.text.tokens import Marker, ModelTokenizer, resolve_marker
from pause_ray.train.launch import FORMAT as TRAINING_FORMAT
from pause_ray.trial.spec import TrialSpec

TRIAL_FORMAT = 1
"""Part of a trial's identity; raised when the same spec begins to ask or grade differently."""


@dataclass(frozen=True, kw_only=True)
class PreparedTrial:
    """A trial that can be run: everything named is there and fits together."""

    spec: TrialSpec
    digest: str
    """Of the spec's defining fields and of the content of everything they name."""
    model_dir: Path
    base_digest: str
    marker: Marker
    shards: ShardJob | None
    """None when nothing is trained."""
    cells: tuple[Cell, ...]


def prepare(spec: TrialSpec, *, cache: Path) -> PreparedTrial:
    """Fetch and check what a trial names.

    Raises:
        UserError: a model, text, marker, adapter or length that does not fit; the message says which and what to do.
    """
    model_dir = resolve_model(spec.model, cache=cache)
    base_digest = model_digest(model_dir, cache=cache)
    limit_tokens = model_limit_tokens(model_dir)
    check_lengths(spec.eval, limit_tokens=limit_tokens, origin=spec.model.source)
    tokenizer = ModelTokenizer.load(model_dir)
    if spec.train and spec.corpus and spec.corpus.sequence_tokens > limit_tokens:
        raise ModelError(
            f"corpus.sequence_tokens {spec.corpus.sequence_tokens} exceeds the {limit_tokens} tokens that {spec.model.source} can read"
        )
    marker = resolve_marker(tokenizer, spec.pauses)
    haystack = load_haystack(spec.eval, cache=cache, seed=spec.seed, replicate=spec.replicate)
    shards = _shard_job(spec, spec.corpus, model_dir, haystack) if spec.train and spec.corpus else None
    adapter = Checkpoint.open(Path(spec.adapter)) if spec.adapter is not None else None
    if adapter is not None:
        adapter.check_fits(base_digest=base_digest, marker=marker.token)
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
    grid = cells(spec.eval, identity=identity, replicate=spec.replicate, seed=spec.data_seed)
    _check_lengths(spec, grid, haystack, tokenizer, marker, limit_tokens=limit_tokens)
    return PreparedTrial(
        spec=spec, digest=identity, model_dir=model_dir, base_digest=base_digest, marker=marker, shards=shards, cells=tuple(grid)
    )


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
    for field in ("source", "sha256", "revision"):
        del data["model"][field]
    del data["eval"]["haystack"], data["adapter"]
    data.pop("corpus", None)
    return data


def _shard_job(spec: TrialSpec, corpus: CorpusSpec, model_dir: Path, haystack: Haystack) -> ShardJob:
    return ShardJob(
        spec=corpus,
        prompt=corpus.prompt or spec.eval.prompt,
        policy=spec.pauses,
        model_dir=model_dir,
        seed=spec.data_seed,
        evaluation=Evaluation(
            document_digests=frozenset(haystack.document_digests),
            needles=tuple(needle.needle for needle in spec.eval.needles.needles),
            keywords=tuple(word for needle in spec.eval.needles.needles for word in needle.keywords),
        ),
    )


def _check_lengths(
    spec: TrialSpec, grid: list[Cell], haystack: Haystack, tokenizer: ModelTokenizer, marker: Marker, *, limit_tokens: int
) -> None:
    """Build the shortest and the longest prompt: the first may have no room for the needle, the second may exceed the model."""
    by_length = sorted(grid, key=lambda cell: cell.context_tokens)
    for cell in (by_length[0], by_length[-1]):
        prompt = ask(cell, haystack=haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker)
        needed = prompt.prompt_tokens + spec.eval.max_new_tokens
        if needed > limit_tokens:
            raise ModelError(
                f"eval.context_tokens {cell.context_tokens}: {prompt.prompt_tokens} prompt tokens ({prompt.num_pauses} pauses included) "
                f"and {spec.eval.max_new_tokens} for the answer exceed the {limit_tokens} that {spec.model.source} can read; "
                "lower eval.context_tokens, or use pauses.budget: total"
            )
