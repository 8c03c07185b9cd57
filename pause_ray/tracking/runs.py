"""The MLflow runs of a sweep: a parent run, a child run for each trial that finished or was stopped, and the best trial as a model.

All values are read from the folders of the sweep and its trials, so they can be sent again: a run that is complete is skipped, a run
that was sent in part is completed, and nothing is sent twice.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pause_ray.core.errors import StorageError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import MANIFEST, Storage, is_complete, read_json
from pause_ray.evaluation.compare import summarize
from pause_ray.evaluation.grid import depth_axis, score_grid
from pause_ray.evaluation.ledger import to_parquet
from pause_ray.models.checkpoint import ADAPTER_CONFIG, TRAINING_LOG, Checkpoint
from pause_ray.report import figures
from pause_ray.report.findings import ARM_COLUMNS, arm_cells, control_cells, format_noise, headline, notes
from pause_ray.report.ranking import EXPORT, best, exported, rank_correlations
from pause_ray.report.results import ArmResult, SweepResults, TrialResult, answer_cost, read_trial
from pause_ray.sweep.search import SEARCH_LOG, RungScore, SearchRecord
from pause_ray.sweep.spec import condition_labels
from pause_ray.tracking.store import Run, Sender, connected
from pause_ray.training.metrics import training_series

CONTENT_FIELDS = ("eval.task.needles", "eval.task.groups", "eval.noise", "corpus.facts")
"""Parts of a trial that are text, not parameters; sent as a digest, and whole in ``spec.json``."""
CORPUS_METRICS = ("documents", "rows", "pauses_per_1k_tokens", "longest_stretch_tokens")
"""Statistics of the training text that are sent as metrics; the trial's ``manifest.json`` has all."""
MOST_PARAM_CHARS = 500
CONTENT_VERSION = 7
"""Raised when other values are sent for the same files, so that runs logged before are brought up to date."""
HEATMAP_DOTS_PER_INCH = 100


def flattened(spec: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Return a trial spec as MLflow parameters, without resources: short texts by dotted path, with a digest for long content."""
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
    """Return the name of a trial's run; ``label`` is that of its condition."""
    return f"{label} #{replicate}"


def content_of(trial: TrialResult, *, label: str, rungs: Sequence[RungScore]) -> str:
    """Return the digest of everything in a trial's run: its files, its names in the sweep, and its rungs."""
    files = [digest((trial.folder / name).read_bytes()) for name in ("spec.json", "cells.jsonl", MANIFEST)]
    return digest([CONTENT_VERSION, trial_name(label, trial.replicate), trial.arm, len(rungs), *files])


def trial_run(trial: TrialResult, *, label: str, rungs: Sequence[RungScore], scratch: Path) -> Run:
    """Return the run of a finished trial; writes the files that the run needs into ``scratch``."""
    folder = scratch / trial.digest
    folder.mkdir()
    to_parquet(trial.rows, folder / "cells.parquet")
    name = trial_name(label, trial.replicate)
    axis, (started, ended) = depth_axis([trial.suite]), times_ms(trial)
    drawn = figures.score_heatmaps({name: score_grid(trial.rows, axis=axis)}, axis=axis)
    figures.save_png(drawn, folder / "heatmap.png", dots_per_inch=HEATMAP_DOTS_PER_INCH)
    files = (trial.folder / "spec.json", trial.folder / MANIFEST, folder / "cells.parquet", folder / "heatmap.png")
    return Run(
        kind="trial",
        name=name,
        digest=trial.digest,
        content=content_of(trial, label=label, rungs=rungs),
        status="FINISHED",
        started_ms=started,
        ended_ms=ended,
        tags={"pause_ray.arm": trial.arm, "pause_ray.version": str(trial.manifest.get("version", ""))},
        params=flattened(trial.spec),
        metrics={name: float(value) for name, value in _metrics(trial).items() if value is not None},
        series={**training_series(trial.training), **_proxy_series(rungs)},
        files=[(path, "") for path in files],
    )


def stopped_runs(results: SweepResults, storage: Storage) -> Iterator[Run]:
    """Yield the runs of trials that were stopped early, which have proxy scores and no cells; one that never began has no run."""
    finished = {trial.digest for trial in results.trials}
    for entry in results.description["trials"]:
        key, stop = entry["digest"], results.search.stops.get(entry["digest"])
        if stop is None or key in finished:
            continue
        path, at_ms = storage.trials / key / "spec.json", ended_ms(results.folder / SEARCH_LOG)
        name, rungs = trial_name(results.labels[key], entry["replicate"]), _rungs(results.search, key)
        yield Run(
            kind="trial",
            name=name,
            digest=key,
            content=digest([CONTENT_VERSION, name, entry["arm"], "stopped", stop.rung, stop.by, len(rungs)]),
            status="KILLED",
            started_ms=at_ms - int(1000 * sum(rung.seconds for rung in rungs)),
            ended_ms=at_ms,
            tags={"pause_ray.arm": entry["arm"], "pause_ray.stopped": f"at rung {stop.rung} by {stop.by}, on the proxy"},
            params=flattened(read_json(path)) if path.is_file() else {},
            series=_proxy_series(rungs),
        )


def _proxy_series(rungs: Sequence[RungScore]) -> dict[str, list[tuple[int, float]]]:
    points = [(rung.step, rung.proxy_score) for rung in rungs if rung.proxy_score is not None]
    return {"proxy_score": points} if points else {}


def _metrics(trial: TrialResult) -> dict[str, float | None]:
    summary, answers, noise = summarize(trial.rows), answer_cost(trial.rows), trial.noise
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
        "noise_answers_changed_share": noise["answers_changed"] / noise["cells"] if noise else None,
        "noise_scores_changed_share": noise["scores_changed"] / noise["cells"] if noise else None,
        **{f"corpus_{name}": trial.corpus_stats.get(name) for name in CORPUS_METRICS},
    }


def ended_ms(path: Path) -> int:
    """Return the time of the last write of a file, such as a trial's manifest, in milliseconds of Unix time."""
    return int(path.stat().st_mtime * 1000)


def times_ms(trial: TrialResult) -> tuple[int, int]:
    """Return the times at which the run that finished the trial began it and ended it."""
    ended = ended_ms(trial.folder / MANIFEST)
    return ended - int(1000 * (trial.manifest.get("seconds") or {}).get("total", 0.0)), ended


MOST_CONTRASTS = 8
"""Largest number of contrasts of each kind that are metrics of the parent run; ``arms.csv`` has all."""
MOST_METRIC_CHARS, DIGEST_CHARS = 200, 6
MOST_DESCRIPTION_CHARS = 7800
"""Longest description; MLflow cuts a longer one off in the middle of a word."""
MORE_CHARS = 60
"""Room for the line that counts the arms that are left out."""
logger = logging.getLogger("pause_ray")


class LoggedSweep(NamedTuple):
    """The place of a sweep in MLflow."""

    experiment_id: str
    run_id: str
    """Id of the parent run."""
    model: str | None
    """URI of its best trial as a registered model; None where none was exported, or nothing was trained."""


def log_sweep(results: SweepResults, storage: Storage) -> LoggedSweep:
    """Bring MLflow up to date with a sweep on storage, including its report and its exported best trial if they exist.

    Raises:
        TrackingError: The server cannot be reached or refuses; what was sent stays, and the next call sends the rest.
        StorageError: The sweep's or a trial's files are damaged.
    """
    parent = _sweep_run(results)
    with _sending(results.name, storage) as sender:
        parent_id = sender.send(parent)
        logged = sender.logged_children(parent_id)
        for trial in results.trials:
            _send_trial(sender, trial, results.labels[trial.digest], results.search, parent_id=parent_id, logged=logged)
        for run in stopped_runs(results, storage):
            if logged.get(run.digest) != run.content:
                sender.send(run, parent_id=parent_id)
        model = _register_best(sender, results, parent_id=parent_id)
    return LoggedSweep(sender.experiment_id, parent_id, model)


def log_finished(sweep_folder: Path, storage: Storage, *, sent: set[str]) -> None:
    """Send the runs of finished trials whose digests are not in ``sent``, and add those to it.

    Raises:
        TrackingError: See ``log_sweep``.
        StorageError: A trial's files are damaged; the others were sent.
    """
    sweep = read_json(sweep_folder / "sweep.json")
    entries = [entry for entry in sweep["trials"] if entry["digest"] not in sent and is_complete(storage.trials / entry["digest"])]
    if not entries:
        return
    labels, search = condition_labels(sweep["trials"]), SearchRecord.read(sweep_folder)
    damaged: StorageError | None = None
    with _sending(sweep["name"], storage) as sender:
        parent_id = sender.send(_growing("sweep", name=sweep["name"], key=sweep["digest"]))
        logged = {} if sent else sender.logged_children(parent_id)
        for entry in entries:
            key = entry["digest"]
            try:
                _send_trial(sender, read_trial(entry, storage), labels[key], search, parent_id=parent_id, logged=logged)
            except StorageError as error:
                damaged = error
            sent.add(key)
    if damaged is not None:
        raise damaged


def _send_trial(sender: Sender, trial: TrialResult, label: str, search: SearchRecord, *, parent_id: str, logged: Mapping[str, str]) -> None:
    """Send the run of a finished trial, unless ``logged`` has it with the same content."""
    rungs = _rungs(search, trial.digest)
    if logged.get(trial.digest) != content_of(trial, label=label, rungs=rungs):
        with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
            sender.send(trial_run(trial, label=label, rungs=rungs, scratch=Path(scratch)), parent_id=parent_id)


def _sending(name: str, storage: Storage) -> AbstractContextManager[Sender]:
    return connected(storage, experiment=name, waiting=lambda holder: logger.warning("MLflow: waiting for %s", holder))


def _rungs(search: SearchRecord, trial: str) -> list[RungScore]:
    return [rung for rung in search.rungs if rung.trial == trial]


def _register_best(sender: Sender, results: SweepResults, *, parent_id: str) -> str | None:
    """Register the exported trial as a model of its run, and return the model's URI."""
    manifest, folder = exported(results.folder), results.folder / EXPORT
    if manifest is None or manifest["checkpoint"] is None:
        return None
    run_id = sender.child(parent_id, manifest["trial"])
    if run_id is None:
        return None
    uri = sender.register(
        f"pause_ray-{results.name}",
        run_id=run_id,
        folder=folder,
        content=digest([results.digest, manifest["trial"], manifest["checkpoint"]]),
        tags={"pause_ray.sweep": results.digest, "pause_ray.trial": manifest["trial"], "pause_ray.arm": manifest["arm"]},
    )
    sender.tag(parent_id, {"pause_ray.model": uri})
    return uri


def _sweep_run(results: SweepResults) -> Run:
    times = [times_ms(trial) for trial in results.trials]
    files = [(results.folder / name, "") for name in ("sweep.json", "report.html", "arms.csv", SEARCH_LOG)]
    files += [(path, "figures") for path in sorted((results.folder / "figures").glob("*.png"))]
    files = [(path, folder) for path, folder in files if path.is_file()]
    description, found = _description(results), best(results)
    return Run(
        kind="sweep",
        name=results.name,
        digest=results.digest,
        content=digest([CONTENT_VERSION, description, *(digest(path.read_bytes()) for path, _ in files)]),
        status="FINISHED" if results.is_finished else "RUNNING",
        started_ms=min((started for started, _ in times), default=ended_ms(results.folder / "sweep.json")),
        ended_ms=max((ended for _, ended in times), default=0),
        tags={
            "mlflow.note.content": description,
            "mlflow.source.name": str(results.description.get("command", "")),
            "pause_ray.compare_to": results.reference_arm,
            "pause_ray.control": results.control_arm or "",
            "pause_ray.version": str(results.description.get("version", "")),
            "pause_ray.best": found.condition.label if found else "",
        },
        metrics={  # not parameters, which MLflow never changes: a search that learns as it goes asks for more
            "arms": float(len(results.conditions)),
            "trials_planned": float(results.num_planned),
            "trials_finished": float(len(results.trials)),
            "trials_stopped": float(results.num_stopped),
            **({f"best_{found.objective.metric}": found.value} if found else {}),
            **{f"proxy_rank_agreement/rung {its.rung}": its.tau for its in rank_correlations(results) if its.tau is not None},
            **_contrast_metrics(results),
        },
        files=files,
    )


def _description(results: SweepResults) -> str:
    """Return the Markdown text of the sweep's page in MLflow; without room for all arms it has the reference and the best ones."""
    above = [headline(results), "", _markdown(ARM_COLUMNS), "|---" * len(ARM_COLUMNS) + "|"]
    below = [_markdown(control_cells(contrast)) for contrast in results.control_contrasts[:MOST_CONTRASTS]]
    said = [f"- {note}" for note in [*format_noise(results), *notes(results)]]
    below += ["", *_fitting(said, room=MOST_DESCRIPTION_CHARS // 3)]
    end = ["", "The whole report is the artifact `report.html`."]
    rows = [_markdown(arm_cells(condition)) for condition in sorted(results.conditions, key=_shown_first)]
    room = MOST_DESCRIPTION_CHARS - sum(len(line) + 1 for line in [*above, *below, *end])
    shown = rows if sum(len(row) + 1 for row in rows) <= room else _fitting(rows, room=room - MORE_CHARS)
    more = [_markdown([f"… {len(rows) - len(shown)} more, in `arms.csv`", "", "", "", "", ""])] if len(shown) < len(rows) else []
    return "\n".join([*above, *shown, *more, *below, *end])


def _fitting(lines: Sequence[str], *, room: int) -> list[str]:
    """Return as many of the first lines as fit into ``room`` characters."""
    found = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        found.append(line)
    return found


def _shown_first(condition: ArmResult) -> tuple[bool, float]:
    mean = condition.summary.grand_mean if condition.summary else None
    return not condition.is_reference, 1.0 if mean is None else -mean


def _markdown(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table; markers such as ``<|pause|>`` contain its separator."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _contrast_metrics(results: SweepResults) -> dict[str, float]:
    """Return the differences of the sweep's conditions as metrics."""
    found: dict[str, float] = {}
    for kind, contrasts in (("difference", results.contrasts), ("against_control", results.control_contrasts)):
        for contrast in contrasts[:MOST_CONTRASTS]:
            label = metric_label(contrast.label)
            found |= {f"{kind}/{label}": contrast.difference, f"{kind}_p/{label}": contrast.corrected_p}
    return found


def metric_label(label: str) -> str:
    """Return a condition's label in the characters that MLflow allows; different labels stay different.

    ``every=2`` becomes ``every-2``; a label with other content than names and plain values gets a digest.
    """
    if re.fullmatch(r"\w+( [\w.]+=[\w.\-]+)*", label, flags=re.ASCII) and len(label) <= MOST_METRIC_CHARS:
        return label.replace("=", "-")
    plain = re.sub(r"[^\w\-. ]", "-", label, flags=re.ASCII)[:MOST_METRIC_CHARS].strip()
    return f"{plain} {digest(label)[:DIGEST_CHARS]}"


EXPERIMENT = "training"
"""Name of the experiment with trainings that belong to no sweep."""
CURVES_VERSION = 1
"""Raised like ``CONTENT_VERSION``, for runs of trainings that belong to no sweep."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The run that gets the metrics of a training, with its values at the start."""

    experiment: str
    run: Run
    parent: Run | None
    """The run of the sweep; None for a training that belongs to no sweep."""

    @classmethod
    def of_trial(cls, sweep_folder: Path, trial: str, storage: Storage) -> Training:
        """Return the training of a sweep's trial, which is given by its digest.

        Raises:
            StorageError: The files of the sweep or the trial are missing or damaged.
        """
        sweep = read_json(sweep_folder / "sweep.json")
        entry = next(entry for entry in sweep["trials"] if entry["digest"] == trial)
        name = trial_name(condition_labels(sweep["trials"])[trial], entry["replicate"])
        file = storage.trials / trial / "spec.json"
        spec = read_json(file) if file.is_file() else {}
        return cls(
            experiment=sweep["name"],
            run=_growing("trial", name=name, key=trial, spec=spec, tags={"pause_ray.arm": entry["arm"]}),
            parent=_growing("sweep", name=sweep["name"], key=sweep["digest"]),
        )

    @classmethod
    def alone(cls, spec: JsonObject, *, name: str, checkpoint: str) -> Training:
        """Return the training of a resolved trial spec that belongs to no sweep; ``checkpoint`` is the adapter's digest."""
        run = _growing("training", name=f"{name} {checkpoint[:8]}", key=checkpoint, spec=spec)
        return cls(experiment=EXPERIMENT, run=run, parent=None)


def _growing(kind: str, *, name: str, key: str, spec: JsonObject | None = None, tags: dict[str, str] | None = None) -> Run:
    """Return a run that has not finished."""
    now, params = int(time.time() * 1000), flattened(spec or {})
    return Run(
        kind=kind, name=name, digest=key, content=None, status="RUNNING", started_ms=now, ended_ms=now, tags=tags or {}, params=params
    )


class LiveTrainings:
    """Sends the metrics of trainings that are running. Not safe for several threads at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._run_ids: dict[str, str] = {}
        self._experiments: dict[str, str] = {}
        self._known: dict[tuple[str, str], set[int]] = {}
        """Steps that the store has, by run id and series."""

    def send(self, training: Training, rows: Sequence[JsonObject]) -> None:
        """Append the steps of ``rows`` that the run does not have; a run that is complete has all.

        Raises:
            TrackingError: The store cannot be reached or refuses; the same rows can be sent again.
        """
        with connected(self._storage, experiment=training.experiment) as sender:
            key = training.run.digest
            if key not in self._run_ids:
                parent_id = sender.send(training.parent) if training.parent else None
                self._run_ids[key] = sender.send(training.run, parent_id=parent_id)
                self._experiments[key] = training.experiment
            if not sender.is_whole(self._run_ids[key]):
                self._append(sender, self._run_ids[key], training_series(rows))

    def _append(self, sender: Sender, run_id: str, series: Mapping[str, list[tuple[int, float]]]) -> None:
        for name in series:
            if (run_id, name) not in self._known:
                self._known[run_id, name] = sender.steps(run_id, name)
        points = [(name, step, value) for name, values in series.items() for step, value in values if step not in self._known[run_id, name]]
        sender.append(run_id, points, at_ms=int(time.time() * 1000))
        for name, step, _ in points:
            self._known[run_id, name].add(step)

    def end(self, *, status: str) -> None:
        """Close the runs that have not finished, as ``FAILED``, or ``KILLED`` if the user stopped them.

        Raises:
            TrackingError: The store cannot be reached or refuses.
        """
        for key, run_id in self._run_ids.items():
            with connected(self._storage, experiment=self._experiments[key]) as sender:
                sender.end(run_id, status=status)


def log_training(training: Training, checkpoint: Checkpoint, storage: Storage) -> None:
    """Bring the run of a training that belongs to no sweep up to date with its checkpoint, and finish it.

    Raises:
        TrackingError: The store cannot be reached or refuses; what was sent stays, and the next call sends the rest.
    """
    log = checkpoint.losses()
    ended = ended_ms(checkpoint.folder / MANIFEST)
    run = replace(
        training.run,
        content=digest([CURVES_VERSION, training.run.name, read_json(checkpoint.folder / MANIFEST)]),
        status="FINISHED",
        started_ms=ended - int(1000 * sum(row["seconds"] for row in log)),
        ended_ms=ended,
        tags={"pause_ray.checkpoint": str(checkpoint.folder)},
        series=training_series(log),
        files=[(checkpoint.folder / name, "") for name in (MANIFEST, TRAINING_LOG, ADAPTER_CONFIG)],
    )
    with connected(storage, experiment=training.experiment) as sender:
        sender.send(run)
