"""Ray actors that answer cells: each holds the base model once and swaps adapters. Knows Ray, no storage and no MLflow.

Each actor gets one run of neighbouring cells, so that prefixes are reused, and streams its answers back one by one.
The cells that a lost actor still owed go to the next free one; Ray starts the lost one again.
"""

from __future__ import annotations

import collections
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from pause_ray.engines.engine import Engine, EngineSpec, HfEngineSpec, LoadedAs
from pause_ray.errors import FleetError, UserError
from pause_ray.needle.answer import Condition, OtherwiseEngine, Reader, answer_cells, answer_otherwise, planned
from pause_ray.needle.haystack import Haystack, load_haystack, prompt_builder
from pause_ray.needle.ledger import CellResult
from pause_ray.needle.task import Cell, SuiteSpec
from pause_ray.needle.walk import split_for_actors
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokens import ModelTokenizer, resolve_marker

log = logging.getLogger("pause_ray")

MOST_LOSSES_PER_CELL = 3
"""A cell during which an actor was lost this often is taken to be the reason, and scoring stops."""


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """All that an actor needs to answer cells of one trial."""

    suite: SuiteSpec
    policy: PausePolicy | None
    replicate: int
    seed: int
    """With ``replicate``, of the haystack's order."""
    data_seed: int
    """Of a random placement of pauses."""
    engine: EngineSpec
    loaded: LoadedAs
    condition: Condition
    cache: Path


class _Scorer:
    """The actor."""

    def __init__(self, engine: Engine | None, *, threads: int) -> None:
        self._given = engine
        self._threads = threads
        self._made: tuple[EngineSpec, Engine] | None = None
        self._haystack: tuple[object, Haystack] | None = None

    def ready(self) -> None:
        """Returns as soon as the actor is up."""

    def answer(self, job: ScoringJob, cells: list[Cell]) -> Iterator[list[Cell] | CellResult]:
        """First the cells in the order of their walk, then their results one by one."""
        engine, reader = self._engine_of(job.engine), self._reader_of(job)
        engine.use(job.loaded)
        local = job.engine if isinstance(job.engine, HfEngineSpec) else HfEngineSpec()
        asked = planned(cells, reader=reader, grain_tokens=engine.grain_tokens, reuse=local.reuse, drafts=local.drafts)
        yield [cell for cell, _ in asked]
        yield from answer_cells(asked, engine=engine, reader=reader, condition=job.condition)

    def answer_otherwise(self, job: ScoringJob, cells: list[Cell]) -> list[CellResult]:
        """Results of the same cells computed in other shapes."""
        engine = self._engine_of(job.engine)
        engine.use(job.loaded)
        if not isinstance(engine, OtherwiseEngine):
            raise TypeError(f"engine {engine.name} cannot compute an answer in other shapes")
        return answer_otherwise(cells, engine=engine, reader=self._reader_of(job), condition=job.condition)

    def _engine_of(self, spec: EngineSpec) -> Engine:
        """The engine of a spec; the last one is kept, since the trials of a sweep mostly share it."""
        if self._given is not None:
            return self._given
        if self._made is None or self._made[0] != spec:
            self._made = None  # frees the old weights before the new ones come
            self._made = (spec, _make_engine(spec, threads=self._threads))
        return self._made[1]

    def _reader_of(self, job: ScoringJob) -> Reader:
        tokenizer = ModelTokenizer.load(job.loaded.model_dir)
        marker = resolve_marker(tokenizer, job.policy)
        builder = prompt_builder(
            self._haystack_of(job), suite=job.suite, tokenizer=tokenizer, policy=job.policy, marker=marker, seed=job.data_seed
        )
        return Reader(builder=builder, tokenizer=tokenizer, policy=job.policy, marker=marker, max_new_tokens=job.suite.max_new_tokens)

    def _haystack_of(self, job: ScoringJob) -> Haystack:
        """The job's haystack; the last one is kept, since trials of one replicate share it."""
        key = (job.suite, job.seed, job.replicate, job.data_seed)
        if self._haystack is None or self._haystack[0] != key:
            self._haystack = (
                key,
                load_haystack(job.suite, cache=job.cache, seed=job.seed, replicate=job.replicate, data_seed=job.data_seed),
            )
        return self._haystack[1]


def _make_engine(spec: EngineSpec, *, threads: int) -> Engine:
    if not isinstance(spec, HfEngineSpec):
        from pause_ray.engines.openai_api import EndpointEngine

        return EndpointEngine(spec)
    # PEFT imports bitsandbytes, which notes on every CPU that an optional package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from pause_ray.engines.hf import HfEngine

    return HfEngine(spec, threads=threads)


@dataclass(frozen=True)
class Fleet:
    """Scoring actors. Can be handed to other processes of the same Ray cluster, such as trials."""

    actors: tuple[Any, ...]

    @classmethod
    def start(cls, *, num_actors: int, cpus: float, gpus: float = 0, threads: int | None = None, engine: Engine | None = None) -> Self:
        """Ask Ray for actors; they come up while the caller goes on. Ray must be initialised.

        Args:
            num_actors: Actors, each with its own base model.
            cpus: Logical CPUs of each.
            gpus: GPUs of each; may be a fraction.
            threads: Threads of CPU computation in each; None divides a node's cores among the actors on it.
            engine: Answers whatever a job's own engine is, a copy in every actor; None for the job's.
        """
        if threads is None:
            num_nodes = sum(node["Alive"] for node in ray.nodes())
            threads = max(1, (os.cpu_count() or 1) // math.ceil(num_actors / num_nodes))
        # DEFAULT: not inside the placement group of a Tune trial, which would wait for room in it for ever.
        scorer = ray.remote(_Scorer).options(
            num_cpus=cpus, num_gpus=gpus, scheduling_strategy="DEFAULT", max_restarts=-1, max_task_retries=0
        )
        return cls(tuple(scorer.remote(engine, threads=threads) for _ in range(num_actors)))

    def score(self, job: ScoringJob, cells: Sequence[Cell], *, on_result: Callable[[CellResult], None]) -> None:
        """Answer every cell once; ``on_result`` gets each answer as soon as it is there, in this thread.

        Raises:
            UserError: what the prompt, the model or the adapter raised in an actor, as it is.
            FleetError: the same cell cost ``MOST_LOSSES_PER_CELL`` actors, or no actor comes up again.
        """
        scoring = _Scoring(self.actors, job, cells, on_result)
        try:
            scoring.run()
        finally:
            scoring.abandon()

    def answer_otherwise(self, job: ScoringJob, cells: Sequence[Cell]) -> list[CellResult]:
        """The cells' results computed in other shapes, on one actor: where they differ, the precision decided.

        Raises:
            UserError: what the prompt, the model or the adapter raised in the actor, as it is.
            FleetError: the actor was lost ``MOST_LOSSES_PER_CELL`` times.
        """
        # Asked again if the actor is lost, or is just restarting because scoring has lost it.
        again = self.actors[0].answer_otherwise.options(max_task_retries=MOST_LOSSES_PER_CELL - 1)
        try:
            results: list[CellResult] = ray.get(again.remote(job, list(cells)))
        except RayActorError as error:
            raise FleetError(f"the scoring actor was lost while cells were asked again: {' '.join(str(error).split())}") from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        return results

    def stop(self) -> None:
        """End the actors and free what they hold."""
        for actor in self.actors:
            ray.kill(actor)


@dataclass
class _Run:
    """What one actor was asked and still owes, in the order of its walk; a few answers may come after later ones."""

    actor: int
    owed: list[Cell]


class _Scoring:
    """One call of ``Fleet.score``: which actor is at what."""

    def __init__(self, actors: Sequence[Any], job: ScoringJob, cells: Sequence[Cell], on_result: Callable[[CellResult], None]) -> None:
        self._actors = actors
        self._job = job
        self._on_result = on_result
        self._waiting = collections.deque(split_for_actors(cells, num_actors=len(actors)))
        self._idle = collections.deque(range(len(actors)))
        self._running: dict[Any, _Run] = {}
        self._restarting: dict[Any, int] = {}
        self._losses: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        """Answer all cells, or raise as ``Fleet.score`` says."""
        while self._waiting or self._running:
            while self._waiting and self._idle:
                run = _Run(self._idle.popleft(), self._waiting.popleft())
                self._running[self._actors[run.actor].answer.options(num_returns="streaming").remote(self._job, run.owed)] = run
            [event], _ = ray.wait([*self._running, *self._restarting], num_returns=1, fetch_local=False)
            if event in self._running:
                self._take_answer(event)
            else:
                self._welcome_back(event)

    def abandon(self) -> None:
        """Stop what still runs. An actor cannot be told to stop in the middle of a call, so it starts afresh."""
        for run in self._running.values():
            ray.kill(self._actors[run.actor], no_restart=False)

    def _take_answer(self, stream: Any) -> None:
        run = self._running[stream]
        try:
            result = ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            self._idle.append(run.actor)
        except RayActorError as error:
            del self._running[stream]
            self._note_loss(run, error)
        except RayTaskError as error:
            del self._running[stream]
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        else:
            if isinstance(result, list):
                run.owed = result
                return
            run.owed = [cell for cell in run.owed if cell.id != result.cell_id]
            self._on_result(result)

    def _note_loss(self, run: _Run, error: RayActorError) -> None:
        """Put the lost actor's cells back, and count the loss against the first that it owed: it was there, or a few cells further."""
        # A call to an actor that is just restarting fails at once; this one waits until it is there.
        self._restarting[self._actors[run.actor].ready.options(max_task_retries=-1).remote()] = run.actor
        if not run.owed:
            return
        cell = run.owed[0]
        self._losses[cell.id] += 1
        place = f"cell of {cell.context_tokens} tokens at depth {cell.depth_percent:g} %"
        reason = " ".join(str(error).split())
        if self._losses[cell.id] >= MOST_LOSSES_PER_CELL:
            raise FleetError(
                f"{self._losses[cell.id]} scoring actors were lost at or soon after the {place}; the last one: {reason}"
            ) from error
        log.warning("a scoring actor was lost at or soon after the %s; its %d cells are asked again (%s)", place, len(run.owed), reason)
        self._waiting.append(run.owed)

    def _welcome_back(self, ready: Any) -> None:
        actor = self._restarting.pop(ready)
        try:
            ray.get(ready)
        except RayActorError as error:
            if not self._running and not self._restarting and not self._idle:
                raise FleetError(f"no scoring actor comes up again: {' '.join(str(error).split())}") from error
            log.warning("a scoring actor is lost for good (%s)", " ".join(str(error).split()))
        else:
            self._idle.append(actor)
