"""Trials under Ray Tune, which only places them on the cluster: storage decides what is left to do in each."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from pause_ray.core.errors import PauseRayError, StoppedError, StorageError, UserError
from pause_ray.core.process import Stage, about, format_trial, log_to_stderr
from pause_ray.core.ray_cluster import explain_missing_package
from pause_ray.core.storage import Storage
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.reporter import TrialReporter
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.search import SweepTrial
from pause_ray.sweep.status import Failure
from pause_ray.trial.run import run_trial

log = logging.getLogger("pause_ray")

SCORE = "mean_score"
"""The key of a trial's last result for the mean score of its cells."""
IDLE_SECONDS = 60.0
"""Time without a trial after which a process gives its resources back; starting another one costs up to 25 s of CPU."""
NOT_YET = ""
"""Returned instead of a trial while the running trials decide whether there is another."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Objects that all trials of a sweep share; they are sent to the trials' processes."""

    folder: Path
    """The sweep's folder."""
    storage: Storage
    pool: ScoringPool
    progress_actor: Any
    train_gpus: float

    def trial(self, key: str) -> SweepTrial:
        """Fetch a trial that the driver has published: later trials do not exist yet when this process starts."""
        trial: SweepTrial = pickle.loads(ray.get(self.progress_actor.published.remote(key)))  # noqa: S301 (pickled by the driver)
        return trial


class TuneTrial(tune.Trainable):  # type: ignore[misc]
    """One trial as Tune runs it: a single step. A class, because ``ray.train.report`` is refused inside Tune's function trials."""

    def setup(self, config: dict[str, Any], *, shared: Shared) -> None:
        """Keep what trials share. A problem of this machine is reported by a trial, since Ray would pass on its text only."""
        self._shared = shared
        log_to_stderr()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process."""
        self._key = str(new_config["trial"])
        self._reporter = TrialReporter(self._shared.progress_actor, self._key)
        return True

    def step(self) -> dict[str, Any]:
        """Continue the trial and report its end or what went wrong; the sweep goes on with the next trial."""
        trial = self._shared.trial(self._key)
        with about(format_trial(trial.planned.label, self._key)):
            try:
                self._reporter.begin()
                self._check_storage()
                return self._advance(trial)
            except StoppedError:
                log.info("stopped; it can go on")
                self._reporter.finish(Stage.STOPPED)
            except Exception as error:  # noqa: BLE001 (the border of a trial's process)
                failure = Failure.of(error)
                log.error("failed: %s", failure.trace or failure.message)  # noqa: TRY400 (a mistake of the user has no traceback)
                self._reporter.fail(failure)
        return {SCORE: None, tune.result.DONE: True}

    def _check_storage(self) -> None:
        """Raise a ``StorageError`` if this machine does not see the sweep's storage: results would be scattered over machines."""
        folder = self._shared.folder
        if not (folder / "sweep.json").is_file():
            raise StorageError(
                f"{folder}: not seen by {socket.gethostname()}; give --storage a path that is the same shared folder on every node"
            )

    def _advance(self, trial: SweepTrial) -> dict[str, Any]:
        """Run the trial to its end."""
        shared = self._shared
        score = run_trial(
            trial.prepared,
            arm=trial.planned.arm,
            storage=shared.storage,
            scorer=shared.pool,
            train_gpus=shared.train_gpus,
            progress=self._reporter,
        )
        log.info("done")
        self._reporter.finish(Stage.DONE)
        return {SCORE: score, tune.result.DONE: True}


class QueueSearcher(Searcher):  # type: ignore[misc]
    """Gives Tune the queue's trials as ``{"trial": key}``, however many there turn out to be."""

    def __init__(self, next_trial: Callable[[], str | None]) -> None:
        """``next_trial`` returns the key of the trial to begin, ``NOT_YET``, or None when there are no more."""
        super().__init__()
        self._next_trial = next_trial

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles searchers to restore an experiment, which storage makes unnecessary here."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        """Return the next trial's config."""
        key = self._next_trial()
        if key is None:
            finished: str = Searcher.FINISHED
            return finished
        return None if key == NOT_YET else {"trial": key}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002 (Tune's)
        """Do nothing: ``TrialCallbacks`` report ends."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing, as for ``__getstate__``."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, as for ``__getstate__``."""


class ReapIdleActors(FIFOScheduler):  # type: ignore[misc]
    """Begins trials in their order, and ends processes that have had no trial for long.

    Tune keeps such a process and its resources until the searcher has no more trials, which is not known before the last trial has ended,
    since a lost trial begins again.
    """

    def __init__(self, patience_seconds: float, **options: Any) -> None:
        """End a process after this time without a trial; ``options`` are those of the next scheduler class."""
        super().__init__(**options)
        self._patience = patience_seconds
        self._idle_since: float | None = None

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return the next trial, if one waits."""
        trial = super().choose_trial_to_run(tune_controller)
        controller = tune_controller._tune_controller  # Ray 2.60
        if trial is not None or not controller._actor_cache.num_cached_objects:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since >= self._patience:
            controller._cleanup_cached_actors(force_all=True)
        return trial


class TrialCallbacks(tune.Callback):  # type: ignore[misc]
    """Reports to the driver that a trial has ended, and Ray's error where its process was lost."""

    def __init__(self, ended: Callable[[str, Exception | None], None]) -> None:
        """``ended`` is called with a trial's key, and with Ray's error if its process was lost or could not begin, else None."""
        self._ended = ended

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its callbacks to restore an experiment, which storage makes unnecessary here."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report it."""
        self._ended(trial.config["trial"], None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report it with the error object, which Tune has pickled if it is Ray's, as that of a lost process is.

        ``Trial.get_pickled_error`` reads the copy on storage, which Tune writes only later.
        """
        if trial.pickled_error_file:
            error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        else:
            error = TuneError(Path(trial.error_file).read_text(encoding="utf-8"))
        self._ended(trial.config["trial"], error)


def trial_bundles(placement: Placement) -> tune.PlacementGroupFactory:
    """Return the resources that Tune holds for a trial, on the nodes where trials run."""
    labels = {"bundle_label_selector": [dict(placement.trial_labels)]} if placement.trial_labels else {}
    return tune.PlacementGroupFactory([placement.trial_bundle()], **labels)


def run_tuner(
    trainable: Any,
    *,
    next_trial: Callable[[], str | None],
    ended: Callable[[str, Exception | None], None],
    scheduler: ReapIdleActors,
    concurrent_trials: int,
    name: str,
    storage: Storage,
) -> None:
    """Let Tune run trials to their ends, silently, without its own loggers and signal handler.

    ``next_trial`` is that of ``QueueSearcher`` and ``ended`` that of ``TrialCallbacks``. The trainable has its resources and reports its
    own failures.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the ledger and MLflow hold the results
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own banner; progress is shown by ProgressDisplay
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in specs mean the same in every process
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # the driver answers Ctrl-C
    # Tune would put Amazon's keys into every trial's runtime environment, which Ray logs; trials have what their nodes have.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is reported and shown once
    run_config = tune.RunConfig(
        name=name,
        storage_path=str(storage.root / "tune"),
        verbose=0,
        callbacks=[TrialCallbacks(ended)],
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
    )
    config = tune.TuneConfig(
        search_alg=QueueSearcher(next_trial),
        scheduler=scheduler,
        num_samples=-1,
        reuse_actors=True,
        max_concurrent_trials=concurrent_trials,
    )
    tune.Tuner(trainable, tune_config=config, run_config=run_config).fit()


def failure_of_lost_process(error: Exception) -> Failure:
    """Return why a trial's process was lost: a mistake of the user without a trace, and anything else with Ray's account as its trace."""
    cause = getattr(error, "cause", None)  # a RayTaskError has the object that was raised
    if isinstance(cause, UserError):
        return Failure(error=cause)
    account = str(error).strip()
    last_line = account.splitlines()[-1]
    if missing := explain_missing_package(last_line):  # the process could not import the trial's class, of which Ray has only the text
        return Failure(error=UserError(missing))
    return Failure(error=PauseRayError(last_line), trace=account)
