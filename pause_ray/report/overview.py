"""The progress of the sweeps on a storage root, read from storage alone, on any machine that sees the root.

Trials, cells, steps and tokens are counted in ledgers and manifests; speeds, scoring actors and failures come from the status file
that the driver writes, and are shown with its age.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.core.errors import StorageError
from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, Storage, holder_of, is_complete, read_json, read_json_lines
from pause_ray.report.comparison import LEDGER
from pause_ray.sweep.search import SearchRecord
from pause_ray.sweep.spec import condition_labels
from pause_ray.sweep.status import LiveStatus, RunningTrial, TrainingProgress

LOCK = ".lock"
"""Name of the lock file that a sweep's driver holds."""
STATES = ("finished", "running", "begun", "to come", "failed", "stopped")
"""States of a trial: ``begun`` has results and does not run, ``failed`` failed in the last run, ``stopped`` was stopped early, or given
up with its arm in the last run."""
_AFTER_TRAINING = (Stage.PROXY, Stage.QUEUED, Stage.SCORING, Stage.NUMERICS_CHECK)


@dataclass(frozen=True, kw_only=True)
class TrialStatus:
    """The progress of one trial."""

    digest: str
    label: str
    state: str
    """One of ``STATES``."""
    cells: int | None
    """Number of its cells; None if the sweep's file does not have it."""
    cells_done: int
    """Number of cells with a score."""
    cells_unscored: int
    steps: int | None
    """Number of its optimizer steps, 0 without a training; None if the sweep's file does not have it."""
    steps_done: int
    trained_tokens: int
    prefilled_tokens: int
    decoded_tokens: int
    last_sign: float | None
    """Time of its last write to storage, in seconds since 1970; None if there is none."""
    adapter: str | None
    """Name of the adapter's folder once the trial has answered with it; trials may share one."""


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """The progress of one sweep."""

    folder: Path
    trials: tuple[TrialStatus, ...]
    driver: str | None
    """The process that runs the sweep now; None if none does."""
    live: LiveStatus | None
    """The last status that a driver wrote."""
    failures: Mapping[str, str]
    """The reason of each trial that failed in the last run, by label."""
    now: float
    """Time of reading, in seconds since 1970."""

    @property
    def by_state(self) -> dict[str, int]:
        """Number of trials by state, in the order of ``STATES``."""
        found = Counter(trial.state for trial in self.trials)
        return {state: found[state] for state in STATES if found[state]}

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that were trained on; counts an adapter that trials share once."""
        of_adapters: dict[str, int] = {}
        for trial in self.trials:
            if trial.adapter is not None:  # an unfinished one cannot tell of one that is gone
                of_adapters[trial.adapter] = max(trial.trained_tokens, of_adapters.get(trial.adapter, 0))
        return sum(of_adapters.values()) + sum(trial.trained_tokens for trial in self.trials if trial.adapter is None)

    @property
    def last(self) -> TrialStatus | None:
        """The trial with the latest write to storage."""
        return max((trial for trial in self.trials if trial.last_sign is not None), key=lambda trial: trial.last_sign or 0.0, default=None)

    def as_json(self) -> JsonObject:
        """Return the progress as plain data; ages are in seconds."""
        last, live = self.last, self.live
        return {
            "name": self.folder.name,
            "folder": str(self.folder),
            "trials": self.by_state,
            "num_trials": len(self.trials),
            "cells_done": sum(trial.cells_done for trial in self.trials),
            "cells": _total(trial.cells for trial in self.trials),
            "cells_unscored": sum(trial.cells_unscored for trial in self.trials),
            "steps_done": sum(trial.steps_done for trial in self.trials),
            "steps": _total(trial.steps for trial in self.trials),
            "tokens": {
                "prefilled": sum(trial.prefilled_tokens for trial in self.trials),
                "decoded": sum(trial.decoded_tokens for trial in self.trials),
                "trained": self.trained_tokens,
            },
            "failures": dict(self.failures),
            "last": {"trial": last.label, "digest": last.digest, "age": self.age(last.last_sign)} if last else None,
            "driver": self.driver,
            "live": dataclasses.asdict(live) | {"age": live.age_seconds(self.now), "is_current": self.is_live} if live else None,
        }

    @property
    def is_live(self) -> bool:
        """Whether ``live`` is from the running driver and recent."""
        return self.is_of_driver and self.live is not None and self.live.is_current(self.now)

    @property
    def is_of_driver(self) -> bool:
        """Whether the running driver wrote ``live``, not an earlier one."""
        return _is_of(self.live, self.driver)

    def age(self, moment: float | None) -> float | None:
        """Return the seconds since ``moment``; not negative, since clocks of machines may differ a little."""
        return None if moment is None else round(max(0.0, self.now - moment), 1)


@dataclass(frozen=True, kw_only=True)
class SweepLine:
    """The progress of one of several sweeps, without what only ledgers have."""

    name: str
    finished: int
    planned: int
    left_out: int
    """Number of trials that were stopped early, or not started because their point was stopped."""
    driver: str | None
    age: float
    """Seconds since the last write of the sweep."""


def _total(numbers: Iterable[int | None]) -> int | None:
    """Return the sum of the numbers; None if one of them is None."""
    found = list(numbers)
    known = [number for number in found if number is not None]
    return sum(known) if len(known) == len(found) else None


def sweep_folders(storage: Storage) -> list[Path]:
    """Return the folder of every sweep on the storage root.

    Raises:
        StorageError: There is no such root, or no sweep on it.
    """
    folders = sorted(path.parent for path in storage.sweeps.glob("*/sweep.json"))
    if not storage.root.is_dir():
        raise StorageError(f"storage root {storage.root}: no such folder here; name the one of the sweep with --storage")
    if not folders:
        raise StorageError(f"storage root {storage.root}: no sweep was begun there; name another with --storage")
    return folders


def folder_of(spec: JsonObject, storage: Storage) -> Path:
    """Return the folder of the sweep with this resolved spec, else the only folder of a sweep with its name.

    Raises:
        StorageError: See ``sweep_folders``; or no sweep has this name, or several have it and none has this spec.
    """
    read = {folder: read_json(folder / "sweep.json") for folder in sweep_folders(storage)}
    named = [folder for folder, sweep in read.items() if sweep["name"] == spec["name"]]
    same = [folder for folder in named if read[folder]["spec"] == spec]
    if len(same or named) == 1:
        return (same or named)[0]
    names = ", ".join(folder.name for folder in named or read)
    problem = f"several sweeps are called {spec['name']}" if named else f"no sweep is called {spec['name']}"
    raise StorageError(f"storage root {storage.root}: {problem}; name one of them: {names}")


def overview(storage: Storage) -> list[SweepLine]:
    """Return all sweeps on the storage root, the one with the latest write first.

    Raises:
        StorageError: See ``sweep_folders``; or a file of a sweep is damaged.
    """
    return sorted((_line(folder, storage) for folder in sweep_folders(storage)), key=lambda line: line.age)


def sweep_status(folder: Path, storage: Storage) -> SweepStatus:
    """Return the progress of one sweep.

    Raises:
        StorageError: A file is missing or damaged.
    """
    sweep, live, now = read_json(folder / "sweep.json"), LiveStatus.read(folder), time.time()
    driver = _driver(folder, live, now=now)
    labels = condition_labels(sweep["trials"])
    running = {trial.digest: trial for trial in live.running} if live and _is_of(live, driver) else {}
    left_out = SearchRecord.read(folder).left_out(sweep)
    known = {entry["digest"]: f"{labels[entry['digest']]} #{entry['replicate']}" for entry in sweep["trials"]}
    trials = tuple(
        _trial(entry, storage, label=known[entry["digest"]], live=live, running=running.get(entry["digest"]), left_out=left_out)
        for entry in sweep["trials"]
    )
    failed = {trial.digest for trial in trials if trial.state == "failed"}
    return SweepStatus(
        folder=folder,
        trials=trials,
        driver=driver,
        live=live,
        failures={known[key]: message for key, message in (live.failures if live else {}).items() if key in failed},
        now=now,
    )


def _driver(folder: Path, live: LiveStatus | None, *, now: float) -> str | None:
    """Return the holder of the sweep's lock, else the driver of a recent status: on some file systems other machines do not see locks."""
    return holder_of(folder / LOCK) or (live.driver if live and live.is_current(now) else None)


def _is_of(live: LiveStatus | None, driver: str | None) -> bool:
    """Return whether ``driver`` wrote ``live`` and has not ended its trials; a lock names the driver with further details."""
    return live is not None and driver is not None and live.ended is None and driver.split(",")[0] == live.driver


def _trial(
    entry: JsonObject, storage: Storage, *, label: str, live: LiveStatus | None, running: RunningTrial | None, left_out: Collection[str]
) -> TrialStatus:
    key, folder = entry["digest"], storage.trials / entry["digest"]
    rows = list({row["cell_id"]: row for row in read_json_lines(folder / LEDGER)}.values())
    manifest = read_json(folder / MANIFEST) if is_complete(folder) else None
    adapter = _adapter(rows, manifest)
    trained = _trained(entry, adapter, manifest, storage, running=running, reported=live.trained.get(key) if live else None)
    signs = [path.stat().st_mtime for path in (folder / LEDGER, folder / MANIFEST) if path.is_file()]
    if manifest is not None:
        state = "finished"
    elif running is not None:
        state = "running"
    elif key in left_out:
        state = "stopped"
    elif live and key in live.failures:
        state = "failed"
    elif live and entry["arm"] in live.given_up:
        state = "stopped"
    else:
        state = "begun" if rows or trained.steps else "to come"
    return TrialStatus(
        digest=key,
        label=label,
        state=state,
        cells=entry.get("cells"),
        cells_done=sum(row["score"] is not None for row in rows),
        cells_unscored=sum(row["score"] is None for row in rows),
        steps=entry.get("steps"),
        steps_done=trained.steps,
        trained_tokens=trained.tokens,
        prefilled_tokens=sum(row["prefilled_tokens"] for row in rows),
        decoded_tokens=sum(row["decoded_tokens"] for row in rows),
        last_sign=max(signs, default=None),
        adapter=adapter,
    )


def _adapter(rows: Sequence[JsonObject], manifest: JsonObject | None) -> str | None:
    """Return the adapter of a trial by its manifest, else by its answers."""
    if manifest is not None and manifest.get("checkpoint"):
        return Path(manifest["checkpoint"]).name
    return next((row["adapter"] for row in rows if row["adapter"]), None)


def _trained(
    entry: JsonObject,
    adapter: str | None,
    manifest: JsonObject | None,
    storage: Storage,
    *,
    running: RunningTrial | None,
    reported: TrainingProgress | None,
) -> TrainingProgress:
    """Return the progress of a training by the trial's manifest, else by the adapter of its answers, else by the driver's status."""
    if entry.get("steps") == 0:  # it may answer with an adapter all the same
        return TrainingProgress(steps=0, tokens=0)
    if manifest is not None:
        steps = manifest.get("training") or []
        return TrainingProgress(steps=len(steps), tokens=sum(step.get("tokens", 0) for step in steps))
    if adapter is not None and is_complete(storage.checkpoints / adapter):
        log = read_json_lines(storage.checkpoints / adapter / "training.jsonl")
        return TrainingProgress(steps=len(log), tokens=sum(step.get("tokens", 0) for step in log))
    if reported is None and running is not None and running.stage in _AFTER_TRAINING:
        return TrainingProgress(steps=entry.get("steps") or 0, tokens=0)
    return reported or TrainingProgress(steps=0, tokens=0)


def _line(folder: Path, storage: Storage) -> SweepLine:
    sweep, live, now = read_json(folder / "sweep.json"), LiveStatus.read(folder), time.time()
    manifests = [storage.trials / entry["digest"] / MANIFEST for entry in sweep["trials"]]
    finished = {path.parent.name: path.stat().st_mtime for path in manifests if path.is_file()}
    signs = [*finished.values(), (folder / "sweep.json").stat().st_mtime, *([live.written] if live else [])]
    return SweepLine(
        name=folder.name,
        finished=len(finished),
        planned=len(sweep["trials"]),
        left_out=len(SearchRecord.read(folder).left_out(sweep) - finished.keys()),
        driver=_driver(folder, live, now=now),
        age=round(max(0.0, now - max(signs)), 1),
    )
