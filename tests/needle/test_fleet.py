"""The fleet answers each cell once, also when actors die, and hands errors on as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pause_ray.engines.engine import Completion, EngineError, HfEngineSpec, Step
from pause_ray.engines.scripted import ScriptedEngine
from pause_ray.errors import FleetError, ModelError, StorageError
from pause_ray.needle.answer import Condition
from pause_ray.needle.ledger import CellResult, Ledger
from pause_ray.needle.task import Cell, cells
from tests.needle.tiny import STOCK, base, make_suite

fleet = pytest.importorskip("pause_ray.needle.fleet")
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@dataclass(kw_only=True)
class MortalEngine(ScriptedEngine):
    """Ends its own process once, at a prompt of this length: what a lost node looks like from outside."""

    dies_at_tokens: int
    tombstone: Path | None
    """Made just before dying; if it exists, the engine lives on. None: it dies every time."""

    def answer(self, steps: Sequence[Step]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, step in enumerate(steps):
            if len(step.prompt.ids) == self.dies_at_tokens and not (self.tombstone and self.tombstone.exists()):
                if self.tombstone:
                    self.tombstone.touch()
                os._exit(1)
            [(_, outcome)] = super().answer([step])
            yield place, outcome


class BrokenEngine(ScriptedEngine):
    """Cannot be made in another process, like an engine whose library is missing there."""

    def __setstate__(self, state: object) -> None:
        raise RuntimeError("this engine cannot be made here")


@contextmanager
def running(engine: ScriptedEngine, *, num_actors: int = 2) -> Iterator[fleet.Fleet]:
    started = fleet.Fleet.start(num_actors=num_actors, cpus=0.5, threads=1, engine=engine)
    try:
        yield started
    finally:
        started.stop()


def job_of(tokenizer_dir: Path, essays_dir: Path) -> tuple[fleet.ScoringJob, list[Cell]]:
    suite = make_suite(essays_dir, context_tokens=[512, 700, 900])
    job = fleet.ScoringJob(
        suite=suite,
        policy=None,
        replicate=0,
        seed=0,
        data_seed=0,
        engine=HfEngineSpec(),
        loaded=base(tokenizer_dir),
        condition=Condition(arm="baseline", model="tiny", adapter=None, pauses="none"),
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


def test_an_actor_killed_from_outside_is_started_again(tokenizer_dir: Path, essays_dir: Path) -> None:
    import ray

    job, asked = job_of(tokenizer_dir, essays_dir)
    results: list[CellResult] = []
    with running(ScriptedEngine(facts=FACTS), num_actors=1) as started:

        def note(result: CellResult) -> None:
            results.append(result)
            if len(results) == 2:
                ray.kill(started.actors[0], no_restart=False)

        started.score(job, asked, on_result=note)
        started.score(job, asked[:2], on_result=results.append)
    assert sorted(result.cell_id for result in results) == sorted(cell.id for cell in [*asked, *asked[:2]])


@dataclass(kw_only=True)
class OtherEngine(ScriptedEngine):
    """Computes in other shapes too, where it does not fail."""

    dies: bool = False

    def answer_otherwise(self, step: Step) -> Completion:
        if self.dies:
            os._exit(1)
        [(_, outcome)] = self.answer([step])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome


def test_cells_are_asked_otherwise_also_while_the_actor_restarts(tokenizer_dir: Path, essays_dir: Path) -> None:
    import ray

    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(OtherEngine(facts=FACTS, fails_from_tokens=900), num_actors=1) as started:
        ray.kill(started.actors[0], no_restart=False)
        results = started.answer_otherwise(job, asked)
    assert [result.cell_id for result in results] == [cell.id for cell in asked]
    assert {cell.context_tokens for cell, result in zip(asked, results, strict=True) if result.score is None} == {900}
    with running(OtherEngine(facts=FACTS, dies=True), num_actors=1) as started, pytest.raises(FleetError, match="asked again"):
        started.answer_otherwise(job, asked)


def test_a_cell_that_kills_every_actor_stops_the_scoring_with_its_name(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(MortalEngine(facts=FACTS, dies_at_tokens=700, tombstone=None), num_actors=1) as started:
        with pytest.raises(FleetError, match="3 scoring actors were lost at or soon after the cell of 700 tokens at depth"):
            started.score(job, asked, on_result=lambda _: None)


def test_actors_that_cannot_start_stop_the_scoring_with_the_reason(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    with running(BrokenEngine(facts=FACTS)) as started, pytest.raises(FleetError, match="this engine cannot be made here"):
        started.score(job, asked, on_result=lambda _: None)


def test_a_users_mistake_in_an_actor_arrives_as_itself_and_the_fleet_goes_on(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)
    short = [cell for cell in asked if cell.context_tokens < 800]
    results: list[CellResult] = []
    with running(ScriptedEngine(facts=FACTS, limit_tokens=800)) as started:
        with pytest.raises(ModelError, match="limit is 800") as caught:
            started.score(job, asked, on_result=lambda _: None)
        assert type(caught.value) is ModelError
        started.score(job, short, on_result=results.append)
    assert {result.cell_id for result in results} == {cell.id for cell in short}


def test_an_error_of_the_receiver_stops_the_scoring(tokenizer_dir: Path, essays_dir: Path) -> None:
    job, asked = job_of(tokenizer_dir, essays_dir)

    def full(result: CellResult) -> None:
        raise StorageError("the disk is full")

    with running(ScriptedEngine(facts=FACTS)) as started, pytest.raises(StorageError, match="the disk is full"):
        started.score(job, asked, on_result=full)


def test_a_fleet_can_be_used_from_another_process_that_has_no_room_of_its_own(tokenizer_dir: Path, essays_dir: Path) -> None:
    import ray

    job, asked = job_of(tokenizer_dir, essays_dir)

    @ray.remote(num_cpus=0)
    def trial(started: fleet.Fleet) -> list[str]:
        results: list[CellResult] = []
        started.score(job, asked, on_result=results.append)
        return [result.cell_id for result in results]

    with running(ScriptedEngine(facts=FACTS), num_actors=1) as started:
        assert sorted(ray.get(trial.remote(started))) == sorted(cell.id for cell in asked)
