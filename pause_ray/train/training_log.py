"""The training log, a line of JSON per step: written by a training's first worker, read while it grows. Knows no model and no Ray."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pause_ray.spec import JsonObject
from pause_ray.storage import space_errors, write_text

POLL_SECONDS = 0.5
"""Between two looks at a log that grows; a step takes seconds."""
Progress = Callable[[int, int, JsonObject], None]
"""Called with (steps done, steps in all, that step's row of the training log), from a thread of its own."""


class WrittenLog:
    """A training's own log. Every worker has one, since every worker may have to save it; one of them writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Nothing is there before ``begin``."""
        self._path = path
        self._writes = writes
        self.rows: list[JsonObject] = []
        """Of all steps so far."""

    def begin(self, rows: Sequence[JsonObject]) -> None:
        """Begin with the rows of the steps that a checkpoint has."""
        self.rows = list(rows)
        if self._writes:
            write_text(self._path, "".join(_line(row) for row in self.rows))

    def append(self, row: JsonObject) -> None:
        """Add the row of a step.

        Raises:
            StorageError: the disk is full.
        """
        self.rows.append(row)
        if self._writes:
            # Not "a": a file that was taken away is an error and not a log that begins in the middle.
            with space_errors(self._path), self._path.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(_line(row))


def _line(row: JsonObject) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class GrowingLog:
    """A training log, read on from where it was read last. Workers that start again put a shorter one in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_number = 0
        self._read_bytes = 0
        """Of this file, whole lines only."""
        self._read_rows = 0
        self._given_rows = 0

    def new_rows(self) -> list[JsonObject]:
        """The complete rows beyond those that were given; steps that are taken again are not given again."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file_number or found.st_size < self._read_bytes:
                    self._file_number, self._read_bytes, self._read_rows = found.st_ino, 0, 0
                file.seek(self._read_bytes)
                lines, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        rows: list[JsonObject] = [json.loads(line) for line in lines.splitlines()]
        given = max(0, self._given_rows - self._read_rows)
        self._read_bytes += len(lines) + len(end)
        self._read_rows += len(rows)
        self._given_rows = max(self._given_rows, self._read_rows)
        return rows[given:]


@contextlib.contextmanager
def following(path: Path, *, steps: int, progress: Progress, failures: list[Exception]) -> Iterator[None]:
    """Pass each row of a growing training log to ``progress``: the same way for one process and for workers elsewhere.

    What ``progress`` raises is added to ``failures``: it ends the telling and not the training.
    """
    ended = threading.Event()

    def follow() -> None:
        growing = GrowingLog(path)
        while True:
            last_look = ended.wait(POLL_SECONDS)
            for row in growing.new_rows():
                progress(row["step"], steps, row)
            if last_look:
                return

    def guarded() -> None:
        try:
            follow()
        except Exception as error:  # noqa: BLE001 (a thread's border: raised when the adapter is safe)
            failures.append(error)

    thread = threading.Thread(target=guarded, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
