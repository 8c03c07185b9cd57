"""``search.jsonl`` in a sweep's folder: proxy scores at rungs, and the trials that early stopping ended there.

The module reads and writes events and decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import read_json_lines, space_errors

SEARCH_LOG = "search.jsonl"


@dataclass(frozen=True, kw_only=True)
class RungScore:
    """The proxy score of an adapter in the middle of its training."""

    trial: str
    """The digest of the trial."""
    rung: int
    """The number of the rung, from 0."""
    step: int
    """The number of optimizer steps that the adapter was trained for."""
    proxy_score: float | None
    """The mean of the proxy's cells, 0 to 1; None if none could be scored."""
    num_cells: int
    seconds: float
    prefilled_tokens: int

    @classmethod
    def of_event(cls, event: JsonObject) -> RungScore:
        """Read a ``rung`` event."""
        return cls(
            trial=event["trial"],
            rung=event["rung"],
            step=event["step"],
            proxy_score=event["proxy_score"],
            num_cells=event["cells"],
            seconds=event["seconds"],
            prefilled_tokens=event["prefilled_tokens"],
        )

    def as_event(self, *, point: JsonObject) -> JsonObject:
        """Return the event for the log; ``point`` is the trial's."""
        return {
            "event": "rung",
            "trial": self.trial,
            "point": point,
            "rung": self.rung,
            "step": self.step,
            "proxy_score": self.proxy_score,
            "cells": self.num_cells,
            "seconds": self.seconds,
            "prefilled_tokens": self.prefilled_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The early stop of a trial."""

    trial: str
    rung: int
    """The rung at which the trial was stopped."""
    by: str
    """The scheduler's kind."""

    def as_event(self, *, point: JsonObject) -> JsonObject:
        """Return the event for the log; ``point`` is the trial's."""
        return {"event": "stopped", "trial": self.trial, "point": point, "rung": self.rung, "by": self.by}


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The rungs and stops of a sweep."""

    rungs: tuple[RungScore, ...] = ()
    """The scores in their recorded order; of a rung that was recorded twice the first score counts."""
    stops: Mapping[str, Stop] = field(default_factory=dict)
    """The stops by the trial's digest."""

    @classmethod
    def read(cls, sweep_folder: Path) -> SearchRecord:
        """Read the log of a sweep; a sweep without a log has an empty record.

        Raises:
            StorageError: a line is not an event.
        """
        rungs: dict[tuple[str, int], RungScore] = {}
        stops: dict[str, Stop] = {}
        for event in read_json_lines(sweep_folder / SEARCH_LOG):
            if event.get("event") == "rung":
                rungs.setdefault((event["trial"], event["rung"]), RungScore.of_event(event))
            elif event.get("event") == "stopped":
                stops[event["trial"]] = Stop(trial=event["trial"], rung=event["rung"], by=event["by"])
        return cls(rungs=tuple(rungs.values()), stops=stops)

    def left_out(self, entries: Sequence[JsonObject], *, arm: str) -> set[str]:
        """Return the digests of the trials that will not be finished.

        These are the stopped trials, and those of other arms and replicates at points where no trial of ``arm`` survived.

        Args:
            entries: The sweep's trials, as in ``sweep.json``.
            arm: The arm whose trials at replicate 0 early stopping compares.
        """
        if not self.stops:
            return set()
        compared = [entry for entry in entries if entry["arm"] == arm and entry["replicate"] == 0]
        alive = [entry["point"] for entry in compared if entry["digest"] not in self.stops]
        return {
            entry["digest"]
            for entry in entries
            if entry["digest"] in self.stops or not any(_agrees(entry["point"], point) for point in alive)
        }


def _agrees(point: JsonObject, other: JsonObject) -> bool:
    """Return whether ``other`` has all values of ``point``."""
    return all(path in other and other[path] == value for path, value in point.items())


class SearchLog:
    """The events of one sweep's search, oldest first."""

    def __init__(self, folder: Path) -> None:
        """Name the log of the sweep in ``folder``; neither has to exist yet."""
        self.path = folder / SEARCH_LOG
        self._cut = False

    def events(self) -> list[JsonObject]:
        """Every event that was written to its end; none if there is no log yet.

        Raises:
            StorageError: a line that is no event, which no interrupted run leaves behind.
        """
        return read_json_lines(self.path)

    def append(self, event: JsonObject) -> None:
        """Add one event, plain JSON data with its kind under ``event``; on return it is on disk.

        Raises:
            StorageError: disk full or not writable; the log is then as it was before.
        """
        line = (json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with space_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._cut:
                self._cut_half_line()
            with self.path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise

    def _cut_half_line(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            written = self.path.read_bytes()
            os.truncate(self.path, written.rfind(b"\n") + 1)
        self._cut = True
