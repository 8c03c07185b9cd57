"""A sweep in MLflow: a parent run per sweep, a child run per finished trial.

Everything sent is read back from the sweep's and trials' folders, so it can be sent again: what is there already is
skipped, what was sent in part or while a trial was training is completed, nothing is sent twice.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pause_ray import figures, heatmaps
from pause_ray.compare import summarize
from pause_ray.findings import headline, noise_words, notes
from pause_ray.needle.ledger import to_parquet
from pause_ray.places import axis_of, score_fields
from pause_ray.results import Condition, Contrast, SweepResults, TrialResult, read_results, spent
from pause_ray.spec import digest
from pause_ray.storage import MANIFEST, Storage
from pause_ray.tracking.store import Run, connected
from pause_ray.train.telemetry import training_series
from pause_ray.words import number, p_value, signed, span

CONTENT_FIELDS = ("eval.task.needles", "eval.task.groups", "eval.noise", "corpus.facts")
"""Parts of a trial that are text, not parameters; sent as a digest, and whole in ``spec.json``."""
CORPUS_METRICS = ("documents", "rows", "pauses_per_1k_tokens", "longest_stretch_tokens")
"""Of the training text's statistics; all of them are in the trial's ``manifest.json``."""
MOST_PARAM_CHARS = 500
CONTENT_VERSION = 5
"""Raised when other values are sent for the same files, so that runs logged before are brought up to date."""
WAITING = "MLflow: waiting for %s"
logger = logging.getLogger("pause_ray")


class LoggedSweep(NamedTuple):
    """Where a sweep is in MLflow."""

    experiment_id: str
    run_id: str
    """Of the parent run."""


def log_sweep(sweep_folder: Path, storage: Storage, *, uri: str | None = None) -> LoggedSweep:
    """Bring MLflow up to date with what the sweep has on storage, the report included if there is one.

    Args:
        sweep_folder: Folder with ``sweep.json``.
        storage: Where the trials are.
        uri: As in ``tracking_uri``.

    Raises:
        TrackingError: the server cannot be reached or refuses; what was sent stays and the next call goes on.
        StorageError: the sweep's or a trial's files are damaged.
    """
    results = read_results(sweep_folder, storage)
    with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
        parent = _sweep_run(results)
        children = {trial.digest: (condition, trial) for condition in results.conditions for trial in condition.trials}
        with connected(storage, experiment=results.name, uri=uri, waiting=lambda holder: logger.warning(WAITING, holder)) as sender:
            parent_id = sender.send(parent)
            logged = sender.logged_children(parent_id)
            for key, (condition, trial) in children.items():
                if logged.get(key) != _content(condition, trial):
                    sender.send(_trial_run(condition, trial, scratch=Path(scratch)), parent_id=parent_id)
    return LoggedSweep(sender.experiment_id, parent_id)


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


def _sweep_run(results: SweepResults) -> Run:
    finished, planned = len(results.trials), results.num_planned
    ends = [_ended_ms(trial) for trial in results.trials]
    files = [(results.folder / name, "") for name in ("sweep.json", "report.html", "arms.csv")]
    files += [(path, "figures") for path in sorted((results.folder / "figures").glob("*.png"))]
    files = [(path, folder) for path, folder in files if path.is_file()]
    description = _description(results)
    return Run(
        kind="sweep",
        name=results.name,
        digest=results.digest,
        content=digest([CONTENT_VERSION, description, *(digest(path.read_bytes()) for path, _ in files)]),
        status="FINISHED" if finished == planned else "RUNNING",
        started_ms=min((_started_ms(trial) for trial in results.trials), default=_changed_ms(results.folder / "sweep.json")),
        ended_ms=max(ends, default=0),
        tags={
            "mlflow.note.content": description,
            "mlflow.source.name": str(results.description.get("command", "")),
            "pause_ray.compare_to": results.reference_arm,
            "pause_ray.control": results.control_arm or "",
        },
        params={"trials": str(planned), "arms": str(len(results.conditions))},
        metrics={"trials_finished": float(finished), **_contrast_metrics(results)},
        files=files,
    )


def _trial_run(condition: Condition, trial: TrialResult, *, scratch: Path) -> Run:
    summary, answers, noise = summarize(trial.rows), spent(trial.rows), trial.noise
    folder = scratch / trial.digest
    folder.mkdir()
    to_parquet(trial.rows, folder / "cells.parquet")
    label = _trial_name(condition, trial)
    axis = axis_of([trial.suite])
    figures.save_png(heatmaps.score_heatmaps({label: score_fields(trial.rows, axis=axis)}, axis=axis), folder / "heatmap.png")
    metrics = {
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
    return Run(
        kind="trial",
        name=label,
        digest=trial.digest,
        content=_content(condition, trial),
        status="FINISHED",
        started_ms=_started_ms(trial),
        ended_ms=_ended_ms(trial),
        tags={"pause_ray.arm": trial.arm},
        params=flattened(trial.spec),
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        series=training_series(trial.training),
        files=[
            (path, "") for path in (trial.folder / "spec.json", trial.folder / MANIFEST, folder / "cells.parquet", folder / "heatmap.png")
        ],
    )


def _description(results: SweepResults) -> str:
    """Markdown that MLflow shows on the sweep's page."""
    lines = [headline(results), "", "| arm | score | difference | 95 % interval | p (corrected) | unscored |", "|---|---|---|---|---|---|"]
    for condition in results.conditions:
        summary = condition.summary
        score = "not finished" if summary is None else number(summary.grand_mean)
        unscored = f"{summary.num_unscored} of {summary.num_cells}" if summary else ""
        measured = _measured(condition.against_reference, otherwise="reference" if condition.is_reference else "")
        lines.append(f"| {_cell(condition.label)} | {score} | {measured} | {unscored} |")
    if results.control_contrasts:
        lines += ["", f"| against {results.control_arm} | difference | 95 % interval | p (corrected) |", "|---|---|---|---|"]
        lines += [f"| {_cell(contrast.label)} | {_measured(contrast)} |" for contrast in results.control_contrasts]
    lines += ["", *(f"- {note}" for note in [*noise_words(results), *notes(results)])]
    return "\n".join([*lines, "", "The whole report is the artifact `report.html`."])


def _cell(text: str) -> str:
    """As one cell of a Markdown table: a marker such as ``<|pause|>`` has its ends in it."""
    return text.replace("|", r"\|")


def _measured(contrast: Contrast | None, *, otherwise: str = "") -> str:
    """Difference, interval and p as three Markdown cells."""
    if contrast is None:
        return f"{otherwise} | | "
    interval = contrast.comparison.interval
    words = span(interval.low, interval.high, signs=True) if interval else ""
    return f"{signed(contrast.difference)} | {words} | {p_value(contrast.comparison.p)} ({p_value(contrast.corrected_p)})"


def _content(condition: Condition, trial: TrialResult) -> str:
    """Digest of all that a trial's run is made from: its files, and the names that the sweep gives it."""
    files = [digest((trial.folder / name).read_bytes()) for name in ("spec.json", "cells.jsonl", MANIFEST)]
    return digest([CONTENT_VERSION, _trial_name(condition, trial), trial.arm, *files])


def _trial_name(condition: Condition, trial: TrialResult) -> str:
    return trial_name(condition.label, trial.replicate)


def trial_name(label: str, replicate: int) -> str:
    """Of a trial's run, from its condition's label."""
    return f"{label} #{replicate}"


def _contrast_metrics(results: SweepResults) -> dict[str, float]:
    """Differences of the sweep's conditions, under their labels."""
    found: dict[str, float] = {}
    for kind, contrasts in (("difference", results.contrasts), ("against_control", results.control_contrasts)):
        for contrast in contrasts:
            label = re.sub(r"[^\w\-. :/]", "-", contrast.label)
            found |= {f"{kind}/{label}": contrast.difference, f"{kind}_p/{label}": contrast.corrected_p}
    return found


def _changed_ms(path: Path) -> int:
    return int(path.stat().st_mtime * 1000)


def _ended_ms(trial: TrialResult) -> int:
    return _changed_ms(trial.folder / MANIFEST)


def _started_ms(trial: TrialResult) -> int:
    return _ended_ms(trial) - int(1000 * trial.seconds.get("total", 0.0))
