"""Schedulers that end trainings: who is given up, what goes on meanwhile, what is left behind, and how it is taken up again.

Among them what Tune and Ray Train do when they are left alone: scoring that waits for room in the trial's own placement group (in every
test the scoring actor comes up while the trial holds all of its group), scores that the scheduler never gets, an end by force at
``max_t``, workers' groups that outlive a stop.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import ray
from ray import tune
from ray.tune.experiment import Trial

from pause_ray.core.storage import Storage, write_json
from pause_ray.sweep.governed import Verdicts, _judge, _Minutes
from pause_ray.sweep.governed_trial import TIME, GovernedTrial
from pause_ray.sweep.rungs import Schedule
from pause_ray.sweep.search import SweepTrial
from pause_ray.sweep.search_log import Rung, SearchLog, SearchRecord
from pause_ray.sweep.trainable import Shared
from tests.sweep.judged import FAILING_RANK, LENGTH, Judged, happened, judge, num_groups, sweep_of, trials_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ASHA = {"kind": "asha", "rungs": 2, "reduction": 2}
HYPERBAND = {"kind": "hyperband", "rungs": 1, "reduction": 2}
RANKS, BRACKETS = [12, 2, 14, 4], [2, 4, 14, 12]
CELLS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def asha(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return judge(sweep_of(folder, RANKS, scheduler=ASHA), tmp_path_factory.mktemp("asha"), held={2: 3, 4: 3}, waits_for=(12, 2))


@pytest.fixture(scope="module")
def hyperband(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return judge(sweep_of(folder, BRACKETS, scheduler=HYPERBAND), tmp_path_factory.mktemp("hyperband"), held={14: 5, 12: 5})


def steps_of(root: Path, rank: int) -> list[int]:
    return [event["step"] for event in happened(root, "step") if event["rank"] == rank]


def test_asha_gives_up_who_is_behind_and_the_others_get_their_whole_grid(asha: Judged) -> None:
    assert asha.stopped == {2: 0, 4: 0}
    assert asha.finished == {12, 14}
    assert {rank: asha.num_cells(rank) for rank in (12, 14)} == {12: CELLS, 14: CELLS}
    assert asha.seen == [(12, 0), (12, 1), (2, 0), (14, 0), (14, 1), (4, 0)]
    assert steps_of(asha.root, 12) == steps_of(asha.root, 14) == list(range(1, 9)), (
        "who reached the end of the scheduler's clock was cut off"
    )
    assert steps_of(asha.root, 2) == steps_of(asha.root, 4) == [1, 2, 3]
    assert not asha.failures
    scores = {asha.ranks[rung.trial]: rung.proxy_score or 0.0 for rung in asha.record.rungs}
    assert scores[14] > scores[12] > max(scores[2], scores[4])


def test_training_goes_on_while_a_rung_is_scored(asha: Judged) -> None:
    """The engine does not answer before it has; here it is seen that it did so in time."""
    begun, ended = (
        next(event["at"] for event in happened(asha.root, what) if (event["rank"], event["after"]) == (12, 2))
        for what in ("scoring", "scored")
    )
    assert begun < ended
    assert [event for event in happened(asha.root, "step") if event["rank"] == 12 and event["step"] > 3 and event["at"] < ended]


def test_who_is_given_up_holds_nothing_when_the_next_begins(asha: Judged) -> None:
    stops = {event["rank"]: event["at"] for event in happened(asha.root, "stops")}
    begins = {event["rank"]: event["at"] for event in happened(asha.root, "begins")}
    assert stops.keys() == {2, 4}
    assert stops[2] < begins[14]


def test_lines_of_a_training_name_its_trial_also_after_its_rung(asha: Judged) -> None:
    digests = {rank: key for key, rank in asha.ranks.items()}
    lines = {event["rank"]: event["line"] for event in happened(asha.root, "stops")}
    assert lines.keys() == {2, 4}
    for rank, line in lines.items():
        assert line.startswith("trial "), line
        assert line.endswith(f"({digests[rank][:8]}): stops"), line


def test_a_search_goes_on_where_it_was_left(folder: Path, tmp_path: Path, asha: Judged) -> None:
    sweep = sweep_of(folder, RANKS, scheduler=ASHA)
    begun = judge(sweep, tmp_path, at_most=2)
    assert (begun.finished, begun.stopped) == ({12}, {2: 0})
    resumed = judge(sweep, tmp_path)
    assert (resumed.stopped, resumed.finished, resumed.seen) == (asha.stopped, asha.finished, asha.seen)
    assert len(happened(tmp_path, "scored")) == len(happened(asha.root, "scored")), "what was scored before was scored again"
    log = (resumed.folder / "search.jsonl").read_bytes()
    again = judge(sweep, tmp_path)
    assert (again.folder / "search.jsonl").read_bytes() == log
    assert len(happened(tmp_path, "begins")) == 4


def test_a_rung_that_was_scored_before_the_driver_died_is_not_scored_again(folder: Path, tmp_path: Path, asha: Judged) -> None:
    shutil.copytree(asha.root, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "sweeps" / "judged" / "search.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert '"stopped"' in lines[-1]
    log.write_text("".join(lines[:-1]))  # as if the driver had died between the rung and what follows from it
    again = judge(sweep_of(folder, RANKS, scheduler=ASHA), tmp_path)
    assert again.stopped == {2: 0, 4: 0}
    assert log.read_text().splitlines(keepends=True) == lines
    assert happened(tmp_path, "scored") == happened(asha.root, "scored")


def test_hyperband_pauses_a_bracket_until_all_are_there_and_goes_on_with_its_best(hyperband: Judged) -> None:
    assert hyperband.stopped == {12: 0}, "the first bracket lets both train to the end, the second keeps one of two"
    assert hyperband.finished == {2, 4, 14}
    assert not hyperband.failures
    root = hyperband.root
    assert [event["rank"] for event in happened(root, "stops")] == [14, 12], "a pause is a checkpoint of the training"
    assert steps_of(root, 14) == list(range(1, 9)), "the training went on after the pause where it was"
    assert len([event for event in happened(root, "begins") if event["rank"] == 14]) == 2


def test_hyperband_does_not_run_more_at_a_time_than_was_said(hyperband: Judged) -> None:
    events = [event for what in ("begins", "stops", "ends") for event in happened(hyperband.root, what)]
    order = [event["what"] == "begins" for event in sorted(events, key=lambda event: event["at"])]
    assert order == [True, False] * (len(order) // 2)


def test_an_interrupted_search_gives_nobody_up_for_that_and_goes_on(folder: Path, tmp_path: Path, hyperband: Judged) -> None:
    sweep = sweep_of(folder, BRACKETS, scheduler=HYPERBAND)
    judge(sweep, tmp_path, ends_after=3)
    resumed = judge(sweep, tmp_path)
    assert (resumed.stopped, resumed.finished) == (hyperband.stopped, hyperband.finished)
    assert sorted(resumed.seen) == sorted(hyperband.seen)


def test_the_median_rule_compares_with_three_others_and_one_that_fails_is_none_of_them(folder: Path, tmp_path: Path) -> None:
    judged = judge(sweep_of(folder, [6, FAILING_RANK, 8, 7, 2, 10], scheduler={**HYPERBAND, "kind": "median"}), tmp_path)
    assert list(judged.failures) == [FAILING_RANK]
    assert judged.stopped == {2: 0}
    assert judged.finished == {6, 8, 7, 10}


SCORES = (0.2, 0.4, 0.9)
"""At its rungs, of each trial that the median rule compares with: a mean of 0.5 at the last one, and of 0.6 if that counted twice."""


def replayed(storage: Storage, schedule: Schedule, trials: Mapping[str, SweepTrial], *, is_resumed: bool) -> dict[str, int]:
    """Let the scheduler hear the recorded rungs, trial by trial: who is stopped, and after which.

    A settled trial ends with its last rung; one that was trained just now (not ``is_resumed``) at the end of the scheduler's clock.
    """
    scheduler, verdicts = _judge(schedule.scheduler, mode="max"), ray.remote(Verdicts).options(num_cpus=0).remote()
    log = SearchLog(storage.root)
    scheduler.minutes = _Minutes(trials=trials, by="median", log=log, verdicts=verdicts, board=None, settled=schedule.settled)
    write_json(storage.root / "sweep.json", {})
    shared = Shared(folder=storage.root, trials=trials, storage=storage, pool=None, progress_actor=None, train_gpus=0.0)
    process_of = tune.with_parameters(GovernedTrial, shared=shared, schedule=schedule, verdicts=verdicts)
    for key in trials:
        trial = Trial("trial", config={"trial": key}, stub=True)
        process = process_of(config=trial.config)
        for _ in schedule.recorded[key]:
            scheduler.on_trial_result(None, trial, process.train())
        if key in schedule.settled:
            end = process.train()
            scheduler.on_trial_complete(None, trial, end if is_resumed else end | {TIME: schedule.whole_time})
    ray.kill(verdicts)
    return {key: stop.rung for key, stop in SearchRecord.read(storage.root).stops.items()}


@pytest.mark.parametrize(("last", "stopped_at"), [(0.55, None), (0.45, 2)])
def test_a_resumed_median_rule_decides_as_one_that_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, stopped_at: int | None
) -> None:
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path))
    sweep = sweep_of(folder, [4, 6, 8, 10], scheduler={"kind": "median", "rungs": 3, "reduction": 3}, **{"trial.train.max_steps": 27})
    assert sweep.scheduler is not None
    for is_resumed in (False, True):
        storage = Storage.open(tmp_path / f"resumed_{is_resumed}")
        trials = trials_of(sweep, storage)
        *finished, judged = trials
        rungs = [
            Rung(trial=key, rung=number, step=3**number, proxy_score=score, num_cells=16, seconds=1.0, prefilled_tokens=100)
            for key in trials
            for number, score in enumerate((0.3, 0.4, last) if key == judged else SCORES)
        ]
        schedule = Schedule.resume(
            sweep.scheduler, SearchRecord(rungs=tuple(rungs)), trials=trials, finished=finished, context_tokens=(LENGTH,)
        )
        assert replayed(storage, schedule, trials, is_resumed=is_resumed) == ({} if stopped_at is None else {judged: stopped_at})


def test_several_at_a_time_are_judged_too(folder: Path, tmp_path: Path) -> None:
    judged = judge(sweep_of(folder, [12, 2, 14, 3], scheduler=ASHA), tmp_path, at_a_time=3)
    assert judged.finished | set(judged.stopped) == {12, 2, 14, 3}
    assert not judged.finished & set(judged.stopped)
    assert 14 in judged.finished


def test_a_trial_that_is_finished_stays_finished_whatever_a_scheduler_thinks_of_it_now(folder: Path, tmp_path: Path) -> None:
    assert judge(sweep_of(folder, [2, 12], scheduler=ASHA), tmp_path, at_most=1).finished == {2}
    (tmp_path / "sweeps" / "judged" / "search.jsonl").unlink()
    judged = judge(sweep_of(folder, [12, 2], scheduler=ASHA), tmp_path)
    assert judged.finished == {2, 12}
    assert judged.stopped == {}
    assert (2, 0) not in judged.seen


def test_workers_of_a_training_that_is_given_up_hold_nothing_any_more(folder: Path, tmp_path: Path) -> None:
    before = num_groups()
    workers = {"trial.resources.train_workers": 1}
    judged = judge(sweep_of(folder, [12, 2], scheduler={**ASHA, "rungs": 1}, **workers), tmp_path, held={2: 5})
    assert not judged.failures
    assert (judged.stopped, judged.finished) == ({2: 0}, {12})
    assert [event["groups"] - before for event in happened(tmp_path, "begins")] == [2, 2], "a trial and its own workers, nobody else's"
    wait_until(lambda: num_groups() == before)
