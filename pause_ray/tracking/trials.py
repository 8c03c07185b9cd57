"""What a trial is in MLflow: one run, made from its folder; parameters, few metrics, curves, its cells as one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_ray import figures, heatmaps
from pause_ray.compare import summarize
from pause_ray.needle.ledger import to_parquet
from pause_ray.places import axis_of, score_fields
from pause_ray.results import TrialResult, spent
from pause_ray.search_record import Rung, Stop
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import MANIFEST, Storage, read_json
from pause_ray.tracking.store import Run
from pause_ray.train.telemetry import training_series

CONTENT_FIELDS = ("eval.task.needles", "eval.task.groups", "eval.noise", "corpus.facts")
"""Parts of a trial that are text, not parameters; sent as a digest, and whole in ``spec.json``."""
CORPUS_METRICS = ("documents", "rows", "pauses_per_1k_tokens", "longest_stretch_tokens")
"""Of the training text's statistics; all of them are in the trial's ``manifest.json``."""
MOST_PARAM_CHARS = 500
CONTENT_VERSION = 7
"""Raised when other values are sent for the same files, so that runs logged before are brought up to date."""
HEATMAP_DOTS_PER_INCH = 100


def flattened(spec: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """A trial spec as MLflow parameters: dotted path → short text; resources are left out, long content is a digest."""
    found: dict[str, str] = {}
    for name, value in spec.items():
        path = f"{prefix}{name}"
        if path == "resources":
            continue
        if path in CONTENT_FIELDS and value is not None:
            found[path] = f"digest {digest(value)}"
        elif isinstance(value, Mapping) and value:
            found |= flattened(value, prefix=f"{path}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            found |= flattened({str(index): item for index, item in enumerate(value)}, prefix=f"{path}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[path] = text if len(text) <= MOST_PARAM_CHARS else text[: MOST_PARAM_CHARS - 1] + "…"
    return found


def trial_name(label: str, replicate: int) -> str:
    """Of a trial's run, from its condition's label."""
    return f"{label} #{replicate}"


def content_of(trial: TrialResult, *, label: str, rungs: Sequence[Rung]) -> str:
    """Digest of all that a trial's run is made from: its files, the names that the sweep gives it, and its rungs."""
    files = [digest((trial.folder / name).read_bytes()) for name in ("spec.json", "cells.jsonl", MANIFEST)]
    return digest([CONTENT_VERSION, trial_name(label, trial.replicate), trial.arm, len(rungs), *files])


def trial_run(trial: TrialResult, *, label: str, rungs: Sequence[Rung], scratch: Path) -> Run:
    """The run of a finished trial; files that are made for it are put into ``scratch``."""
    folder = scratch / trial.digest
    folder.mkdir()
    to_parquet(trial.rows, folder / "cells.parquet")
    name = trial_name(label, trial.replicate)
    axis = axis_of([trial.suite])
    drawn = heatmaps.score_heatmaps({name: score_fields(trial.rows, axis=axis)}, axis=axis)
    figures.save_png(drawn, folder / "heatmap.png", dots_per_inch=HEATMAP_DOTS_PER_INCH)
    files = (trial.folder / "spec.json", trial.folder / MANIFEST, folder / "cells.parquet", folder / "heatmap.png")
    return Run(
        kind="trial",
        name=name,
        digest=trial.digest,
        content=content_of(trial, label=label, rungs=rungs),
        status="FINISHED",
        started_ms=started_ms(trial),
        ended_ms=ended_ms(trial),
        tags={"pause_ray.arm": trial.arm, "pause_ray.version": str(trial.manifest.get("version", ""))},
        params=flattened(trial.spec),
        metrics={name: float(value) for name, value in _metrics(trial).items() if value is not None},
        series={**training_series(trial.training), **_proxy_series(rungs)},
        files=[(path, "") for path in files],
    )


def stopped_run(entry: JsonObject, stop: Stop, *, label: str, rungs: Sequence[Rung], storage: Storage, at_ms: int) -> Run:
    """The run of a trial that a scheduler stopped: no cells, only what the proxy said.

    Args:
        entry: The trial in ``sweep.json``.
        stop: By whom and where.
        label: Of its condition.
        rungs: Those that it reached.
        storage: Where its spec is.
        at_ms: When the search last wrote something down.
    """
    path = storage.trials / entry["digest"] / "spec.json"
    name = trial_name(label, entry["replicate"])
    return Run(
        kind="trial",
        name=name,
        digest=entry["digest"],
        content=digest([CONTENT_VERSION, name, entry["arm"], "stopped", stop.rung, stop.by, len(rungs)]),
        status="KILLED",
        started_ms=at_ms - int(1000 * sum(rung.seconds for rung in rungs)),
        ended_ms=at_ms,
        tags={"pause_ray.arm": entry["arm"], "pause_ray.stopped": f"at rung {stop.rung} by {stop.by}, on the proxy"},
        params=flattened(read_json(path)) if path.is_file() else {},
        series=_proxy_series(rungs),
    )


def _proxy_series(rungs: Sequence[Rung]) -> dict[str, list[tuple[int, float]]]:
    points = [(rung.step, rung.proxy_score) for rung in rungs if rung.proxy_score is not None]
    return {"proxy_score": points} if points else {}


def _metrics(trial: TrialResult) -> dict[str, float | None]:
    summary, answers, noise = summarize(trial.rows), spent(trial.rows), trial.noise
    return {
        "score": summary.grand_mean,
        "score_middle": summary.middle_mean,
        "score_edges": summary.edge_mean,
        "exact_recall": summary.exact_recall,
        **{f"score_at_{length}_tokens": mean for length, mean in summary.mean_by_length.items()},
        "unscored_share": summary.unscored_share,
        "cells": float(summary.num_cells),
        "prompt_overhead_percent": summary.prompt_overhead_percent,
        "pauses_per_prompt": summary.pauses_per_prompt,
        "prompt_tokens": float(answers.prompt_tokens),
        "prefilled_tokens": float(answers.prefilled_tokens),
        "reused_share": answers.reused_share,
        "decoded_tokens": float(answers.decoded_tokens),
        "answering_seconds": answers.seconds,
        "cost": answers.money,
        "noise_answers_changed_share": noise.num_answers_changed / noise.num_cells if noise else None,
        "noise_scores_changed_share": noise.num_scores_changed / noise.num_cells if noise else None,
        **{f"corpus_{name}": trial.corpus_stats.get(name) for name in CORPUS_METRICS},
    }


def changed_ms(path: Path) -> int:
    """When a file was last written, in milliseconds of Unix time."""
    return int(path.stat().st_mtime * 1000)


def ended_ms(trial: TrialResult) -> int:
    """When it was finished."""
    return changed_ms(trial.folder / MANIFEST)


def started_ms(trial: TrialResult) -> int:
    """When the session that finished it began with it."""
    return ended_ms(trial) - int(1000 * trial.seconds.get("total", 0.0))
