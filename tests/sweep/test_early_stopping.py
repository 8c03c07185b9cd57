"""Early stopping: the trials that are compared, the steps of the rungs, the replay of a log, and whole sweeps of stubs."""

from __future__ import annotations

import functools
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, with_overrides
from pause_ray.core.storage import is_complete
from pause_ray.sweep.early_stopping import EarlyStopping, _compared_values, is_compared
from pause_ray.sweep.search import RungScore, SearchLog, SearchRecord, Stop
from pause_ray.sweep.spec import PlannedTrial, SchedulerSpec, SweepSpec, expand
from tests.sweep.stubs import write_stub_sweep
from tests.sweep.test_robust_sweep import run_to_its_end, started, wait_until
from tests.sweep.test_sharing import TAKING_TURNS, run_on_one_gpu

ASHA: JsonObject = {"kind": "asha", "grace_period": 2, "reduction_factor": 2}
NEEDLE = {"needle": "The map is under the drum.", "question": "Where is the map?", "keywords": ["drum"]}
FACTS = {
    "needle": "The gate of {place} is {colour}.",
    "question": "Which colour has the gate of {place}?",
    "slots": {"place": ["Oslo", "Lima", "Cairo"], "colour": ["red", "blue"]},
}
SWEEP: JsonObject = {
    "name": "compared",
    "trial": {
        "model": {"source": "none"},
        "pauses": {"unit": "paragraph"},
        "corpus": {"sources": [{"path": "none"}], "facts": {"facts": [FACTS]}, "num_sequences": 64},
        "train": {"max_steps": 8},
        "eval": {
            "name": "one",
            "noise": "The grass is green.",
            "task": {"kind": "single", "needles": {"needles": [NEEDLE]}},
            "context_tokens": [512],
            "depth_percent": [0, 100],
        },
    },
    "search": {"train.lora.rank": {"grid": [2, 4, 8, 16]}},
    "arms": {"baseline": {"pauses": None, "train": None}, "no_pauses": {"pauses": None}},
    "replicates": 2,
    "scheduler": ASHA,
}


def sweep_of(**changes: Any) -> SweepSpec:
    return SweepSpec.parse(with_overrides(SWEEP, changes), origin="test")


def compared_trials(sweep: SweepSpec) -> list[PlannedTrial]:
    return [planned for planned in expand(sweep) if is_compared(planned, sweep)]


def test_the_unchanged_arm_is_compared_at_replicate_0() -> None:
    found = compared_trials(sweep_of())
    assert [(each.arm, each.spec.replicate, each.point["train.lora.rank"]) for each in found] == [
        ("pause_tuned", 0, rank) for rank in (2, 4, 8, 16)
    ]
    assert compared_trials(sweep_of(scheduler=None)) == []


def test_a_suite_whose_text_is_its_tasks_own_lines_has_no_early_stopping() -> None:
    own = {"name": "own_lines", "task": {"kind": "key_value"}, "context_tokens": [512], "depth_percent": [0, 100]}
    with pytest.raises(SpecError, match=r"scheduler.* own_lines .*key_value"):
        expand(sweep_of(**{"trial.eval": own}))


def test_rungs_are_at_powers_of_the_reduction_factor_before_the_end() -> None:
    spec = SchedulerSpec(kind="asha", grace_period=2, reduction_factor=3)
    assert [spec.steps(max_steps) for max_steps in (2, 3, 18, 19, 54, 55)] == [(), (2,), (2, 6), (2, 6, 18), (2, 6, 18), (2, 6, 18, 54)]
    with pytest.raises(SpecError, match=r"grace_period 8 is not below train.max_steps 8"):
        expand(sweep_of(scheduler={**ASHA, "grace_period": 8}))


def score_of(trial: str, rung: int, score: float) -> RungScore:
    return RungScore(trial=trial, rung=rung, step=2 * 2**rung, proxy_score=score, num_cells=16, seconds=1.5, prefilled_tokens=900)


@dataclass
class Driver:
    """A driver's scheduler on the log in a folder, as it is after a start."""

    folder: Path
    finished: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sweep = sweep_of()
        assert sweep.scheduler is not None
        trials = dict(zip("abcd", compared_trials(sweep), strict=True))
        self.newly_stopped: list[str] = []
        self._tune_trials: dict[str, Any] = {}
        self.scheduler = EarlyStopping(
            sweep.scheduler,
            mode="max",
            trials=trials,
            finished=self.finished,
            search_log=SearchLog(self.folder),
            on_stop=self.newly_stopped.append,
        )

    def report(self, score: RungScore) -> bool:
        """Let a trial report a score, under an identifier of Tune's that is new in this command; return whether it is stopped."""
        if score.trial not in self._tune_trials:
            self._tune_trials[score.trial] = SimpleNamespace(trial_id=f"tune-{score.trial}")
            self.scheduler.on_trial_add(None, self._tune_trials[score.trial])
        decision = self.scheduler.on_trial_result(None, self._tune_trials[score.trial], {"rung": score, **_compared_values(score)})
        return decision == TrialScheduler.STOP


SCORES = [("a", 0, 0.5), ("b", 0, 0.7), ("a", 1, 0.4), ("c", 0, 0.2), ("b", 1, 0.6), ("d", 0, 0.65), ("d", 1, 0.3)]
STOPPED = {"c": 0, "d": 1}


@pytest.mark.parametrize("lives", [len(SCORES), 1, 2, 3])
def test_a_restarted_driver_stops_the_same_trials(tmp_path: Path, lives: int) -> None:
    for number, (trial, rung, score) in enumerate(SCORES):
        if number % lives == 0:
            driver = Driver(tmp_path)
            assert not driver.newly_stopped, "the log has every stop already"
        assert driver.report(score_of(trial, rung, score)) == (STOPPED.get(trial) == rung)
    record = SearchRecord.read(tmp_path)
    assert {key: stop.rung for key, stop in record.stops.items()} == STOPPED
    assert [(score.trial, score.rung, score.proxy_score) for score in record.rungs] == SCORES


def test_a_stop_that_a_killed_driver_did_not_write_is_written_at_the_next_start(tmp_path: Path) -> None:
    log = SearchLog(tmp_path)
    for score in [score_of("a", 0, 0.5), score_of("elsewhere", 0, 0.9), score_of("b", 0, 0.2)]:
        log.append(score.as_event(point={}))
    driver = Driver(tmp_path)
    assert driver.newly_stopped == ["b"]
    assert driver.scheduler.stopped == {"b"}
    assert SearchRecord.read(tmp_path).stops == {"b": Stop(trial="b", rung=0, by="asha")}
    assert not Driver(tmp_path).newly_stopped


def test_a_finished_trial_is_compared_with_and_not_stopped(tmp_path: Path) -> None:
    for score in [score_of("a", 0, 0.5), score_of("b", 0, 0.2)]:
        SearchLog(tmp_path).append(score.as_event(point={}))
    driver = Driver(tmp_path, finished=("b",))
    assert not driver.newly_stopped
    assert driver.report(score_of("c", 0, 0.3)), "the median of 0.5 and 0.2 is 0.35"


RANKS = (12, 2, 14, 4)


@pytest.fixture(scope="module")
def stub_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheduler = {**ASHA, "proxy": {"facts": 16, "context_tokens": [2048]}}
    changes = {"search": {"train.lora.rank": {"grid": list(RANKS)}}, "trial.train.max_steps": 8, "trial.train.warmup_steps": 0}
    return write_stub_sweep(
        tmp_path_factory.mktemp("texts"), name="stopped", scheduler=scheduler, arms={"tuned": {"pauses": None}}, **changes
    )


def found(storage: Path) -> tuple[list[tuple[int, int, float | None]], dict[int, int], dict[str, list[int]]]:
    """Return (rank, rung, proxy score) in their recorded order, the rung of each stop by rank, and the finished ranks by arm."""
    [folder] = (path.parent for path in storage.glob("sweeps/*/sweep.json"))
    record, entries = SearchRecord.read(folder), json.loads((folder / "sweep.json").read_text())["trials"]
    ranks = {entry["digest"]: entry["point"]["train.lora.rank"] for entry in entries}
    finished: dict[str, list[int]] = {}
    for entry in entries:
        if is_complete(storage / "trials" / entry["digest"]):
            finished.setdefault(entry["arm"], []).append(ranks[entry["digest"]])
    scores = [(ranks[score.trial], score.rung, score.proxy_score) for score in record.rungs]
    return scores, {ranks[key]: stop.rung for key, stop in record.stops.items()}, finished


@pytest.mark.slow
@pytest.mark.ray
def test_a_stub_sweep_stops_the_weak_trials_and_a_killed_driver_stops_the_same(stub_sweep: Path, tmp_path: Path) -> None:
    code, output = run_to_its_end(stub_sweep, tmp_path / "whole")
    assert code == 0, output
    scores, stops, finished = found(tmp_path / "whole")
    assert [(rank, rung) for rank, rung, _ in scores] == [(12, 0), (12, 1), (2, 0), (14, 0), (14, 1), (4, 0)]
    assert stops == {2: 0, 4: 0}
    assert finished == {"pause_tuned": [12, 14], "tuned": [12, 14]}, "other arms run at the surviving points"
    assert not list((tmp_path / "whole" / "checkpoints").glob(".*.after-*/manifest.json")), "adapters of rungs stayed behind"
    for num_scores in (1, 4):  # between two rungs of a trial, and after a stop
        with started(stub_sweep, tmp_path / "killed", step_seconds=0.3) as process:
            wait_until(functools.partial(_has_scores, tmp_path / "killed", num_scores), process)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    code, output = run_to_its_end(stub_sweep, tmp_path / "killed")
    assert code == 0, output
    assert found(tmp_path / "killed") == (scores, stops, finished)


def _has_scores(storage: Path, number: int) -> bool:
    return sum(path.read_text().count('"event": "rung"') for path in storage.glob("sweeps/*/search.jsonl")) >= number


@pytest.mark.slow
@pytest.mark.ray
def test_trials_whose_workers_and_scoring_take_turns_on_one_gpu_are_stopped(tmp_path: Path) -> None:
    resources = {**TAKING_TURNS, "train_workers": 1, "scoring_idle_seconds": 1.0}
    changes = {
        **{f"trial.resources.{name}": value for name, value in resources.items()},
        "search": {"train.lora.rank": {"grid": [12, 2]}},
        "trial.train.max_steps": 8,
        "trial.train.warmup_steps": 0,
        "scheduler": {**ASHA, "proxy": {"facts": 16, "context_tokens": [2048]}},
        "arms": {},
        "max_concurrent_trials": 1,
    }
    num_gpus = run_on_one_gpu(tmp_path, changes)
    scores, stops, finished = found(tmp_path / "runs")
    assert [(rank, rung) for rank, rung, _ in scores] == [(12, 0), (12, 1), (2, 0)]
    assert (stops, finished) == ({2: 0}, {"pause_tuned": [12]})
    assert num_gpus == [1] * 4, "workers begin anew for each rung and for the rest"
