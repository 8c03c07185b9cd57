"""How far a sweep is, read from storage: counted in ledgers and manifests, and as its driver said, with the age of what it said."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pause_ray.cli.main import app
from pause_ray.core import storage as storage_module
from pause_ray.core.errors import StorageError, UserError
from pause_ray.core.storage import Storage, exclusive, holder_of, read_json, write_json
from pause_ray.report.overview import overview, sweep_status
from pause_ray.sweep.status import ActorCounts, LiveStatus, RunningTrial, Speed, TrainingProgress
from tests.stored_sweep import grid, rows, stop_event, store_search, store_sweep, store_trial
from tests.sweep.tiny_sweep import write_sweep

LENGTHS, DEPTHS = (1024, 2048), (10.0, 90.0)
TRIALS = [
    ("base", "baseline", {}, 0),
    ("tuned1", "pause_tuned", {"train.lora.rank": 1}, 0),
    ("tuned2", "pause_tuned", {"train.lora.rank": 2}, 0),
    ("tuned4", "pause_tuned", {"train.lora.rank": 4}, 0),
    ("tuned8", "pause_tuned", {"train.lora.rank": 8}, 0),
    ("tuned16", "pause_tuned", {"train.lora.rank": 16}, 0),
]
ME = f"process {os.getpid()} on {socket.gethostname()}"
STEPS = 3
TRAINING = [{"step": step, "loss": 1.0, "learning_rate": 1e-4, "tokens": 500, "seconds": 1.0} for step in range(1, STEPS + 1)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "runs")


@pytest.fixture
def folder(storage: Storage) -> Path:
    """A sweep with a trial in every state: finished (2), scoring when it was left, failed, stopped, and one to come."""
    scores = grid(LENGTHS, DEPTHS, lambda *_: 1.0)
    store_trial(storage, "base", rows(scores, trial="base"))
    store_trial(storage, "tuned1", rows(scores, trial="tuned1"), trained=True, training=TRAINING)
    unscored = grid((1024,), DEPTHS, lambda length, depth: None if depth == 90.0 else 0.5)
    store_trial(storage, "tuned2", rows(unscored, trial="tuned2"), trained=True, finished=False)
    with (storage.trials / "tuned2" / "cells.jsonl").open("a") as ledger:
        ledger.write('{"cell_id": "half')  # as a killed process leaves it
    made = store_sweep(storage, TRIALS, spec={"arm": "pause_tuned"})
    described = read_json(made / "sweep.json")
    for entry in described["trials"]:
        entry |= {"cells": len(LENGTHS) * len(DEPTHS), "steps": 0 if entry["arm"] == "baseline" else STEPS}
    write_json(made / "sweep.json", described)
    store_search(made, [stop_event("tuned8", 0)])
    return made


def live(**changes: Any) -> LiveStatus:
    """What a driver says of itself now."""
    plain = LiveStatus(
        written=time.time(),
        every_seconds=3.0,
        began=time.time() - 100,
        driver="process 1 on elsewhere",
        seconds_left=600.0,
        speed=Speed(cells=1.5, scored_tokens=2000.0, trained_tokens=0.0),
        actors=ActorCounts(busy=2, idle=1, coming=0),
        gpus=4.0,
        gpu_idle_share=0.25,
        running=(RunningTrial(digest="tuned2", label="pause_tuned rank=2 #0", stage="scoring", done=1, total=4, seconds=12.0),),
        failures={"tuned4": "no such layer"},
        trained={"tuned2": TrainingProgress(steps=3, tokens=1500), "tuned4": TrainingProgress(steps=2, tokens=1000)},
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def driven(folder: Path) -> Iterator[Path]:
    """The sweep while a driver runs it."""
    with exclusive(folder / ".lock"):
        live(driver=ME).write(folder)
        yield folder


def test_everything_is_counted_without_a_word_of_a_driver(storage: Storage, folder: Path) -> None:
    found = sweep_status(folder, storage).as_json()
    assert found["trials"] == {"finished": 2, "begun": 1, "to come": 2, "stopped": 1}
    assert (found["cells_done"], found["cells_unscored"], found["cells"]) == (4 + 4 + 1, 1, 6 * 4)
    assert (found["steps_done"], found["steps"]) == (STEPS, 5 * STEPS)
    answered = 2 * (1024 + 1024 + 2048 + 2048) + 2 * 1024
    assert found["tokens"] == {"prefilled": answered, "decoded": 12 * 10, "trained": 1500}
    assert (found["driver"], found["live"], found["failures"]) == (None, None, {})


def test_an_adapter_that_two_trials_share_was_trained_once(storage: Storage, folder: Path) -> None:
    store_trial(storage, "tuned4", rows(grid((1024,), DEPTHS, lambda *_: 1.0), trial="tuned4"), trained=True, training=TRAINING)
    found = sweep_status(folder, storage)
    assert found.trained_tokens == 1500
    assert found.as_json()["steps_done"] == 2 * STEPS


@pytest.mark.parametrize("is_there", [True, False])
def test_an_adapter_counts_once_while_one_that_shares_it_is_still_asked(storage: Storage, folder: Path, is_there: bool) -> None:
    """Two trials that differ in what is asked: one is finished, the other has its first answers."""
    shared = Path(read_json(storage.trials / "tuned1" / "manifest.json")["checkpoint"]).name
    if is_there:
        write_json(storage.checkpoints / shared / "manifest.json", {})
        (storage.checkpoints / shared / "training.jsonl").write_text("".join(json.dumps(step) + "\n" for step in TRAINING))
    store_trial(storage, "tuned4", rows({(1024, 10.0): 1.0}, trial="tuned4", adapter=shared), finished=False)
    found = sweep_status(folder, storage)
    assert found.trained_tokens == sum(step["tokens"] for step in TRAINING)
    assert found.as_json()["steps_done"] == (2 * STEPS if is_there else STEPS)


def test_a_trial_whose_answers_name_a_finished_adapter_is_trained(storage: Storage, folder: Path) -> None:
    checkpoint = storage.checkpoints / "abcdef"
    write_json(checkpoint / "manifest.json", {})
    (checkpoint / "training.jsonl").write_text("".join(json.dumps(step) + "\n" for step in TRAINING))
    store_trial(storage, "tuned4", rows(grid((1024,), DEPTHS, lambda *_: 1.0), trial="tuned4", adapter="abcdef"), finished=False)
    found = sweep_status(folder, storage)
    assert (found.as_json()["steps_done"], found.trained_tokens) == (2 * STEPS, 2 * 1500)


def test_a_driver_adds_what_runs_what_failed_and_what_is_trained(storage: Storage, driven: Path) -> None:
    found = sweep_status(driven, storage)
    assert found.by_state == {"finished": 2, "running": 1, "to come": 1, "failed": 1, "stopped": 1}
    assert found.driver is not None
    assert found.driver.startswith("process ")
    assert found.failures == {"pause_tuned rank=4 #0": "no such layer"}
    assert found.is_live
    assert found.as_json()["steps_done"] == STEPS + 3 + 2
    assert found.trained_tokens == 1500 + 1500 + 1000


def test_what_a_killed_driver_said_is_not_taken_for_what_is_so(storage: Storage, folder: Path) -> None:
    live(written=time.time() - 3600).write(folder)
    found = sweep_status(folder, storage)
    assert (found.driver, found.is_live) == (None, False)
    assert found.by_state["begun"] == 1, "what it was at does not run"
    shown = show(storage, "demo")
    assert "wrote its last status 60 min ago" in shown
    assert "busy" not in shown


def test_a_driver_that_holds_the_sweep_and_says_nothing_is_said_to_hang(storage: Storage, folder: Path) -> None:
    live(driver=ME, written=time.time() - 200).write(folder)
    with exclusive(folder / ".lock"):
        shown = show(storage, "demo")
    assert "status of 3 min ago; this is old" in shown


@pytest.mark.parametrize("before", [{}, {"written": time.time() - 3600}, {"driver": ME, "ended": time.time()}])
def test_what_the_driver_before_said_is_not_the_word_of_one_that_starts(storage: Storage, folder: Path, before: dict[str, Any]) -> None:
    live(**before).write(folder)
    with exclusive(folder / ".lock"):
        found, shown = sweep_status(folder, storage), show(storage, "demo")
    assert found.driver is not None
    assert found.driver.startswith(ME)
    assert (found.is_live, found.as_json()["live"]["is_current"]) == (False, False)
    assert found.by_state == {"finished": 2, "begun": 1, "to come": 1, "failed": 1, "stopped": 1}
    assert f"runs: {ME}" in shown
    assert "it is starting and has written no status yet" in shown
    assert not [words for words in ("status of", "this is old", "scoring 1/4") if words in shown]


def test_trials_of_an_arm_that_was_given_up_are_not_to_come_and_it_is_said_why(storage: Storage, folder: Path) -> None:
    live(ended=time.time() - 180, running=(), given_up={"pause_tuned": "3 of 5 trials have failed"}).write(folder)
    assert sweep_status(folder, storage).by_state == {"finished": 2, "failed": 1, "stopped": 3}
    shown = show(storage, "demo")
    assert "the last one ended 3 min ago" in shown
    assert "arm pause_tuned given up: 3 of 5 trials have failed" in shown


def test_where_locks_are_not_seen_the_drivers_word_counts_while_it_is_fresh(storage: Storage, folder: Path) -> None:
    live().write(folder)
    assert sweep_status(folder, storage).driver == "process 1 on elsewhere"
    live(ended=time.time(), ended_by="it was interrupted", running=()).write(folder)
    assert sweep_status(folder, storage).driver is None
    assert "it was interrupted" in show(storage, "demo")


def show(storage: Storage, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["status", *arguments, "--storage", str(storage.root)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    return done.stdout


def refused(storage: Storage, *arguments: str) -> str:
    failure = CliRunner().invoke(app, ["status", *arguments, "--storage", str(storage.root)]).exception
    assert isinstance(failure, UserError)
    return str(failure)


def test_people_are_shown_all_of_it(storage: Storage, driven: Path) -> None:
    shown = show(storage, "demo")
    for words in (
        "2 finished, 1 running, 1 to come, 1 failed, 1 stopped",
        "9 of 24, 1 not scored",
        "8 of 15",
        "1.5 cells/s, 2,000 tokens/s scored",
        "10 min",
        "2 busy, 1 idle, 0 coming",
        "4, 25 % idle",
        "pause_tuned rank=2 #0: scoring 1/4, for 12 s",
        "pause_tuned rank=4 #0 failed: no such layer",
    ):
        assert words in shown
    told = json.loads(show(storage, "demo", "--json"))
    assert (told["cells_done"], told["live"]["is_current"]) == (9, True)


def test_without_a_name_every_sweep_is_a_line_the_last_one_first(storage: Storage, driven: Path) -> None:
    other = store_sweep(storage, TRIALS[:1], name="other")
    for path in (other / "sweep.json", storage.trials / "base" / "manifest.json"):
        os.utime(path, (time.time() - 3600,) * 2)
    lines = {line.name.rpartition("-")[0]: line for line in overview(storage)}
    assert (lines["demo"].finished, lines["demo"].planned, lines["demo"].left_out) == (2, 6, 1)
    assert (lines["other"].finished, lines["other"].driver) == (1, None)
    assert lines["demo"].driver is not None
    assert lines["other"].age == pytest.approx(3600, abs=60)
    assert show(storage).index("demo") < show(storage).index("other")
    assert [line["name"].partition("-")[0] for line in json.loads(show(storage, "--json"))["sweeps"]] == ["demo", "other"]


def test_a_sweeps_file_names_it_also_after_a_change(storage: Storage, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, tmp_path / "model")
    store_sweep(storage, TRIALS[:1], name="tiny")
    assert "tiny-0011" in show(storage, str(path))
    other = storage.sweeps / "tiny-ffff"
    described = read_json(storage.sweeps / "tiny-0011223344556677" / "sweep.json")
    write_json(other / "sweep.json", described)
    assert "several sweeps are called tiny; name one of them: tiny-0011223344556677, tiny-ffff" in refused(storage, str(path))
    from pause_ray.sweep.spec import read_sweep

    write_json(other / "sweep.json", described | {"spec": read_sweep(path, {}).resolved()})
    assert "tiny-ffff" in show(storage, str(path))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"name": "new"}))
    assert "no sweep is called new; name one of them: tiny-0011" in refused(storage, str(path))


def test_what_is_not_there_is_told_and_nothing_is_written(storage: Storage, tmp_path: Path) -> None:
    assert "no such folder here" in refused(storage)
    assert "no such folder here" in refused(storage, "demo")
    assert not storage.root.exists()
    storage.root.mkdir()
    assert "no sweep was begun there" in refused(storage)
    assert list(storage.root.iterdir()) == []
    store_sweep(storage, TRIALS[:1])
    assert "nix: no such sweep under" in refused(storage, "nix")
    assert "demo-0011223344556677" in refused(storage, "nix")
    assert "--set changes a sweep's file" in refused(storage, "demo", "--set", "trial.train.max_steps=3")
    assert "--set changes a sweep's file" in refused(storage, "--set", "trial.train.max_steps=3")


def test_a_live_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    nothing = live(actors=None, gpus=None, gpu_idle_share=None, running=(), failures={}, trained={}, seconds_left=None)
    for status in (live(given_up={"pause_tuned": "they failed"}), nothing):
        status.write(tmp_path)
        assert LiveStatus.read(tmp_path) == status


def test_a_live_status_of_another_version_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert LiveStatus.read(tmp_path) is None
    write_json(tmp_path / "status.json", {"format": 99, "anything": "else"})
    assert LiveStatus.read(tmp_path) is None
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(StorageError, match=r"status\.json"):
        LiveStatus.read(tmp_path)


def test_a_look_at_a_lock_keeps_nobody_from_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / ".lock"
    with exclusive(lock):
        assert (holder_of(lock) or "").startswith("process ")
    assert holder_of(lock) is None
    with lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with exclusive(lock):
            assert holder_of(lock) is not None
