"""MLflow as a view of storage: a parent run per sweep, a child run per finished trial. The only module that imports mlflow.

Everything sent is read back from the sweep's and trials' folders, so it can be sent again: what is there already is
skipped, what was sent in part is completed, nothing is sent twice. Runs are found by the tag ``pause_ray.digest``, never by
name. Uses the client API with explicit run ids (the fluent API keeps one active run per process) and batches.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pause_ray import figures, heatmaps
from pause_ray.compare import summarize
from pause_ray.errors import TrackingError
from pause_ray.findings import headline, noise_words, notes
from pause_ray.needle.ledger import to_parquet
from pause_ray.places import axis_of, score_fields
from pause_ray.results import Condition, Contrast, SweepResults, TrialResult, read_results, spent
from pause_ray.spec import digest
from pause_ray.storage import MANIFEST, Storage, exclusive
from pause_ray.words import number, p_value, signed, span

CONTENT_FIELDS = ("eval.task.needles", "eval.task.groups", "eval.noise", "corpus.facts")
"""Parts of a trial that are text, not parameters; sent as a digest, and whole in ``spec.json``."""
CORPUS_METRICS = ("documents", "rows", "pauses_per_1k_tokens", "longest_stretch_tokens")
"""Of the training text's statistics; all of them are in the trial's ``manifest.json``."""
MOST_PARAM_CHARS = 500
BATCH_METRICS, BATCH_PARAMS = 1000, 100
"""MLflow's limits of one batch."""
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set while sending, unless the user has set them: a server that is away costs seconds (MLflow's own: over half an hour)."""
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
CONNECT_SECONDS = 5.0
SAFE_REASONS = (
    "Connection refused",
    "timed out",
    "Name or service not known",
    "Temporary failure in name resolution",
    "No route to host",
    "Network is unreachable",
    "unable to open database file",
    "database is locked",
    "readonly database",
    r"error code \d+",
    "Permission denied",
)
"""Words of a failure that are passed on; they quote no address and no password."""
CONTENT_VERSION = 4
"""Raised when other values are sent for the same files, so that runs logged before are brought up to date."""
DIGEST_TAG, CONTENT_TAG = "pause_ray.digest", "pause_ray.content"
logger = logging.getLogger("pause_ray")


def tracking_uri(storage: Storage, uri: str | None = None) -> str:
    """Where runs go: ``uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite file under the storage root."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.root / 'mlflow.db'}"


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
    where = tracking_uri(storage, uri)
    results = read_results(sweep_folder, storage)
    with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
        parent = _sweep_run(results)
        children = {trial.digest: (condition, trial) for condition in results.conditions for trial in condition.trials}
        with (
            exclusive(storage.root / ".mlflow.lock", waiting=lambda holder: logger.warning("MLflow: waiting for %s", holder)),
            _border(where),
        ):
            sender = _Sender.open(where, experiment=results.name, artifacts=storage.root / "mlartifacts")
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


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run shall hold; plain values, made from storage."""

    name: str
    digest: str
    content: str
    """Digest of all that is sent: the tag is set last, so its presence says that all of it arrived."""
    status: str
    started_ms: int
    ended_ms: int
    tags: dict[str, str] = field(default_factory=dict)
    """What may change while the run stays the same, such as the arm's name; MLflow never changes a parameter."""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Name → (step, value)."""
    files: Sequence[tuple[Path, str]] = ()
    """Local file and the artifact folder that it goes to ("" for the root)."""


def _sweep_run(results: SweepResults) -> _Run:
    finished, planned = len(results.trials), results.num_planned
    ends = [_ended_ms(trial) for trial in results.trials]
    files = [(results.folder / name, "") for name in ("sweep.json", "report.html", "arms.csv")]
    files += [(path, "figures") for path in sorted((results.folder / "figures").glob("*.png"))]
    files = [(path, folder) for path, folder in files if path.is_file()]
    description = _description(results)
    return _Run(
        name=results.name,
        digest=results.digest,
        content=digest([CONTENT_VERSION, description, *(digest(path.read_bytes()) for path, _ in files)]),
        status="FINISHED" if finished == planned else "RUNNING",
        started_ms=min((_started_ms(trial) for trial in results.trials), default=_changed_ms(results.folder / "sweep.json")),
        ended_ms=max(ends, default=0),
        tags={
            "pause_ray.kind": "sweep",
            "mlflow.note.content": description,
            "mlflow.source.name": str(results.description.get("command", "")),
            "pause_ray.compare_to": results.reference_arm,
            "pause_ray.control": results.control_arm or "",
        },
        params={"trials": str(planned), "arms": str(len(results.conditions))},
        metrics={"trials_finished": float(finished), **_contrast_metrics(results)},
        files=files,
    )


def _trial_run(condition: Condition, trial: TrialResult, *, scratch: Path) -> _Run:
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
    return _Run(
        name=label,
        digest=trial.digest,
        content=_content(condition, trial),
        status="FINISHED",
        started_ms=_started_ms(trial),
        ended_ms=_ended_ms(trial),
        tags={"pause_ray.kind": "trial", "pause_ray.arm": trial.arm},
        params=flattened(trial.spec),
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        series={
            f"training_{name}": [(int(row["step"]), float(row[name])) for row in trial.training if row.get(name) is not None]
            for name in ("loss", "learning_rate")
        },
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
    return f"{condition.label} #{trial.replicate}"


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


class _Sender:
    """One experiment of one MLflow store."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client = client
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, uri: str, *, experiment: str, artifacts: Path) -> _Sender:
        """Connect, and make the experiment if it is not there; a store without a server keeps artifacts under ``artifacts``."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        location = None if uri.startswith(("http", "databricks")) else (artifacts / experiment).as_uri()
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                return cls(client, client.create_experiment(experiment, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(experiment)
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow: the experiment {experiment} was deleted; restore it (mlflow experiments restore) or name the sweep anew"
            )
        return cls(client, found.experiment_id)

    def logged_children(self, parent_id: str) -> dict[str, str]:
        """Trial digest → content digest of the child runs that arrived whole."""
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent_id}'")
        return {run.data.tags[DIGEST_TAG]: run.data.tags[CONTENT_TAG] for run in runs if CONTENT_TAG in run.data.tags}

    def send(self, wanted: _Run, *, parent_id: str | None = None) -> str:
        """Make or complete a run; what it has already is not sent again."""
        run = self._find(wanted, parent_id) or self._create(wanted, parent_id)
        run_id: str = run.info.run_id
        if run.data.tags.get(CONTENT_TAG) != wanted.content:
            self._send_values(run, wanted)
            if run.info.run_name != wanted.name:
                self._client.update_run(run_id, name=wanted.name)
            for path, folder in wanted.files:
                self._client.log_artifact(run_id, str(path), folder or None)
            self._client.set_tag(run_id, CONTENT_TAG, wanted.content)
        if wanted.status == "FINISHED" and run.info.status != "FINISHED":
            self._client.set_terminated(run_id, status="FINISHED", end_time=wanted.ended_ms)
        elif wanted.status != "FINISHED" and run.info.status == "FINISHED":
            self._client.update_run(run_id, status=wanted.status)
        return run_id

    def _send_values(self, run: Any, wanted: _Run) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id, has = run.info.run_id, run.data
        params = [Param(name, value) for name, value in wanted.params.items() if name not in has.params]
        metrics = [Metric(name, value, wanted.ended_ms, 0) for name, value in wanted.metrics.items() if has.metrics.get(name) != value]
        for name, points in wanted.series.items():
            known = {point.step for point in self._client.get_metric_history(run_id, name)} if name in has.metrics else set()
            metrics += [Metric(name, value, wanted.ended_ms, step) for step, value in points if step not in known]
        tags = [RunTag(name, value) for name, value in wanted.tags.items() if has.tags.get(name) != value]
        for start in range(0, len(params), BATCH_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])
        for start in range(0, len(metrics), BATCH_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])
        self._client.log_batch(run_id, tags=tags)

    def _find(self, wanted: _Run, parent_id: str | None) -> Any:
        kind = f"tags.`mlflow.parentRunId` = '{parent_id}'" if parent_id else "tags.`pause_ray.kind` = 'sweep'"
        runs = self._search(f"{kind} and tags.`{DIGEST_TAG}` = '{wanted.digest}'")
        return runs[0] if runs else None

    def _create(self, wanted: _Run, parent_id: str | None) -> Any:
        tags = {**wanted.tags, DIGEST_TAG: wanted.digest, **({"mlflow.parentRunId": parent_id} if parent_id else {})}
        return self._client.create_run(self.experiment_id, start_time=wanted.started_ms, tags=tags, run_name=wanted.name)

    def _search(self, filter_string: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], filter_string, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


@contextlib.contextmanager
def _border(uri: str) -> Iterator[None]:
    """The border to MLflow: short patience inside, and whatever its stores raise is a ``TrackingError`` without secrets.

    Stores raise the exceptions of many libraries (SQLAlchemy, requests, boto3, …), and their texts may hold the URI with its
    password, so only the kind of error and the operating system's words for it are passed on.
    """
    added = {name: value for name, value in PATIENCE.items() if name not in os.environ}
    os.environ.update(added)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _check_database_answers(uri)
        yield
    except TrackingError:
        raise
    except Exception as error:  # noqa: BLE001 (border to another system)
        raise TrackingError(
            f"MLflow at {without_secrets(uri)}: {_reason(error)}; results on storage are unharmed. "
            "Start the server, or point MLFLOW_TRACKING_URI to another, and run the same command again"
        ) from None
    finally:
        for name in added:
            os.environ.pop(name, None)


def _check_database_answers(uri: str) -> None:
    """Fail fast where MLflow would try a database for an hour (15 attempts with doubling pauses)."""
    parts = urlsplit(uri)
    port = parts.port or DATABASE_PORTS.get(parts.scheme.split("+")[0])
    if parts.hostname and port and not uri.startswith("http"):
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()


def without_secrets(uri: str) -> str:
    """The URI without user, password, query and fragment."""
    parts = urlsplit(uri)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"


def _reason(error: BaseException) -> str:
    """The kind of error, and why a connection failed if that is what happened; no text that could quote a URI."""
    seen: BaseException | None = error
    texts = []
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    known = re.search("|".join(SAFE_REASONS), "\n".join(texts))
    return f"{type(error).__name__}" + (f" ({known.group()})" if known else "")
