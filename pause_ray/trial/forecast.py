"""What scoring a trial will take, from texts, tokenizer and the model's config: no weights are fetched or loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from pause_ray.engines.cost import ModelShape
from pause_ray.engines.engine import HfEngineSpec, Reuse, default_chunk_tokens, grain_of
from pause_ray.engines.model_source import resolve_model
from pause_ray.needle.answer import Reader
from pause_ray.needle.haystack import load_haystack, prompt_builder
from pause_ray.needle.task import cells
from pause_ray.needle.walk import Forecast, forecast, plan
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

    def as_json(self) -> JsonObject:
        """Plain data."""
        return {**asdict(self), "by_reuse": {reuse: asdict(found) for reuse, found in self.by_reuse.items()}}


def forecast_trial(spec: TrialSpec, *, cache: Path) -> TrialForecast:
    """Build the trial's prompts and plan their walk.

    Raises:
        ModelError: unknown model, or a config that does not tell its shape.
        SourceError: a document that cannot be read.
        TextError: a prompt cannot be built.
    """
    model_dir = resolve_model(spec.model, cache=cache, weights=False)
    tokenizer = ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, spec.pauses)
    haystack = load_haystack(spec.eval, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
    builder = prompt_builder(haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed)
    reader = Reader(builder=builder, tokenizer=tokenizer, policy=spec.pauses, marker=marker, max_new_tokens=spec.eval.max_new_tokens)
    grid = cells(spec.eval, identity="", replicate=spec.replicate, seed=spec.data_seed)
    prompts = reader.prompts(grid)
    engine = spec.engine if isinstance(spec.engine, HfEngineSpec) else HfEngineSpec()
    chunk = engine.chunk_tokens or default_chunk_tokens(on_gpu=bool(spec.resources.scoring_gpus_per_actor))
    grain = grain_of(dtype=spec.model.dtype, quantize=spec.model.quantize, chunk_tokens=chunk)
    shape = ModelShape.load(model_dir)

    def of(reuse: Reuse) -> Forecast:
        walk = plan([prompt.ids for prompt in prompts], reuse=reuse, grain_tokens=grain, lengths=[cell.context_tokens for cell in grid])
        return forecast(
            walk,
            shape,
            chunk_tokens=chunk,
            max_new_tokens=spec.eval.max_new_tokens,
            dtype=spec.model.dtype,
            quantize=spec.model.quantize,
        )

    modes: tuple[Reuse, ...] = ("none", "depth", "full")
    return TrialForecast(
        by_reuse={reuse: of(reuse) for reuse in modes},
        reuse=engine.reuse,
        chunk_tokens=chunk,
        num_pauses=sum(prompt.num_pauses for prompt in prompts),
    )


def forecast_table(found: TrialForecast) -> Table:
    """For people: one row per way to share prompts."""
    planned = found.by_reuse[found.reuse]
    table = Table(
        title=f"{planned.num_prompts} prompts, {planned.asked_tokens:,} tokens, {found.num_pauses:,} pauses in them",
        caption=(
            f"answers: up to {planned.answer_flops / 1e12:.3g} TFLOP each · weights {planned.weight_bytes / 2**30:.2f} GiB · "
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
