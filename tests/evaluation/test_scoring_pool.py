"""The pool answers each cell once, also when actors, callers or nodes die; it shares actors fairly and frees their resources."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import ClusterError, ModelError, ScoringPoolError, StoppedError, StorageError
from pause_ray.evaluation.answer import Provenance
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.scoring_actor import LocalScorer, ScoringJob
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.evaluation.suite import Cell, cells
from pause_ray.inference.engine import Completion, EngineError, HfEngineSpec, PromptStep
from pause_ray.inference.scripted import ScriptedEngine
from tests.evaluation.tiny import STOCK, base, make_suite

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@dataclass(kw_only=True)
class MortalEngine(ScriptedEngine):
    """Ends its own process once, at a prompt of this length: what a lost node looks like from outside."""

    dies_at_tokens: int
    tombstone: Path | None
    """Made just before dying; if it exists, the engine lives on. None: it dies every time."""

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, step in enumerate(steps):
            if len(step.prompt.ids) == self.dies_at_tokens and not (self.tombstone and self.tombstone.exists()):
                if self.tombstone:
                    self.tombstone.touch()
                os._exit(1)
            [(_, outcome)] = super().answer([step])
            yield place, outcome


@dataclass(kw_only=True)
class BrokenEngine(ScriptedEngine):
    """Cannot be made in another process."""

    because: Exception

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise state["because"]


@dataclass(kw_only=True)
class SlowEngine(ScriptedEngine):
    """Takes its time for each answer, as a model does."""

    cell_seconds: float = 0.2

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, outcome in super().answer(steps):
            time.sleep(self.cell_seconds)
            yield place, outcome


@contextmanager
def running(engine: ScriptedEngine, *, num_actors: int | tuple[int, int] = 2, cpus: float = 0.5, **more: Any) -> Iterator[ScoringPool]:
    started = ScoringPool.start(num_actors=num_actors, cpus=cpus, threads=1, engine=engine, **more)
    try:
        yield started
    finally:
        started.stop()


def within(seconds: float, happened: Callable[[], bool]) -> None:
    """Wait until ``happened``, at most so long."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def job_of(tokenizer_dir: Path, essays_dir: Path, **changes: Any) -> tuple[ScoringJob, list[Cell]]:
    suite = make_suite(essays_dir, **{"context_tokens": [512, 700, 900]} | changes)
    job = ScoringJob(
        suite=suite,
        policy=None,
        replicate=0,
        seed=0,
        data_seed=0,
        engine=HfEngineSpec(),
        loaded=base(tokenizer_dir),
        provenance=Provenance(arm="baseline", model="tiny", adapter=None, pauses="none"),
        cache=tokenizer_dir,
    )
    return job, cells(suite, identity="i", replicate=0, seed=0)


FACTS = {STOCK.question: STOCK.needle}


def test_a_lost_actors_cells_are_asked_again_and_the_ledger_has_each_once(tokenizer_dir: Path, essays_dir: Path, tmp_path: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    ledgers = {}
    for name, tombstone in (("undisturbed", tokenizer_dir), ("disturbed", tmp_path / "died")):
        ledgers[name] = Ledger(tmp_path / f"{name}.jsonl")
        with running(MortalEngine(facts=FACTS, dies_at_tokens=700, tombstone=tombstone)) as started:
            started.score(job, asked, on_result=ledgers[name].append)
    assert (tmp_path / "died").exists()
    rows = {name: sorted((row.cell_id, row.score, row.response) for row in ledger.rows()) for name, ledger in ledgers.items()}
    assert [cell_id for cell_id, _, _ in rows["disturbed"]] == sorted(cell.id for cell in asked)
    assert rows["disturbed"] == rows["undisturbed"]


def test_a_killed_actor_is_replaced(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    results: list[CellResult] = []
    killed: list[int] = []
    with running(SlowEngine(facts=FACTS), num_actors=1) as started:

        def note(result: CellResult) -> None:
            results.append(result)
            if len(results) == 2:
                killed.extend(started.state().pids)
                os.kill(killed[0], signal.SIGKILL)

        started.score(job, asked, on_result=note)
        assert set(started.state().pids).isdisjoint(killed)
        started.score(job, asked[:2], on_result=results.append)
    assert sorted(result.cell_id for result in results) == sorted(cell.id for cell in [*asked, *asked[:2]])


def test_the_pool_and_one_process_give_the_same_results(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    engine = ScriptedEngine(facts=FACTS, fails_from_tokens=900)
    there: list[CellResult] = []
    here: list[CellResult] = []
    with running(engine, num_actors=1) as started:
        started.score(job, asked, on_result=there.append)
    LocalScorer(engine, threads=1).score(job, asked, on_result=here.append)
    untimed = {"seconds": 0.0, "prefilled_tokens": 0}
    assert len(here) == len(asked)
    assert [dataclasses.replace(row, **untimed) for row in here] == [dataclasses.replace(row, **untimed) for row in there]


@dataclass(kw_only=True)
class OtherEngine(ScriptedEngine):
    """Computes in other shapes too, where it does not fail."""

    dies: bool = False

    def answer_with_other_shapes(self, step: PromptStep) -> Completion:
        if self.dies:
            os._exit(1)
        [(_, outcome)] = self.answer([step])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome


def test_cells_are_rechecked_and_counted_by_purpose(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    check = dataclasses.replace(job, purpose="numerics_check")
    results: list[CellResult] = []
    with running(OtherEngine(facts=FACTS, fails_from_tokens=900)) as started:
        started.score(check, asked, on_result=results.append)
        started.score(job, asked[:2], on_result=lambda _: None)
        assert {purpose: stats.cells for purpose, stats in started.state().stats.items()} == {"numerics_check": len(asked), "grid": 2}
    assert sorted(result.cell_id for result in results) == sorted(cell.id for cell in asked)
    assert {result.context_tokens for result in results if result.score is None} == {900}
    with (
        running(OtherEngine(facts=FACTS, dies=True), num_actors=1) as started,
        pytest.raises(ScoringPoolError, match="3 scoring actors were lost"),
    ):
        started.score(check, asked, on_result=results.append)


def test_a_cell_that_kills_every_actor_stops_the_scoring_with_its_name(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(MortalEngine(facts=FACTS, dies_at_tokens=700, tombstone=None), num_actors=1) as started:
        # The answer before, of 512 tokens, is lost with its process where that had no time to send it.
        with pytest.raises(ScoringPoolError, match=r"3 scoring actors were lost at or soon after the cell of (700|512) tokens at depth"):
            started.score(job, asked, on_result=lambda _: None)


@pytest.mark.parametrize(
    ("because", "raised", "told"),
    [
        (RuntimeError("this engine cannot be made here"), ScoringPoolError, "no scoring actor starts: .*this engine cannot be made here"),
        pytest.param(
            ModuleNotFoundError("No module named 'torch.nn'"),
            ClusterError,
            "^a node of the cluster has no torch: use one image",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_actors_that_cannot_start_stop_the_scoring_with_the_reason(
    tokenizer_dir: Path, essays_dir: Path, because: Exception, raised: type[Exception], told: str
) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(BrokenEngine(facts=FACTS, because=because)) as started, pytest.raises(raised, match=told):
        started.score(job, asked, on_result=lambda _: None)


def test_a_users_mistake_in_an_actor_arrives_as_itself_and_the_pool_goes_on(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    short = [cell for cell in asked if cell.context_tokens < 800]
    results: list[CellResult] = []
    with running(ScriptedEngine(facts=FACTS, limit_tokens=800)) as started:
        with pytest.raises(ModelError, match="limit is 800") as caught:
            started.score(job, asked, on_result=lambda _: None)
        assert type(caught.value) is ModelError
        started.score(job, short, on_result=results.append)
    assert {result.cell_id for result in results} == {cell.id for cell in short}


def test_a_bug_in_an_actor_arrives_with_its_traceback(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(ScriptedEngine(facts=FACTS), num_actors=1) as started:
        with pytest.raises(TypeError, match="cannot compute an answer in other shapes") as caught:
            started.score(dataclasses.replace(job, purpose="numerics_check"), asked, on_result=lambda _: None)
        assert "ray::ScoringActor.answer" in str(caught.value), "the actor's traceback"
        started.score(job, asked[:1], on_result=lambda _: None)


def test_an_error_of_the_receiver_stops_the_scoring_and_costs_no_actor(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)

    def full(result: CellResult) -> None:
        raise StorageError("the disk is full")

    with running(SlowEngine(facts=FACTS), num_actors=1) as started:
        with pytest.raises(StorageError, match="the disk is full"):
            started.score(job, asked, on_result=full)
        within(60, lambda: started.state().requests == 0)
        before = started.state().pids
        started.score(job, asked[:1], on_result=lambda _: None)
        assert started.state().pids == before


@pytest.fixture(scope="module")
def caller(ray_cluster: None) -> type:
    """A trial's process: an actor that scores, and says which cells it got."""
    import ray

    class Caller:
        def score(self, started: ScoringPool, job: ScoringJob, asked: list[Cell]) -> list[str]:
            results: list[CellResult] = []
            started.score(job, asked, on_result=results.append)
            return [result.cell_id for result in results]

    actor: type = ray.remote(num_cpus=0)(Caller)
    return actor


def test_several_callers_that_hold_nothing_share_the_same_actors(tokenizer_dir: Path, essays_dir: Path, caller: Any) -> None:
    import ray

    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(ScriptedEngine(facts=FACTS)) as started:
        trials = [caller.remote() for _ in range(4)]
        within(120, lambda: len(started.state().pids) == 2)
        before = started.state().pids
        for got in ray.get([trial.score.remote(started, job, asked) for trial in trials]):
            assert sorted(got) == sorted(cell.id for cell in asked)
        assert started.state().pids == before


def test_a_trial_that_comes_later_does_not_wait_for_the_whole_of_another(tokenizer_dir: Path, essays_dir: Path, caller: Any) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir, depth_percent={"from": 0, "to": 100, "count": 10})
    order: list[str] = []
    with running(SlowEngine(facts=FACTS, cell_seconds=0.5)) as started:
        within(120, lambda: len(started.state().pids) == 2)
        first = threading.Thread(target=started.score, args=(job, asked), kwargs={"on_result": lambda _: order.append("first")})
        first.start()
        within(120, lambda: len(order) >= 2)
        waited: list[bool] = []
        started.score(job, asked[:3], on_result=lambda _: order.append("second"), on_wait=waited.append)
        first.join(timeout=240)
    assert waited[:2] == [True, False], "it is told that it waits, and when that is over"
    assert order.count("first") == len(asked) == 30
    assert order.index("second") < 25
    assert len(order) - 1 - order[::-1].index("second") < 30, "all of the second before the end of the first"


def test_the_cells_of_a_caller_whose_process_dies_are_asked_no_further(tokenizer_dir: Path, essays_dir: Path, caller: Any) -> None:
    import ray

    job, asked = job_of(tokenizer_dir, essays_dir, depth_percent={"from": 0, "to": 100, "count": 10})
    with running(SlowEngine(facts=FACTS, cell_seconds=1.0), num_actors=1) as started:
        within(120, lambda: len(started.state().pids) == 1)
        before = started.state().pids
        dying = caller.remote()
        dying.score.remote(started, job, asked)
        within(120, lambda: started.state().requests == 1)
        ray.kill(dying)
        within(60, lambda: started.state().requests == 0)
        began = time.monotonic()
        started.score(job, asked[:1], on_result=lambda _: None)
        assert time.monotonic() - began < 20, "thirty cells take thirty seconds"
        assert started.state().pids == before


def test_scoring_can_be_asked_to_end_after_the_running_cells(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir, depth_percent={"from": 0, "to": 100, "count": 10})
    results: list[CellResult] = []

    def note(result: CellResult) -> None:
        results.append(result)
        if len(results) == 2:
            started.finish()

    with running(SlowEngine(facts=FACTS, cell_seconds=0.5)) as started:
        with pytest.raises(StoppedError, match="the same command goes on"):
            started.score(job, asked, on_result=note)
        assert 2 <= len(results) < 20
        with pytest.raises(StoppedError):
            started.score(job, asked, on_result=note)


def test_actors_come_with_the_work_and_go_when_there_is_none(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir, depth_percent={"from": 0, "to": 100, "count": 10})
    most: list[int] = []
    with running(SlowEngine(facts=FACTS, cell_seconds=1.0), num_actors=(0, 2), idle_seconds=0.5) as started:
        assert started.state().pids == ()
        started.score(job, asked, on_result=lambda _: most.append(len(started.state().pids)))
        assert max(most) == 2
        within(60, lambda: not started.state().pids)
        results: list[CellResult] = []
        started.score(job, asked[:1], on_result=results.append)
        assert len(results) == 1


def test_an_idle_actor_gives_its_place_at_once_to_a_group_that_waits_for_it(tokenizer_dir: Path, essays_dir: Path) -> None:
    import ray

    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(ScriptedEngine(facts=FACTS), num_actors=(0, 1), cpus=5, idle_seconds=600) as started:
        started.score(job, asked[:1], on_result=lambda _: None)
        assert len(started.state().pids) == 1
        group = ray.util.placement_group([{"CPU": 5}])
        try:
            assert group.wait(120)
            assert not started.state().pids
        finally:
            ray.util.remove_placement_group(group)
        results: list[CellResult] = []
        started.score(job, asked, on_result=results.append)
        assert len(results) == len(asked)


@pytest.mark.slow
def test_scoring_goes_on_when_a_node_is_lost(tokenizer_dir: Path, essays_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.evaluation.lost_node", str(tokenizer_dir), str(essays_dir), str(tmp_path / "told.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert (tmp_path / "told.json").exists(), done.stdout + done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["up_before"], told["on_the_lost_node"]) == (2, 1)
    assert (told["up_after"], told["without_room"]) == (1, 1), "its place was there"
    assert sorted(told["answered"]) == sorted(told["asked"])
