"""Sends to MLflow what a command makes, while it makes it. A server that is away is reported once and delays nothing.

The command queues what it has and calls ``send`` now and then. One batch at a time goes out, from a thread that ends with it, since a
slow server would hold up the caller: the driver loop of a sweep, or a training.
"""

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
"""Time between two batches: curves grow while one looks, and a step of milliseconds costs no request of its own."""
RETRY_SECONDS = 60.0
"""Time until the next batch after one that did not arrive; a server that is away costs up to 16 s of a thread."""


class Tracker:
    """Sends steps of trainings in batches, and sweeps and finished trainings when they are logged."""

    def __init__(self, storage: Storage, *, warn: Callable[[str], None], send_seconds: float = SEND_SECONDS) -> None:
        """Prepare a tracker; its ``with`` block sends what is left at its end.

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
        """Guards the three fields above."""
        self._sent: dict[Path, set[str]] = defaultdict(set)
        """Trials whose runs are complete, by sweep folder."""
        self._sending = threading.Lock()
        """Held while anything is sent: the store's own lock is for other processes."""
        self._sender: threading.Thread | None = None
        self._next_batch = time.monotonic() + send_seconds
        self.interrupted = False
        """Whether the user stopped the command, which is no error."""
        self.logged: LoggedSweep | None = None
        """Where the sweep was logged, or None if the last attempt failed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Send what waits, and close the runs of trainings that did not come to their end."""
        if isinstance(error, KeyboardInterrupt) and self._live is None:
            return  # a user who wants an end at once does not wait until MLflow is loaded; the next command sends it
        if self._sender is not None:
            self._sender.join()
        self._send_waiting()
        stopped = self.interrupted or isinstance(error, KeyboardInterrupt | StoppedError)
        live, status = self._live, "KILLED" if stopped else "FAILED"
        if live is not None and not self._is_away:
            self._tried(lambda: live.end(status=status))

    def step(self, training: Training, row: JsonObject) -> None:
        """Queue a row of the training's log."""
        self._wait(training.run.digest, lambda: training, row)

    def step_of_trial(self, sweep_folder: Path, trial: str, row: JsonObject) -> None:
        """Queue a row of the training log of a sweep's trial, named by its digest."""
        from pause_ray.tracking.runs import Training

        self._wait(trial, lambda: Training.of_trial(sweep_folder, trial, self._storage), row)

    def _wait(self, key: str, training: Callable[[], Training], row: JsonObject) -> None:
        with self._waiting:
            self._trainings[key] = training
            self._steps[key].append(row)

    def trial_ended(self, folder: Path) -> None:
        """Queue the runs of a sweep's finished trials; ``log`` brings the sweep's own run up to date."""
        with self._waiting:
            self._ended_in.add(folder)

    def send(self) -> None:
        """Begin to send what waits, unless a batch is on its way or the last one was a moment ago. Returns at once."""
        now = time.monotonic()
        if now < self._next_batch or (self._sender is not None and self._sender.is_alive()):
            return
        with self._waiting:
            if not (self._steps or self._ended_in):
                return
        self._next_batch = now + self._send_seconds
        self._sender = threading.Thread(target=self._send_waiting, name="mlflow", daemon=True)
        self._sender.start()

    def log(self, results: SweepResults) -> None:
        """Bring MLflow up to date with a sweep."""
        from pause_ray.tracking.runs import log_sweep

        def send() -> None:
            self.logged = log_sweep(results, self._storage)
            with self._waiting:
                self._ended_in.discard(results.folder)

        self.logged = None
        self._tried(send)

    def log_training(self, training: Training, checkpoint: Checkpoint) -> None:
        """Bring MLflow up to date with a training of its own that has ended."""
        from pause_ray.tracking.runs import log_training

        self._tried(lambda: log_training(training, checkpoint, self._storage))

    @property
    def _is_away(self) -> bool:
        return time.monotonic() < self._away_until

    def _send_waiting(self) -> None:
        """Send all that waits; what does not arrive stays queued."""
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
        """Return whether it arrived; warn of the first failure."""
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
