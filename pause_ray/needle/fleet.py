"""Scoring actors as callers see them: cells in, results out. Knows Ray; how actors are shared is in ``broker``.

One fleet serves a whole sweep and outlives its trials. A caller holds no actor: it orders answers and takes them as they come.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.engines.engine import Engine
from pause_ray.errors import FleetError, PauseRayError
from pause_ray.needle.actor import ScoringJob
from pause_ray.needle.broker import Broker, Taken
from pause_ray.needle.ledger import CellResult
from pause_ray.needle.tally import FleetState
from pause_ray.needle.task import Cell

MOST_CALLERS = 10_000
"""Calls that may wait for answers at the same time."""


@dataclass(frozen=True)
class Fleet:
    """Scoring actors. Can be handed to other processes of the same Ray cluster, such as trials."""

    broker: Any

    @classmethod
    def start(
        cls,
        *,
        num_actors: int | tuple[int, int],
        cpus: float,
        gpus: float = 0,
        threads: int | None = None,
        idle_seconds: float = 60.0,
        engine: Engine | None = None,
    ) -> Self:
        """Ask Ray for actors; they come up while the caller goes on. Ray must be initialised.

        Args:
            num_actors: Actors, each with its own base model; or fewest and most, as many as there is work for.
            cpus: Logical CPUs of each.
            gpus: GPUs of each; may be a fraction.
            threads: Threads of CPU computation in each; None divides a node's cores among the actors on it.
            idle_seconds: An actor beyond the fewest gives its place back after so long without work; at once where a
                placement group (a trial, training workers) waits for it.
            engine: Answers whatever a job's own engine is, a copy in every actor; None for the job's.
        """
        bounds = (num_actors, num_actors) if isinstance(num_actors, int) else num_actors
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        # On the node of the sweep itself, so that it is lost with the sweep only.
        here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(Broker).options(
            num_cpus=0, scheduling_strategy=here, max_concurrency=MOST_CALLERS, max_restarts=-1, max_task_retries=-1
        )
        broker = remote.remote(
            bounds=bounds,
            idle_seconds=idle_seconds,
            holding={"CPU": cpus, "GPU": gpus},
            threads=threads,
            neighbours=math.ceil(bounds[1] / num_nodes),
            engine=[] if engine is None else [ray.put(engine)],
        )
        ray.get(broker.begin.remote())  # before trials take places that the actors may need
        return cls(broker)

    def score(
        self,
        job: ScoringJob,
        cells: Sequence[Cell],
        *,
        on_result: Callable[[CellResult], None],
        on_wait: Callable[[bool], None] = lambda waits: None,
    ) -> None:
        """Answer every cell once. The caller is a driver or an actor; when its process ends, its cells are answered no further.

        Args:
            job: Of all cells.
            cells: What to answer.
            on_result: Gets each answer as soon as it is there, in this thread.
            on_wait: Is told, in this thread, False when actors begin to answer and True when none of them does any more: others have
                their turn, or there is no room.

        Raises:
            UserError: what the prompt, the model or the adapter raised in an actor, as it is.
            StoppedError: ``finish`` was called; cells that were being answered were given to ``on_result``.
            FleetError: the same cell cost several actors, no actor comes up, or the fleet was stopped.
        """
        with contextlib.closing(self._answers(job, cells, otherwise=False, on_wait=on_wait)) as answers:
            for result in answers:
                on_result(result)

    def answer_otherwise(
        self, job: ScoringJob, cells: Sequence[Cell], *, on_wait: Callable[[bool], None] = lambda waits: None
    ) -> list[CellResult]:
        """The cells' results computed in other shapes, in their order: where they differ, the precision decided.

        Raises:
            PauseRayError: as ``score``.
        """
        results = {result.cell_id: result for result in self._answers(job, cells, otherwise=True, on_wait=on_wait)}
        return [results[cell.id] for cell in cells]

    def finish(self) -> None:
        """Let running cells be answered, then end every call of ``score``, now and later, with ``StoppedError``."""
        ray.get(self.broker.finish.remote())

    def state(self, *, timeout_seconds: float | None = None) -> FleetState:
        """How many actors there are, what waits for them, and what they have answered.

        Raises:
            RayError: the broker does not answer in this time; None waits for ever.
        """
        state: FleetState = ray.get(self.broker.state.remote(), timeout=timeout_seconds)
        return state

    def stop(self) -> None:
        """End the actors and free what they hold."""
        ray.get(self.broker.close.remote())
        ray.kill(self.broker)

    def _answers(
        self, job: ScoringJob, cells: Sequence[Cell], *, otherwise: bool, on_wait: Callable[[bool], None]
    ) -> Generator[CellResult, None, None]:
        """Results in the order in which they come."""
        owed = {cell.id: cell for cell in cells}
        while owed:
            order = uuid.uuid4().hex
            try:
                self._order(order, job, list(owed.values()), otherwise=otherwise)
                for result in self._taken(order, number=len(owed), on_wait=on_wait):
                    del owed[result.cell_id]
                    yield result
            except RayActorError as error:
                raise FleetError(f"the scoring fleet is gone: {' '.join(str(error).split())}") from error
            except RayTaskError as error:
                if isinstance(error.cause, PauseRayError):
                    raise error.cause from error
                raise
            finally:
                self.broker.leave.options(max_task_retries=0).remote(order)

    def _order(self, order: str, job: ScoringJob, cells: list[Cell], *, otherwise: bool) -> None:
        context = ray.get_runtime_context()
        caller = context.current_actor if context.get_actor_id() else None
        ray.get(self.broker.enter.remote(order, job, cells, otherwise=otherwise, caller=caller))

    def _taken(self, order: str, *, number: int, on_wait: Callable[[bool], None]) -> Iterator[CellResult]:
        """What comes of an order; it ends early if the broker was lost, and its successor knows of nothing."""
        received, waits = 0, True
        on_wait(waits)
        while received < number:
            taken: Taken | None = ray.get(self.broker.take.remote(order, received, waits=waits))
            if taken is None:
                return
            received += len(taken.results)
            yield from taken.results
            if taken.waits != waits and received < number:
                waits = taken.waits
                on_wait(waits)
