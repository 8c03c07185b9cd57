"""Trials under Ray Tune, which only placement them: storage decides what is left to do in each. Knows Tune, no MLflow and no report."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from pause_ray.core.errors import StoppedError, StorageError, UserError
from pause_ray.core.process import Stage, about, trial_words, write_lines
from pause_ray.core.ray_cluster import without_package
from pause_ray.core.storage import Storage
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.reporter import TrialReporter
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.search import SweepTrial
from pause_ray.sweep.spec import SweepSpec
from pause_ray.trial.run import run_trial

log = logging.getLogger("pause_ray")

SCORE, INTERRUPTED = "mean_score", "was_interrupted"
"""Of a trial's last result: the mean of its cells; whether it was asked to end before it was done."""
MISTAKE = re.compile(r"pause_ray\.core\.errors\.(StorageError|SpecError): (?P<message>.*)")
IDLE_SECONDS = 60.0
"""Without a trial, after which a trial's process gives back what it holds; the start of another costs up to 25 s of CPU."""
NOT_YET = ""
"""Instead of a trial: what runs now decides whether there is another."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all trials of a sweep share; travels to their processes."""

    folder: Path
    """The sweep's."""
    trials: Mapping[str, SweepTrial]
    storage: Storage
    fleet: ScoringPool
    board: Any
    train_gpus: float


class TuneTrial(tune.Trainable):  # type: ignore[misc]
    """One trial as Tune runs it: a single step. A class, because ``ray.train.report`` is refused inside Tune's function trials."""

    def setup(self, config: dict[str, Any], *, shared: Shared) -> None:
        """Check that this machine sees the sweep's storage.

        Raises:
            StorageError: it does not, so results would be scattered over machines.
        """
        if not (shared.folder / "sweep.json").is_file():
            raise StorageError(
                f"{shared.folder}: not seen by {socket.gethostname()}; give --storage a path that is the same shared folder on every node"
            )
        self._shared = shared
        write_lines()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process."""
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial to its end; what went wrong goes to the board, and the sweep goes on with the next."""
        reports = TrialReporter(self._shared.board, self.config["trial"])
        with self._named():
            log.info("begins")
            return guarded(reports, lambda: self._finish(reports))

    def _named(self) -> AbstractContextManager[None]:
        """Whatever this process logs within is about the trial."""
        key = str(self.config["trial"])
        return about(trial_words(self._shared.trials[key].planned.label, key))

    def _finish(self, reports: TrialReporter) -> dict[str, Any]:
        shared, trial = self._shared, self._shared.trials[self.config["trial"]]
        score = run_trial(
            trial.prepared,
            arm=trial.planned.arm,
            storage=shared.storage,
            scorer=shared.fleet,
            train_gpus=shared.train_gpus,
            progress=reports,
            stop=reports.ending,
        )
        log.info("done")
        reports.finish(Stage.DONE)
        return {SCORE: score, tune.result.DONE: True}


def guarded(reports: TrialReporter, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns; where it may not begin or does not end well the board knows why, and the trial is done."""
    done: dict[str, Any] = {SCORE: None, tune.result.DONE: True}
    if not reports.begin():
        reports.finish(Stage.STOPPED)
        return done | {INTERRUPTED: True}
    try:
        return work()
    except StoppedError:
        log.info("stopped; it can go on")
        reports.finish(Stage.STOPPED)
        return done | {INTERRUPTED: True}
    except UserError as error:
        log.error("failed: %s", error)  # noqa: TRY400 (a mistake of the user has no traceback)
        reports.fail(str(error), None)
    except Exception as error:  # the border of a trial's process
        log.exception("failed")
        reports.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
    return done


class QueueSearcher(Searcher):  # type: ignore[misc]
    """Hands Tune one trial after another as ``{"trial": key}``, however many there turn out to be."""

    def __init__(self, next_trial: Callable[[], str | None], *, ended: Callable[[str, str | None], None]) -> None:
        """Begin.

        Args:
            next_trial: The key of the trial to begin, ``NOT_YET``, or None when there are no more.
            ended: Is given the key of every trial whose process has come to the trial's end, and None. Of those that were lost
                callbacks know more (``TrialCallbacks``).
        """
        super().__init__()
        self._next_trial = next_trial
        self._ended = ended
        self._keys: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles searchers to restore an experiment, which storage makes unnecessary here."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        """The next trial's config."""
        key = self._next_trial()
        if key is None:
            finished: str = Searcher.FINISHED
            return finished
        if key == NOT_YET:
            return None
        self._keys[trial_id] = key
        return {"trial": key}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002 (Tune's)
        """Pass on that a trial has ended."""
        key = self._keys.pop(trial_id, None)
        if key is not None and not error:
            self._ended(key, None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as for ``__getstate__``."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as for ``__getstate__``."""


class ReapIdleActors(FIFOScheduler):  # type: ignore[misc]
    """Begins trials as they come, and ends a process that has had none for long.

    Tune keeps one, and what it holds of the cluster, until the searcher says that there are no more trials; which trials will be lost
    and begin again is not known before the last has ended.
    """

    def __init__(self, patience_seconds: float) -> None:
        """End it after so long."""
        super().__init__()
        self._patience = patience_seconds
        self._idle_since: float | None = None

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The next trial, if one waits."""
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
    """Tells the driver that a trial has ended while the next one runs, and what Ray says of a process that was lost."""

    def __init__(self, tell: Callable[[], None], *, ended: Callable[[str, str | None], None]) -> None:
        """Begin.

        Args:
            tell: Called when a trial has ended.
            ended: Is given the key of every trial whose process was lost or could not begin, and Ray's account of it.
        """
        self._tell = tell
        self._ended = ended

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks to restore an experiment, which storage makes unnecessary here."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass it on."""
        self._tell()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass it on; Tune begins every account in its file with a line of its own."""
        _, _, account = Path(trial.error_file).read_text(encoding="utf-8").partition("\n")
        self._ended(trial.config["trial"], account.strip())


def run_trials(
    sweep: SweepSpec,
    shared: Shared,
    *,
    placement: Placement,
    next_trial: Callable[[], str | None],
    ended: Callable[[str, str | None], None],
    after_trial: Callable[[], None],
) -> None:
    """Run trials of ``shared`` to their ends; what went wrong in one is on the board, or told to ``ended`` if its process was lost.

    Args:
        sweep: What they belong to.
        shared: What their processes know.
        placement: What of the cluster they get.
        next_trial: As for ``QueueSearcher``.
        ended: As for ``QueueSearcher`` and ``TrialCallbacks``.
        after_trial: Called when a trial has ended.
    """
    run_tuner(
        tune.with_resources(tune.with_parameters(TuneTrial, shared=shared), trial_bundles(placement)),
        tune.TuneConfig(
            search_alg=QueueSearcher(next_trial, ended=ended),
            scheduler=ReapIdleActors(IDLE_SECONDS),
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=placement.concurrent_trials,
        ),
        name=sweep.name,
        storage=shared.storage,
        callbacks=[TrialCallbacks(after_trial, ended=ended)],
    )


def trial_bundles(placement: Placement, *, beside: Mapping[str, float] | None = None) -> tune.PlacementGroupFactory:
    """What Tune holds for a trial, on the nodes where trials run; ``beside`` is held with it, anywhere."""
    its = placement.of_one_trial()
    bundles: list[dict[str, float]] = [{"CPU": its["cpu"], "GPU": its.get("gpu", 0)}]
    labels = [dict(placement.trial_labels)]
    if beside is not None:
        bundles.append(dict(beside))
        labels.append({})
    return tune.PlacementGroupFactory(bundles, **({"bundle_label_selector": labels} if placement.trial_labels else {}))


def run_tuner(trainable: Any, config: tune.TuneConfig, *, name: str, storage: Storage, callbacks: list[tune.Callback]) -> None:
    """Let Tune run trials: silently, and with nothing of its own to take part in what they leave."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the ledger and MLflow hold the results
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own banner; progress is shown by ProgressDisplay
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in specs mean the same in every process
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # TrialMonitor.interruptible answers Ctrl-C
    # Tune would put Amazon's keys into every trial's runtime environment, which Ray logs; trials have what their nodes have.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is kept on the board and shown once
    run_config = tune.RunConfig(
        name=name,
        storage_path=str(storage.root / "tune"),
        verbose=0,
        callbacks=callbacks,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
    )
    tune.Tuner(trainable, tune_config=config, run_config=run_config).fit()


def why_lost(account: str) -> tuple[str, str | None]:
    """The last line of what Ray tells of an ended process, and all of it unless that is a mistake of the user."""
    last = account.splitlines()[-1]
    mistake = MISTAKE.fullmatch(last)
    told = mistake["message"] if mistake else without_package(last)
    return (told, None) if told else (last, account)
