"""Sends to MLflow what a command makes, while it makes it; a server that is away is said once and delays nothing."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pause_ray.core.errors import StoppedError, StorageError, TrackingError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage
from pause_ray.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pause_ray.report.results import SweepResults
    from pause_ray.tracking.runs import LiveTrainings, LoggedSweep, Training

SEND_SECONDS = 5.0
"""Between two batches of steps: curves grow while one looks, and a step of milliseconds costs no request of its own."""
RETRY_SECONDS = 60.0
"""After a batch that did not arrive; a server that is away costs up to 16 s of a thread."""


class Tracker:
    """Steps of trainings go out in batches, from a thread of its own; sweeps and finished trainings when they are logged."""

    def __init__(self, storage: Storage, *, warn: Callable[[str], None], send_seconds: float = SEND_SECONDS) -> None:
        """Prepare a tracker; inside its ``with`` block steps are sent while they come in.

        Args:
            storage: The storage whose sweeps and trainings are sent.
            warn: Shows a warning to the user; called with the first failure to send.
            send_seconds: Seconds between two batches.
        """
        self._storage = storage
        self._warn = warn
        self._send_seconds = send_seconds
        self._warned = False
        self._away_until = 0.0
        self._live: LiveTrainings | None = None
        self._trainings: dict[str, Callable[[], Training]] = {}
        self._steps: dict[str, list[JsonObject]] = defaultdict(list)
        self._ended_in: set[Path] = set()
        self._waiting = threading.Lock()
        """Guards these three."""
        self._sent: dict[Path, set[str]] = defaultdict(set)
        """Sweep → trials whose runs are whole."""
        self._sending = threading.Lock()
        """Held while anything is sent: the store's own lock is for other processes."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_regularly, name="mlflow", daemon=True)
        self.interrupted = False
        """Whether the user stopped what runs, and it came to an end that is no error."""
        self.logged: LoggedSweep | None = None
        """Where the sweep is, or None if the last attempt to log it failed."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Send what waits, and close the runs of trainings that did not come to their end."""
        self._ended.set()
        if isinstance(error, KeyboardInterrupt) and self._live is None:
            return  # who wants it to end at once does not wait until MLflow is loaded; it is sent with the next command
        self._thread.join()
        self._send_waiting()
        stopped = self.interrupted or isinstance(error, KeyboardInterrupt | StoppedError)
        live, status = self._live, "KILLED" if stopped else "FAILED"
        if live is not None and not self._is_away:
            self._tried(lambda: live.end(status=status))

    def step(self, training: Training, row: JsonObject) -> None:
        """Have a row of the training's log sent soon."""
        self._wait(training.run.digest, lambda: training, row)

    def step_of_trial(self, sweep_folder: Path, trial: str, row: JsonObject) -> None:
        """Have a row of the training log of a sweep's trial, named by its digest, sent soon."""
        from pause_ray.tracking.runs import Training

        self._wait(trial, lambda: Training.of_trial(sweep_folder, trial, self._storage), row)

    def _wait(self, key: str, training: Callable[[], Training], row: JsonObject) -> None:
        with self._waiting:
            self._trainings[key] = training
            self._steps[key].append(row)

    def trial_ended(self, folder: Path) -> None:
        """Have the runs of a sweep's trials that have finished sent soon; the sweep's own is brought up to date by ``log``."""
        with self._waiting:
            self._ended_in.add(folder)

    def log(self, sweep: Path | SweepResults) -> None:
        """Bring MLflow up to date with a sweep, named by its folder or read already."""
        from pause_ray.tracking.runs import log_sweep

        def send() -> None:
            self.logged = log_sweep(sweep, self._storage)
            with self._waiting:
                self._ended_in.discard(sweep if isinstance(sweep, Path) else sweep.folder)

        self.logged = None
        self._tried(send)

    def log_training(self, training: Training, checkpoint: Checkpoint) -> None:
        """Bring MLflow up to date with a training of its own that has ended."""
        from pause_ray.tracking.runs import log_training

        self._tried(lambda: log_training(training, checkpoint, self._storage))

    @property
    def _is_away(self) -> bool:
        return time.monotonic() < self._away_until

    def _send_regularly(self) -> None:
        while not self._ended.wait(self._send_seconds):
            self._send_waiting()

    def _send_waiting(self) -> None:
        """Send all that waits; what does not arrive waits on."""
        with self._waiting:
            steps, self._steps = self._steps, defaultdict(list)
            folders, self._ended_in = self._ended_in, set()
        for key, rows in steps.items():
            if self._is_away or not self._tried(lambda key=key, rows=rows: self._append(key, rows)):  # type: ignore[misc]
                with self._waiting:
                    self._steps[key] = rows + self._steps[key]

        for folder in folders:
            if self._is_away or not self._tried(lambda folder=folder: self._log_finished(folder)):  # type: ignore[misc]
                with self._waiting:
                    self._ended_in.add(folder)

    def _log_finished(self, folder: Path) -> None:
        from pause_ray.tracking.runs import log_finished

        log_finished(folder, self._storage, sent=self._sent[folder])

    def _append(self, key: str, rows: list[JsonObject]) -> None:
        from pause_ray.tracking.runs import LiveTrainings

        if self._live is None:
            self._live = LiveTrainings(self._storage)
        self._live.send(self._trainings[key](), rows)

    def _tried(self, send: Callable[[], None]) -> bool:
        """Whether it arrived; the first failure is said."""
        try:
            with self._sending:
                send()
        except (TrackingError, StorageError) as error:  # a damaged ledger of one trial must not stop the others
            self._away_until = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                self._warn(str(error))
            self._warned = True
            return False
        return True
