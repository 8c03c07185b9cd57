"""A trial's process that has nothing to do gives back what it holds, though it is not known yet whether more is to come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.storage import Storage

ray = pytest.importorskip("ray")
from ray import tune  # noqa: E402

from pause_ray.sweep.trainable import NOT_YET, ReapIdleActors, run_tuner  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
ALL_CPUS, EACH = 8, 3


ENDS_WITH = {"short": "long-begun", "late": "late-begun", "long": "late-ended"}
"""Trial → the file that it waits for."""


class Waits(tune.Trainable):  # type: ignore[misc]
    """Holds its place until a file is there."""

    def setup(self, config: dict[str, Any], *, folder: Path) -> None:
        self.folder = folder

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        key = str(self.config["trial"])
        (self.folder / f"{key}-begun").touch()
        while not (self.folder / ENDS_WITH[key]).exists():
            time.sleep(0.02)
        return {tune.result.DONE: True}


def test_a_process_without_a_trial_ends_while_others_run_and_another_starts_for_a_trial_that_comes_late(tmp_path: Path) -> None:
    ended: list[str] = []
    free: list[float] = []

    def note_end(key: str, error: Exception | None) -> None:
        ended.append(key)
        (tmp_path / f"{key}-ended").touch()

    def trials() -> Iterator[str | None]:
        yield from ("short", "long")
        deadline = time.monotonic() + 240
        while free[-1:] != [ALL_CPUS - EACH]:
            if time.monotonic() > deadline:
                (tmp_path / "late-ended").touch()
                return
            free.append(ray.available_resources().get("CPU", 0))
            yield NOT_YET
        yield "late"

    coming = trials()
    run_tuner(
        tune.with_resources(tune.with_parameters(Waits, folder=tmp_path), tune.PlacementGroupFactory([{"CPU": EACH}])),
        next_trial=lambda: next(coming, None),
        ended=note_end,
        scheduler=ReapIdleActors(2.0),
        concurrent_trials=2,
        name="idle",
        storage=Storage.open(tmp_path / "runs"),
    )
    assert ended == ["short", "late", "long"]
    assert free[0] == ALL_CPUS - 2 * EACH, "the place was kept for a moment"
