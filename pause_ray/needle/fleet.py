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
from typing import Any, Literal, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from pause_ray.engines.engine import Engine, LoadedAs
from pause_ray.errors import FleetError, UserError
from pause_ray.needle.haystack import Haystack, load_haystack
from pause_ray.needle.ledger import CellResult
from pause_ray.needle.task import Cell, SuiteSpec
from pause_ray.needle.walk import Condition, answer_cells, order_for_reuse, split_for_actors
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
    loaded: LoadedAs
    condition: Condition
    cache: Path


class _Scorer:
    """The actor."""

    def __init__(self, engine: Literal["hf"] | Engine, *, threads: int) -> None:
        if engine == "hf":
            from pause_ray.engines.hf import HfEngine

            engine = HfEngine(threads=threads)
        self._engine = engine
        self._haystack: tuple[object, Haystack] | None = None

    def answer(self, job: ScoringJob, cells: list[Cell]) -> Iterator[CellResult]:
        """Results one by one, in the order of ``cells``' reuse order."""
        tokenizer = ModelTokenizer.load(job.loaded.model_dir)
        marker = resolve_marker(tokenizer, job.policy)
        haystack = self._haystack_of(job)
        self._engine.use(job.loaded)
        yield from answer_cells(
            cells,
            engine=self._engine,
            suite=job.suite,
            haystack=haystack,
            tokenizer=tokenizer,
            policy=job.policy,
            marker=marker,
            condition=job.condition,
        )

    def _haystack_of(self, job: ScoringJob) -> Haystack:
        """The job's haystack; the last one is kept, since trials of one replicate share it."""
        key = (job.suite, job.seed, job.replicate)
        if self._haystack is None or self._haystack[0] != key:
            self._haystack = (key, load_haystack(job.suite, cache=job.cache, seed=job.seed, replicate=job.replicate))
        return self._haystack[1]


@dataclass
class _Run:
    """What one actor was asked and still owes, in the order in which it answers."""

    actor: int
    owed: list[Cell]


@dataclass(frozen=True)
class Fleet:
    """Scoring actors. Can be handed to other processes of the same Ray cluster, such as trials."""

    actors: tuple[Any, ...]

    @classmethod
    def start(
        cls, *, num_actors: int, cpus: float, gpus: float = 0, threads: int | None = None, engine: Literal["hf"] | Engine = "hf"
    ) -> Self:
        """Ask Ray for actors; they come up while the caller goes on. Ray must be initialised.

        Args:
            num_actors: Actors, each with its own base model.
            cpus: Logical CPUs of each.
            gpus: GPUs of each; may be a fraction.
            threads: Threads of CPU computation in each; None divides a node's cores among the actors on it.
            engine: ``hf`` for transformers, or an engine object, of which every actor gets a copy.
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
            FleetError: the same cell cost ``MOST_LOSSES_PER_CELL`` actors.
        """
        waiting = collections.deque(split_for_actors(cells, num_actors=len(self.actors)))
        idle = collections.deque(range(len(self.actors)))
        running: dict[Any, _Run] = {}
        losses: collections.Counter[str] = collections.Counter()
        try:
            while waiting or running:
                while waiting and idle:
                    run = _Run(idle.popleft(), order_for_reuse(waiting.popleft()))
                    running[self.actors[run.actor].answer.options(num_returns="streaming").remote(job, run.owed)] = run
                [stream], _ = ray.wait(list(running), num_returns=1, fetch_local=False)
                run = running[stream]
                try:
                    result = ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    idle.appendleft(run.actor)
                except RayActorError as error:
                    del running[stream]
                    idle.append(run.actor)
                    _note_loss(run, losses, error)
                    if run.owed:
                        waiting.append(run.owed)
                except RayTaskError as error:
                    del running[stream]
                    if isinstance(error.cause, UserError):
                        raise error.cause from error
                    raise
                else:
                    run.owed = [cell for cell in run.owed if cell.id != result.cell_id]
                    on_result(result)
        finally:
            # An actor answers one call at a time and cannot be told to stop, so after an error it starts afresh.
            for run in running.values():
                ray.kill(self.actors[run.actor], no_restart=False)

    def stop(self) -> None:
        """End the actors and free what they hold."""
        for actor in self.actors:
            ray.kill(actor)


def _note_loss(run: _Run, losses: collections.Counter[str], error: RayActorError) -> None:
    """Count a lost actor against the cell that it was at.

    Raises:
        FleetError: that cell has cost too many actors.
    """
    if not run.owed:
        return
    cell = run.owed[0]
    losses[cell.id] += 1
    place = f"cell of {cell.context_tokens} tokens at depth {cell.depth_percent:g} %"
    reason = " ".join(str(error).split())
    if losses[cell.id] >= MOST_LOSSES_PER_CELL:
        raise FleetError(f"{losses[cell.id]} scoring actors were lost at the {place}; the last one: {reason}") from error
    log.warning("a scoring actor was lost at the %s; its %d cells are asked again (%s)", place, len(run.owed), reason)
