"""Trainings in MLflow while they run, and one that ended.

A trial's training goes to the child run that ``log_sweep`` completes later; one of ``pause-ray train`` has a run of its own,
with the checkpoint's name as its digest. What a step's row says is sent once: when a training that was interrupted
repeats steps, those that have arrived stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.checkpoint import ADAPTER_CONFIG, TRAINING_LOG, Checkpoint
from pause_ray.labels import condition_labels
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import MANIFEST, Storage, read_json
from pause_ray.tracking.store import Run, Sender, connected
from pause_ray.tracking.sweeps import growing_sweep
from pause_ray.tracking.trials import flattened, trial_name
from pause_ray.train.telemetry import training_series

EXPERIMENT = "training"
"""Of trainings that belong to no sweep."""
CONTENT_VERSION = 1
"""As that of ``tracking.trials``."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Which run a training's rows go to, and what that run holds from its beginning."""

    experiment: str
    run: Run
    parent: Run | None
    """The sweep's run."""

    @classmethod
    def of_trial(cls, sweep_folder: Path, trial: str, storage: Storage) -> Training:
        """The training of a sweep's trial, by the trial's digest.

        One that is trained beside another before its own turn has no ``spec.json`` yet: its parameters come with its log.

        Raises:
            StorageError: the sweep's files are missing, or damaged, or the trial's are.
        """
        sweep = read_json(sweep_folder / "sweep.json")
        entry = next(entry for entry in sweep["trials"] if entry["digest"] == trial)
        name = trial_name(condition_labels(sweep["trials"])[trial], entry["replicate"])
        file = storage.trials / trial / "spec.json"
        spec = read_json(file) if file.is_file() else {}
        return cls(
            experiment=sweep["name"],
            run=_growing("trial", name=name, key=trial, spec=spec, tags={"pause_ray.arm": entry["arm"]}),
            parent=growing_sweep(sweep),
        )

    @classmethod
    def alone(cls, spec: JsonObject, *, name: str, checkpoint: str) -> Training:
        """The training of a resolved trial spec that belongs to no sweep; ``checkpoint`` is the adapter's digest."""
        run = _growing("training", name=f"{name} {checkpoint[:8]}", key=checkpoint, spec=spec, tags={})
        return cls(experiment=EXPERIMENT, run=run, parent=None)


def _growing(kind: str, *, name: str, key: str, spec: JsonObject, tags: dict[str, str]) -> Run:
    now = _now_ms()
    return Run(
        kind=kind, name=name, digest=key, content=None, status="RUNNING", started_ms=now, ended_ms=now, tags=tags, params=flattened(spec)
    )


def _now_ms() -> int:
    return int(time.time() * 1000)


class LiveTrainings:
    """Sends rows of trainings that are running. For one process; not for several threads at once."""

    def __init__(self, storage: Storage, *, uri: str | None = None) -> None:
        """Of the store that ``tracking_uri`` names; it is not asked before there is something to send."""
        self._storage = storage
        self._uri = uri
        self._run_ids: dict[str, str] = {}
        self._experiments: dict[str, str] = {}
        self._known: dict[tuple[str, str], set[int]] = {}
        """(run id, series) → steps that have arrived."""

    def send(self, training: Training, rows: Sequence[JsonObject]) -> None:
        """Append what is new in ``rows``; a run that was given up goes on, one that is whole has them already.

        Raises:
            TrackingError: the store cannot be reached or refuses; the same rows can be sent again.
        """
        with connected(self._storage, experiment=training.experiment, uri=self._uri, waiting=lambda _: None) as sender:
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
        sender.append(run_id, points, at_ms=_now_ms())
        for name, step, _ in points:
            self._known[run_id, name].add(step)

    def end(self, *, status: str) -> None:
        """Close the runs that nobody has finished meanwhile.

        Args:
            status: ``FAILED``, or ``KILLED`` for those that the user stopped.

        Raises:
            TrackingError: the store cannot be reached or refuses.
        """
        for key, run_id in self._run_ids.items():
            with connected(self._storage, experiment=self._experiments[key], uri=self._uri, waiting=lambda _: None) as sender:
                sender.end(run_id, status=status)


def log_training(training: Training, checkpoint: Checkpoint, storage: Storage, *, uri: str | None = None) -> None:
    """Bring the run of a training that belongs to no sweep up to date with its checkpoint, and finish it.

    Raises:
        TrackingError: the store cannot be reached or refuses; what was sent stays and the next call goes on.
    """
    log = checkpoint.losses()
    ended_ms = int((checkpoint.folder / MANIFEST).stat().st_mtime * 1000)
    its = training.run
    run = Run(
        kind=its.kind,
        name=its.name,
        digest=its.digest,
        content=digest([CONTENT_VERSION, its.name, read_json(checkpoint.folder / MANIFEST)]),
        status="FINISHED",
        started_ms=ended_ms - int(1000 * sum(row["seconds"] for row in log)),
        ended_ms=ended_ms,
        tags={"pause_ray.checkpoint": str(checkpoint.folder)},
        params=its.params,
        series=training_series(log),
        files=[(checkpoint.folder / name, "") for name in (MANIFEST, TRAINING_LOG, ADAPTER_CONFIG)],
    )
    with connected(storage, experiment=training.experiment, uri=uri, waiting=lambda _: None) as sender:
        sender.send(run)
