"""What the driver of a sweep says of itself while it runs: ``status.json`` in the sweep's folder, replaced every few seconds.

Only what storage does not tell otherwise: speeds, the fleet, who is at what, why trials failed. Reads and writes the file; measures
nothing, and knows no Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pause_ray.spec import JsonObject
from pause_ray.storage import read_json, write_json

STATUS_FILE = "status.json"
FORMAT = 2
BEATS_UNTIL_OLD = 5
"""A file that was due so often and has not come is old: its driver hangs, was killed, or cannot write."""


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial that has begun and not ended."""

    digest: str
    label: str
    stage: str
    """As ``sweep.progress.TrialState`` has it."""
    done: int
    total: int
    """Of the stage: steps while training, cells while scoring."""
    seconds: float
    """Since it came to this stage."""


@dataclass(frozen=True, kw_only=True)
class FleetSize:
    """Scoring actors."""

    busy: int
    idle: int
    coming: int
    """Starting, or without room."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of the last minute, per second."""

    cells: float = 0.0
    scored_tokens: float = 0.0
    """Of prompts and answers, those that went through the model."""
    trained_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How far the training of a trial has come."""

    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class LiveStatus:
    """One moment of a driver. Times are seconds since 1970 by its clock."""

    written: float
    every_seconds: float
    """The next one is due after so long."""
    began: float
    ended: float | None = None
    """None while it runs, and for ever if it was killed."""
    ended_by: str | None = None
    """Why it ended before its end."""
    driver: str
    """Process and machine."""
    seconds_left: float | None
    """As the display says; None while nothing tells how fast it goes."""
    speed: Speed
    fleet: FleetSize | None
    """None while nothing is known of it."""
    gpus: float | None
    """Of the cluster, as Ray counts them; None while it does not answer."""
    gpu_idle_share: float | None
    """Of them, 0 to 1, those that nobody holds or whose holder waits; None if none are known."""
    running: tuple[RunningTrial, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    """Trial → why it did not finish in this run."""
    given_up: Mapping[str, str] = field(default_factory=dict)
    """Arm → why its other trials were not begun in this run."""
    trained: Mapping[str, Trained] = field(default_factory=dict)
    """Trial → how far it is, of those that are not finished; also as drivers before this one left it."""

    @classmethod
    def read(cls, sweep_folder: Path) -> LiveStatus | None:
        """The last one; None where no driver wrote one, or one of another version did.

        Raises:
            StorageError: the file is damaged.
        """
        path = sweep_folder / STATUS_FILE
        if not path.is_file():
            return None
        data = read_json(path)
        if data.pop("format", None) != FORMAT:
            return None
        fleet = data.pop("fleet")
        return cls(
            **data
            | {
                "speed": Speed(**data["speed"]),
                "fleet": FleetSize(**fleet) if fleet else None,
                "running": tuple(RunningTrial(**trial) for trial in data["running"]),
                "trained": {key: Trained(**its) for key, its in data["trained"].items()},
            }
        )

    def as_json(self) -> JsonObject:
        """Plain data."""
        return dataclasses.asdict(self)

    def write(self, sweep_folder: Path) -> None:
        """Replace the file; readers see the old one or this one.

        Raises:
            StorageError: disk full or not writable.
        """
        write_json(sweep_folder / STATUS_FILE, {"format": FORMAT, **self.as_json()})

    def age_seconds(self, now: float) -> float:
        """Since it was written; machines' clocks may differ by a little."""
        return max(0.0, now - self.written)

    def is_current(self, now: float) -> bool:
        """Whether its driver can be taken to run, and this to be how things are."""
        return self.ended is None and self.age_seconds(now) <= BEATS_UNTIL_OLD * self.every_seconds
