"""Trials under a scheduler without a neural network: trainings only write their files, an engine answers by the adapter's rank.

Ray, Tune and its schedulers, the fleet, the board, locks, checkpoints and logs are real. What trainings and engines do is written
into one trace, so that tests can say what happened while what else went on.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from pause_ray.core.errors import SpecError, StoppedError
from pause_ray.core.spec import JsonObject, read_yaml, with_overrides
from pause_ray.core.storage import Storage, is_complete, read_json_lines, write_json
from pause_ray.evaluation.ledger import Ledger
from pause_ray.evaluation.proxy import proxy_suite
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.engine import Completion, EngineError, LoadedAs, PromptStep
from pause_ray.inference.scripted import ScriptedEngine
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STOP, TRAINING_LOG, Checkpoint, rung_folder, seal
from pause_ray.sweep.governed import run_governed
from pause_ray.sweep.reporter import start_progress_actor
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.rungs import governed
from pause_ray.sweep.search import SweepTrial
from pause_ray.sweep.search_log import SearchLog, SearchRecord
from pause_ray.sweep.spec import SweepSpec, expand
from pause_ray.sweep.trainable import Shared
from pause_ray.trial.prepare import prepare
from tests.sweep.stubs import write_stub_sweep

FAILING_RANK = 13
LENGTH = 2048


def trace(root: Path, **facts: Any) -> None:
    """Add to what happened."""
    with (root / "trace.jsonl").open("a") as file:
        file.write(json.dumps({"at": time.time(), **facts}) + "\n")


def happened(root: Path, what: str) -> list[JsonObject]:
    """What happened of one kind, in its order."""
    return [event for event in read_json_lines(root / "trace.jsonl") if event["what"] == what]


def quality(rank: int) -> float:
    """Share of its facts that the adapter of a rank answers: the more rank the more."""
    return min(1.0, rank / 16)


@dataclass(kw_only=True)
class RankEngine(ScriptedEngine):
    """Is blind at the beginning of a prompt, the more the lower the adapter's rank is."""

    root: Path
    waits_for: tuple[int, int] | None = None
    """While asked of the adapter of this rank after so many steps: until its training has gone further."""
    _adapter: tuple[int, int] = field(default=(0, 0), init=False)

    def use(self, wanted: LoadedAs) -> None:
        super().use(wanted)
        assert wanted.adapter_dir is not None
        adapter = Checkpoint.open(wanted.adapter_dir)
        rank = json.loads((adapter.folder / ADAPTER_CONFIG).read_text())["r"]
        self._adapter = (rank, adapter.num_steps)
        self.blind_percent = (0.0, 100 * (1 - quality(rank)))

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        rank, after = self._adapter
        trace(self.root, what="scoring", rank=rank, after=after, cells=len(steps))
        if self._adapter == self.waits_for:
            wait_until(lambda: any(event["rank"] == rank and event["step"] > after + 1 for event in happened(self.root, "step")))
        for number, answer in enumerate(super().answer(steps), start=1):
            if number == len(steps):  # not after it: who has all answers ends the run, wherever it is then
                trace(self.root, what="scored", rank=rank, after=after)
            yield answer


def wait_until(condition: Callable[[], bool], *, seconds: float = 240) -> None:
    """Fails if it never comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for never happened")
        time.sleep(0.02)


def train_by_rule(settings: Any, *, root: Path, held: Mapping[int, int]) -> None:
    """What a worker does: one row of the log per step, rungs and checkpoints when they are due, an adapter at the end."""
    rank = settings.train.lora.rank
    if rank == FAILING_RANK:
        raise SpecError(f"train.lora.rank {rank}: no such rank; choose another")
    saved, stop = settings.running.latest(), settings.folder / STOP
    rows = saved.log_rows() if saved else []
    rungs = settings.rungs.steps if settings.rungs else ()
    log = settings.folder / TRAINING_LOG
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace(root, what="begins", rank=rank, done=len(rows), groups=num_groups())
    for step in range(len(rows) + 1, settings.train.max_steps + 1):
        rows.append({"step": step, "loss": 2.0 / step, "learning_rate": 0.001, "tokens": 100, "seconds": 0.1})
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        trace(root, what="step", rank=rank, step=step)
        if step in rungs and not is_complete(rung_folder(settings.running.folder, step=step)):
            leave_rung(settings, rank=rank, step=step)
        if held.get(rank) == step and saved is None:
            wait_until(stop.exists)
        if stop.exists() and step < settings.train.max_steps:
            settings.running.save(step, write_tensors=lambda path: path.write_bytes(b""), log_rows=rows, facts={}, keep_last=1)
            trace(root, what="stops", rank=rank, step=step, line=logged("stops"))
            raise StoppedError(f"stopped after step {step}")
    write_files(settings.folder, rank=rank)
    trace(root, what="ends", rank=rank)


def logged(words: str) -> str:
    """The line that this process writes of them."""
    log = logging.getLogger("pause_ray")
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, words, (), None)
    log.filter(record)
    return record.getMessage()


def num_groups() -> int:
    """Placement groups that hold something."""
    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


def leave_rung(settings: Any, *, rank: int, step: int) -> None:
    """The adapter as it is after ``step`` steps."""
    folder = rung_folder(settings.running.folder, step=step)
    scratch = folder.with_name("making")
    scratch.mkdir(parents=True, exist_ok=True)
    write_files(scratch, rank=rank)
    (scratch / "tokenizer.json").write_bytes((settings.model_dir / "tokenizer.json").read_bytes())
    (scratch / TRAINING_LOG).write_text((settings.folder / TRAINING_LOG).read_text())
    rungs = settings.rungs
    seal(
        scratch,
        base_digest=rungs.base_digest,
        tokenizer_digest=rungs.tokenizer_digest,
        marker=None,
        spec=rungs.spec,
        document_digests=frozenset(),
    )
    scratch.rename(folder)


def write_files(folder: Path, *, rank: int) -> None:
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"r": rank}))
    (folder / ADAPTER_WEIGHTS).write_bytes(b"")


@dataclass(frozen=True)
class Stubbed(Mapping[str, SweepTrial]):
    """Trials; a process that gets them trains by rule from then on."""

    trials: Mapping[str, SweepTrial]
    root: Path
    held: Mapping[int, int]

    def __reduce__(self) -> Any:
        return _unpacked, (dict(self.trials), self.root, self.held)

    def __getitem__(self, key: str) -> SweepTrial:
        return self.trials[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.trials)

    def __len__(self) -> int:
        return len(self.trials)


def _unpacked(trials: Mapping[str, SweepTrial], root: Path, held: Mapping[int, int]) -> Stubbed:
    from pause_ray.training import launch

    def by_rule(config: dict[str, Any]) -> None:
        train_by_rule(config["worker"], root=root, held=held)

    run_workers = launch.run_workers

    def run(train: Any, config: dict[str, Any], **placement: Any) -> None:
        if placement["num_workers"]:
            run_workers(by_rule, config, **placement)  # Ray Train's own worker group, with nothing to compute
        else:
            by_rule(config)

    if not hasattr(launch, "is_stubbed"):
        launch.run_workers = run
        launch.is_stubbed = True  # type: ignore[attr-defined]
    return Stubbed(trials, root, held)


def sweep_of(folder: Path, ranks: Sequence[int], *, scheduler: JsonObject, **changes: Any) -> SweepSpec:
    """A sweep over LoRA ranks in this order, judged by a scheduler."""
    data = read_yaml(write_stub_sweep(folder))
    wanted = {
        "search": {"train.lora.rank": {"grid": list(ranks)}},
        "arms": {},
        "scheduler": {"proxy": {"facts": 16, "context_tokens": [LENGTH]}, **scheduler},
        "trial.train.max_steps": 8,
        "trial.train.warmup_steps": 0,
    }
    return SweepSpec.parse(with_overrides(data, wanted | changes), origin="test")


@dataclass(frozen=True)
class Judged:
    """What became of a sweep."""

    root: Path
    folder: Path
    ranks: Mapping[str, int]
    """Trial → LoRA rank."""
    failures: Mapping[int, str]
    """Rank → why it failed."""

    @property
    def record(self) -> SearchRecord:
        return SearchRecord.read(self.folder)

    @property
    def stopped(self) -> dict[int, int]:
        """Rank → the rung after which it was given up."""
        return {self.ranks[key]: stop.rung for key, stop in self.record.stops.items()}

    @property
    def finished(self) -> set[int]:
        """Ranks whose cells are all scored."""
        return {rank for key, rank in self.ranks.items() if is_complete(self.root / "trials" / key)}

    @property
    def seen(self) -> list[tuple[int, int]]:
        """(rank, rung) in the order in which they were scored."""
        return [(self.ranks[rung.trial], rung.rung) for rung in self.record.rungs]

    def num_cells(self, rank: int) -> int:
        """Rows in a trial's ledger."""
        [key] = [key for key, its in self.ranks.items() if its == rank]
        return len(Ledger(self.root / "trials" / key / "cells.jsonl").rows())


def questions_of(suite: SuiteSpec) -> dict[str, str]:
    """Question → what of its fact answers it."""
    return {cell.question: cell.references[0] for cell in cells(suite, identity="", replicate=0, seed=0)}


def trials_of(sweep: SweepSpec, storage: Storage) -> dict[str, SweepTrial]:
    """All of a sweep, by digest."""
    return {
        prepared.digest: SweepTrial(planned, prepared)
        for planned in expand(sweep)
        for prepared in [prepare(planned.spec, cache=storage.cache)]
    }


def judge(
    sweep: SweepSpec,
    root: Path,
    *,
    held: Mapping[int, int] | None = None,
    waits_for: tuple[int, int] | None = None,
    at_most: int = 1000,
    at_a_time: int = 1,
    ends_after: int | None = None,
) -> Judged:
    """Run what is missing of a sweep's judged trials.

    Args:
        sweep: Has a scheduler.
        root: Of storage.
        held: Rank → step after which its training, as long as it has no checkpoint, waits until it is asked to end.
        waits_for: Scoring the adapter of this rank after so many steps waits until its training has gone further.
        at_most: So many trials begin.
        at_a_time: So many side by side.
        ends_after: The sweep is asked to end when so many adapters have been scored.
    """
    storage = Storage.open(root)
    trials = trials_of(sweep, storage)
    suite = next(iter(trials.values())).prepared.spec.eval
    facts = questions_of(suite) | questions_of(proxy_suite(suite, facts=16, context_tokens=(LENGTH,)))
    folder = storage.sweeps / "judged"
    write_json(folder / "sweep.json", {})
    judged = {key: trials[key] for key in governed(sweep, trials)}
    fleet = ScoringPool.start(num_actors=(0, 1), cpus=0.5, threads=1, engine=RankEngine(facts=facts, root=root, waits_for=waits_for))
    board = start_progress_actor()
    shared = Shared(
        folder=folder, trials=Stubbed(trials, root, held or {}), storage=storage, pool=fleet, progress_actor=board, train_gpus=0.0
    )
    if ends_after is not None:
        threading.Thread(target=end_later, args=(board, root, ends_after), daemon=True).start()
    stops = SearchRecord.read(folder).stops
    missing = iter([key for key in judged if key not in stops and not is_complete(storage.trials / key)][:at_most])
    try:
        run_governed(
            sweep,
            shared,
            trials=judged,
            placement=Placement(
                resources=suite_resources(trials), train_gpus=0.0, scoring_gpus=0.0, trains=True, concurrent_trials=at_a_time
            ),
            log=SearchLog(folder),
            next_trial=lambda: next(missing, None),
            ended=lambda key, lost: None,
            after_trial=lambda: None,
        )
        failed = ray.get(board.drain.remote()).failures
    finally:
        fleet.stop()
        ray.kill(board)
    ranks = {key: trial.planned.point["train.lora.rank"] for key, trial in trials.items()}
    return Judged(root, folder, ranks, {ranks[key]: failure.message for key, failure in failed.items()})


def end_later(board: Any, root: Path, scored: int) -> None:
    """Ask trials to end, as a first Ctrl-C does."""
    wait_until(lambda: len(happened(root, "scored")) >= scored)
    ray.get(board.end.remote())


def suite_resources(trials: Mapping[str, SweepTrial]) -> Any:
    return next(iter(trials.values())).prepared.spec.resources
