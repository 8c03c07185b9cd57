"""What scoring a trial will take, from texts, tokenizer and the model's config: no weights are fetched or loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from pause_ray.checkpoint import Checkpoint
from pause_ray.engines.cost import ModelShape
from pause_ray.engines.engine import HfEngineSpec, Reuse, default_chunk_tokens, grain_of
from pause_ray.engines.model_source import model_limit_tokens, resolve_model
from pause_ray.needle.answer import Reader
from pause_ray.needle.haystack import check_fits, check_lengths, load_haystack, prompt_builder
from pause_ray.needle.task import cells
from pause_ray.needle.walk import Forecast, Walk, forecast, plan, split_for_actors
from pause_ray.spec import JsonObject
from pause_ray.text.tokens import ModelTokenizer, resolve_marker
from pause_ray.trial.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class TrialForecast:
    """One trial's scoring, for every way to share prompts."""

    by_reuse: dict[Reuse, Forecast]
    reuse: Reuse
    """What the spec asks for."""
    chunk_tokens: int
    """Prompt tokens per forward pass that were assumed."""
    num_pauses: int
    """Marker groups in all prompts."""
    pause_tokens: int
    """Tokens of them."""
    num_actors: int
    """Among which the prompts are divided; weights, keys and values are in each."""

    def as_json(self) -> JsonObject:
        """Plain data."""
        return {**asdict(self), "by_reuse": {reuse: asdict(found) for reuse, found in self.by_reuse.items()}}


def forecast_trial(spec: TrialSpec, *, cache: Path, tokenizer: ModelTokenizer | None = None) -> TrialForecast:
    """Build the trial's prompts and plan their walk, or the walks of several actors.

    Args:
        spec: Any trial.
        cache: Of models and texts.
        tokenizer: The model's, where the caller has it already.

    Raises:
        ModelError: unknown model, a config that does not tell its shape, or a prompt that is too long for the model.
        CheckpointError: no adapter where the spec names one.
        SourceError: a document that cannot be read.
        TextError: a prompt cannot be built.
    """
    model_dir = resolve_model(spec.model, cache=cache, weights=False)
    limit_tokens = model_limit_tokens(model_dir)
    check_lengths(spec.eval, limit_tokens=limit_tokens, origin=spec.model.source)
    if spec.adapter is not None:
        Checkpoint.open(Path(spec.adapter))
    tokenizer = tokenizer or ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, spec.pauses)
    haystack = load_haystack(spec.eval, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
    builder = prompt_builder(haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed)
    reader = Reader(builder=builder, tokenizer=tokenizer, policy=spec.pauses, marker=marker, max_new_tokens=spec.eval.max_new_tokens)
    grid = cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed)
    prompts = {cell.id: prompt for cell, prompt in zip(grid, reader.prompts(grid), strict=True)}
    for prompt in prompts.values():
        check_fits(prompt, max_new_tokens=spec.eval.max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
    runs = split_for_actors(grid, num_actors=spec.resources.scoring_bounds[1])
    engine = spec.engine if isinstance(spec.engine, HfEngineSpec) else HfEngineSpec()
    chunk = engine.chunk_tokens or default_chunk_tokens(on_gpu=bool(spec.resources.scoring_gpus_per_actor))
    grain = grain_of(dtype=spec.model.dtype, quantize=spec.model.quantize, chunk_tokens=chunk)
    shape = ModelShape.load(model_dir)

    def of(reuse: Reuse) -> Forecast:
        walks = [
            plan(
                [prompts[cell.id].ids for cell in run],
                reuse=reuse,
                grain_tokens=grain,
                lengths=[cell.context_tokens for cell in run],
            )
            for run in runs
        ]
        return forecast(
            Walk(tuple(visit for walk in walks for visit in walk.visits)),
            shape,
            chunk_tokens=chunk,
            decode_batch=engine.answers_together(dtype=spec.model.dtype, quantize=spec.model.quantize),
            max_new_tokens=spec.eval.max_new_tokens,
            dtype=spec.model.dtype,
            quantize=spec.model.quantize,
        )

    modes: tuple[Reuse, ...] = ("none", "depth", "full")
    num_pauses = sum(prompt.num_pauses for prompt in prompts.values())
    return TrialForecast(
        by_reuse={reuse: of(reuse) for reuse in modes},
        reuse=engine.reuse,
        chunk_tokens=chunk,
        num_actors=len(runs),
        num_pauses=num_pauses,
        pause_tokens=num_pauses * len(marker.group_ids),
    )


def forecast_table(found: TrialForecast) -> Table:
    """For people: one row per way to share prompts."""
    planned = found.by_reuse[found.reuse]
    each = f" in each of {found.num_actors} actors" if found.num_actors > 1 else ""
    table = Table(
        title=f"{planned.num_prompts} prompts, {planned.asked_tokens:,} tokens, {found.num_pauses:,} pauses in them",
        caption=(
            f"answers: up to {planned.answer_flops / 1e12:.3g} TFLOP each · weights {planned.weight_bytes / 2**30:.2f} GiB{each} · "
            f"{found.chunk_tokens} prompt tokens per forward pass · → what the spec asks for"
        ),
    )
    table.add_column("reuse")
    for heading in ("tokens computed", "of all asked", "TFLOP of prefill", "less work", "keys and values"):
        table.add_column(heading, justify="right")
    most = found.by_reuse["none"].prefill_flops
    for reuse, row in found.by_reuse.items():
        table.add_row(
            f"→ {reuse}" if reuse == found.reuse else f"  {reuse}",
            f"{row.prefilled_tokens:,}",
            f"{100 * row.prefilled_tokens / row.asked_tokens:.0f} %",
            f"{row.prefill_flops / 1e12:.2f}",
            f"{most / row.prefill_flops:.2f}x",
            f"{row.kv_bytes / 2**30:.2f} GiB",
        )
    return table
