"""A sweep in MLflow: a parent run per sweep, a child run per trial that finished or was stopped, the best one as a model.

Everything sent is read back from the sweep's and trials' folders, so it can be sent again: what is there already is
skipped, what was sent in part or while a trial was training is completed, nothing is sent twice.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from pause_ray.best import FOLDER as BEST
from pause_ray.best import exported
from pause_ray.errors import StorageError
from pause_ray.findings import headline, noise_words, notes
from pause_ray.labels import condition_labels
from pause_ray.ranking import best, rank_correlations
from pause_ray.results import Condition, Contrast, SweepResults, read_trial, results_of
from pause_ray.search_record import SEARCH_LOG, Rung, SearchRecord
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import Storage, is_complete, read_json
from pause_ray.tracking.store import Run, Sender, connected
from pause_ray.tracking.trials import CONTENT_VERSION, changed_ms, content_of, ended_ms, started_ms, stopped_run, trial_run
from pause_ray.words import number, p_value, signed, span

MOST_CONTRASTS = 8
"""Of each kind, as metrics of the parent run; all of them are in ``arms.csv``."""
MOST_METRIC_CHARS, DIGEST_CHARS = 200, 6
MOST_DESCRIPTION_CHARS = 7800
"""MLflow cuts a longer text off, in the middle of a word."""
MORE_CHARS = 60
"""What it takes to say how many arms are left out."""
WAITING = "MLflow: waiting for %s"
logger = logging.getLogger("pause_ray")


class LoggedSweep(NamedTuple):
    """Where a sweep is in MLflow."""

    experiment_id: str
    run_id: str
    """Of the parent run."""
    model: str | None
    """URI of its best trial as a registered model; None where none was exported, or nothing was trained."""


def log_sweep(sweep: Path | SweepResults, storage: Storage, *, uri: str | None = None) -> LoggedSweep:
    """Bring MLflow up to date with what the sweep has on storage, with its report and its exported best trial where there are such.

    Args:
        sweep: Folder with ``sweep.json``, or what was read of it.
        storage: Where the trials are.
        uri: As in ``tracking_uri``.

    Raises:
        TrackingError: the server cannot be reached or refuses; what was sent stays and the next call goes on.
        StorageError: the sweep's or a trial's files are damaged.
    """
    results = results_of(sweep, storage)
    parent = _sweep_run(results)
    with _sending(results.name, storage, uri=uri) as sender:
        parent_id = sender.send(parent)
        logged = sender.logged_children(parent_id)
        for condition in results.conditions:
            for trial in condition.trials:
                rungs = _rungs(results.search, trial.digest)
                if logged.get(trial.digest) != content_of(trial, label=condition.label, rungs=rungs):
                    with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
                        run = trial_run(trial, label=condition.label, rungs=rungs, scratch=Path(scratch))
                        sender.send(run, parent_id=parent_id)
        for run in _stopped_runs(results, storage):
            if logged.get(run.digest) != run.content:
                sender.send(run, parent_id=parent_id)
        model = _register_best(sender, results, parent_id=parent_id)
    return LoggedSweep(sender.experiment_id, parent_id, model)


def log_finished(sweep_folder: Path, storage: Storage, *, sent: set[str], uri: str | None = None) -> None:
    """Send the runs of trials that have finished since, and of no other; costs nothing for those that were sent.

    Args:
        sweep_folder: Folder with ``sweep.json``.
        storage: Where the trials are.
        sent: Digests of trials that need not be looked at again; is added to.
        uri: As in ``tracking_uri``.

    Raises:
        TrackingError: as ``log_sweep``.
        StorageError: a trial's files are damaged; the others were sent.
    """
    sweep = read_json(sweep_folder / "sweep.json")
    entries = [entry for entry in sweep["trials"] if entry["digest"] not in sent and is_complete(storage.trials / entry["digest"])]
    if not entries:
        return
    labels, search = condition_labels(sweep["trials"]), SearchRecord.read(sweep_folder)
    damaged: StorageError | None = None
    with _sending(sweep["name"], storage, uri=uri) as sender:
        parent_id = sender.send(growing_sweep(sweep))
        logged = {} if sent else sender.logged_children(parent_id)
        for entry in entries:
            key = entry["digest"]
            try:
                trial, rungs = read_trial(entry, storage), _rungs(search, key)
                if logged.get(key) != content_of(trial, label=labels[key], rungs=rungs):
                    with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
                        sender.send(trial_run(trial, label=labels[key], rungs=rungs, scratch=Path(scratch)), parent_id=parent_id)
            except StorageError as error:
                damaged = error
            sent.add(key)
    if damaged is not None:
        raise damaged


def growing_sweep(sweep: JsonObject) -> Run:
    """The run of a sweep of which more is to come."""
    now = int(time.time() * 1000)
    return Run(kind="sweep", name=sweep["name"], digest=sweep["digest"], content=None, status="RUNNING", started_ms=now, ended_ms=now)


def _sending(name: str, storage: Storage, *, uri: str | None) -> AbstractContextManager[Sender]:
    return connected(storage, experiment=name, uri=uri, waiting=lambda holder: logger.warning(WAITING, holder))


def _rungs(search: SearchRecord, trial: str) -> list[Rung]:
    return [rung for rung in search.rungs if rung.trial == trial]


def _stopped_runs(results: SweepResults, storage: Storage) -> Iterator[Run]:
    """Of trials that were stopped and have no cells; those that were spared with them never began."""
    finished = {trial.digest for trial in results.trials}
    for entry in results.description["trials"]:
        key = entry["digest"]
        if key in results.search.stops and key not in finished:
            yield stopped_run(
                entry,
                results.search.stops[key],
                label=results.labels[key],
                rungs=_rungs(results.search, key),
                storage=storage,
                at_ms=changed_ms(results.folder / SEARCH_LOG),
            )


def _register_best(sender: Sender, results: SweepResults, *, parent_id: str) -> str | None:
    """The exported trial as a registered model, under the run that it came from."""
    manifest, folder = exported(results.folder), results.folder / BEST
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
    ends = [ended_ms(trial) for trial in results.trials]
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
        started_ms=min((started_ms(trial) for trial in results.trials), default=changed_ms(results.folder / "sweep.json")),
        ended_ms=max(ends, default=0),
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
    """Markdown that MLflow shows on the sweep's page; where there is no room for all, the reference and the best arms are shown."""
    above = [headline(results), "", "| arm | score | difference | 95 % interval | p (corrected) | unscored |", "|---|---|---|---|---|---|"]
    below: list[str] = []
    if results.control_contrasts:
        below += ["", f"| against {results.control_arm} | difference | 95 % interval | p (corrected) |", "|---|---|---|---|"]
        below += [f"| {_cell(contrast.label)} | {_measured(contrast)} |" for contrast in results.control_contrasts[:MOST_CONTRASTS]]
    said = [f"- {note}" for note in [*noise_words(results), *notes(results)]]
    below += ["", *_fitting(said, room=MOST_DESCRIPTION_CHARS // 3)]
    end = ["", "The whole report is the artifact `report.html`."]
    rows = [_row(condition) for condition in sorted(results.conditions, key=_shown_first)]
    room = MOST_DESCRIPTION_CHARS - sum(len(line) + 1 for line in [*above, *below, *end])
    shown = rows if sum(len(row) + 1 for row in rows) <= room else _fitting(rows, room=room - MORE_CHARS)
    more = [f"| … {len(rows) - len(shown)} more, in `arms.csv` | | | | | |"] if len(shown) < len(rows) else []
    return "\n".join([*above, *shown, *more, *below, *end])


def _fitting(lines: Sequence[str], *, room: int) -> list[str]:
    """As many of the first lines as have room."""
    found = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        found.append(line)
    return found


def _shown_first(condition: Condition) -> tuple[bool, float]:
    mean = condition.summary.grand_mean if condition.summary else None
    return not condition.is_reference, 1.0 if mean is None else -mean


def _row(condition: Condition) -> str:
    summary = condition.summary
    nothing = "not finished" if condition.num_missing else "stopped early"
    score = nothing if summary is None else number(summary.grand_mean)
    unscored = f"{summary.num_unscored} of {summary.num_cells}" if summary else ""
    measured = _measured(condition.against_reference, otherwise="reference" if condition.is_reference else "")
    return f"| {_cell(condition.label)} | {score} | {measured} | {unscored} |"


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


def _contrast_metrics(results: SweepResults) -> dict[str, float]:
    """Differences of the sweep's conditions, under their labels."""
    found: dict[str, float] = {}
    for kind, contrasts in (("difference", results.contrasts), ("against_control", results.control_contrasts)):
        for contrast in contrasts[:MOST_CONTRASTS]:
            label = metric_label(contrast.label)
            found |= {f"{kind}/{label}": contrast.difference, f"{kind}_p/{label}": contrast.corrected_p}
    return found


def metric_label(label: str) -> str:
    """A condition's label in the characters that MLflow allows; no two labels become one.

    ``every=2`` is ``every-2``; a label that has more to it than names and plain values gets a digest.
    """
    if re.fullmatch(r"\w+( [\w.]+=[\w.\-]+)*", label, flags=re.ASCII) and len(label) <= MOST_METRIC_CHARS:
        return label.replace("=", "-")
    plain = re.sub(r"[^\w\-. ]", "-", label, flags=re.ASCII)[:MOST_METRIC_CHARS].strip()
    return f"{plain} {digest(label)[:DIGEST_CHARS]}"
