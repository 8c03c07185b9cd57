"""The one process that holds all scoring actors of a sweep: starts and ends them, gives them cells, passes answers on.

Callers (trial processes) never hold an actor, so none can wait for another that waits for it. An actor that is lost, with its
process or its node, is replaced where there is room, and what it owed waits again. Knows Ray; the rules are in ``turns``.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.core import ray_cluster
from pause_ray.core.errors import ClusterError, FleetError, PauseRayError, StoppedError
from pause_ray.core.process import about, write_lines
from pause_ray.evaluation.cell_scheduler import FleetState, Run, Tally, Turns, wanted_actors
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.scoring_actor import ScoringActor, ScoringJob
from pause_ray.evaluation.suite import Cell
from pause_ray.inference.engine import Engine

log = logging.getLogger("pause_ray")

MOST_LOSSES_PER_CELL = 3
"""A cell during which an actor was lost this often is taken to be the reason, and scoring stops."""
MOST_FAILED_STARTS = 3
"""In a row, with no actor up: scoring stops."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts to start an actor; the first pause is a second, each further one twice as long."""
STARTING_SECONDS = 30.0
"""An actor that is not up after so long has no room, and nothing is left for it to do; it takes its share when it comes."""
LOOK_SECONDS = 1.0
"""Between two looks at what nobody tells: who waits for room, whose turn is over, who has been idle for long."""
ROOM_PATIENCE_SECONDS = 30.0
"""Somebody who waits longer for what actors hold gets an actor that is at work, and after as long again the next."""
ABANDONED_SECONDS = 300.0
"""An actor that is still at a cell that nobody has waited for since then is taken to hang, and ended."""


@dataclass(kw_only=True, eq=False)
class _Actor:
    handle: Any
    started: float
    pid: int | None = None
    """None while it is starting."""
    base: object = None
    """Of the weights that it holds."""
    run: Run | None = None
    idle_since: float = 0.0
    leaving: bool = False
    """It gets no more cells."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_idle(self) -> bool:
        return self.pid is not None and self.run is None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What came of an order."""

    results: list[CellResult]
    """Those that were not taken before."""
    waits: bool
    """No actor is at it: others have their turn, or none is up."""


@dataclass(kw_only=True, eq=False)
class _Caller:
    """Who waits for an order's answers."""

    job: ScoringJob
    otherwise: bool
    results: list[CellResult] = field(default_factory=list)
    failure: Exception | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    runs: int = 0
    """Actors that are at it."""
    losses: collections.Counter[str] = field(default_factory=collections.Counter)

    def fail(self, failure: Exception) -> None:
        """Raise in the caller, after the answers that are there; the first failure is the one."""
        self.failure = self.failure or failure
        self.news.set()


class Broker:
    """An asynchronous actor; its methods wait without keeping others from running."""

    def __init__(
        self,
        *,
        bounds: tuple[int, int],
        idle_seconds: float,
        holding: dict[str, float],
        threads: int | None,
        neighbours: int,
        engine: Sequence[Any],
    ) -> None:
        """Start nothing yet.

        Args:
            bounds: Fewest and most actors.
            idle_seconds: An actor beyond the fewest that has had nothing to do for so long is ended.
            holding: What each actor holds: ``CPU`` and ``GPU``.
            threads: As ``ScoringActor``.
            neighbours: As ``ScoringActor``.
            engine: A reference to what ``ScoringActor`` is given, or nothing.
        """
        self._bounds = bounds
        self._idle_seconds = idle_seconds
        self._holding = holding
        self._given = {"threads": threads, "neighbours": neighbours}
        # DEFAULT: not inside the placement group of a Tune trial, which would wait for room in it for ever.
        self._remote = ray.remote(concurrency_groups={"control": 1})(ScoringActor).options(
            num_cpus=holding["CPU"], num_gpus=holding["GPU"], scheduling_strategy="DEFAULT", max_restarts=0
        )
        self._engine = engine
        self._turns = Turns()
        self._tally = Tally()
        write_lines()
        self._callers: dict[str, _Caller] = {}
        self._actors: list[_Actor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._failed_starts = 0
        self._next_start = 0.0
        self._looked = 0.0
        self._without_room: frozenset[str] = frozenset()
        self._room_wanted_since: float | None = None
        self._end: Exception | None = None
        """What everybody who asks is told; None while all is well."""

    async def begin(self) -> None:
        """Start the fewest actors, and from now on as many as are needed; returns when the fewest are asked for."""
        if not self._tasks:
            self._set_number(room_is_wanted=False)
            self._watch(self._govern())

    async def enter(self, key: str, job: ScoringJob, cells: list[Cell], *, otherwise: bool, caller: Any) -> None:
        """Order answers.

        Args:
            key: Names the order; one that is known is not taken twice.
            job: Of all cells.
            cells: What to answer.
            otherwise: In other shapes (``ScoringActor.answer_otherwise``).
            caller: The actor that calls, whose end is the order's; None for one that lives as long as the broker.
        """
        await self.begin()
        if key in self._callers:
            return
        self._callers[key] = _Caller(job=job, otherwise=otherwise, failure=self._end)
        self._turns.enter(key, cells, base=job.base, now=time.monotonic())
        if caller is not None:
            self._watch(self._until_gone(key, caller))
        self._stir()

    async def take(self, key: str, received: int, *, waits: bool) -> Taken | None:
        """Wait for news of an order; None if it is not known (any more).

        Args:
            key: The order.
            received: Answers that the caller has.
            waits: What it was told last, or True.

        Raises:
            Exception: what ended the order, when all answers before it are taken.
        """
        if key not in self._callers:
            return None
        caller = self._callers[key]
        while len(caller.results) <= received and (caller.runs == 0) == waits:
            if caller.failure is not None:
                raise caller.failure
            caller.news.clear()
            await caller.news.wait()
        return Taken(results=caller.results[received:], waits=caller.runs == 0)

    async def leave(self, key: str) -> None:
        """Nobody waits for the order any more; actors that are at it come free after the running cell."""
        self._callers.pop(key, None)
        self._end_runs(key)
        self._stir()

    async def finish(self) -> None:
        """Let running cells be answered, then end every order, now and later, with ``StoppedError``."""
        self._end = StoppedError("scoring was asked to end after the running cells; the same command goes on")
        for actor in self._actors:
            if actor.run:
                self._tell_to_end(actor.run)
        self._end_those_without_runs()

    async def state(self) -> FleetState:
        """How things are."""
        up = [actor.pid for actor in self._actors if actor.pid is not None]
        return FleetState(
            pids=tuple(up),
            busy=sum(actor.run is not None for actor in self._actors),
            coming=len(self._actors) - len(up),
            orders=len(self._callers),
            waiting_cells=self._turns.waiting_cells,
            answered=self._tally.answered,
        )

    async def close(self) -> None:
        """End all actors, whatever they are at."""
        self._bounds = (0, 0)
        for key in self._callers:
            self._fail(key, FleetError("the scoring fleet was ended"))
        for actor in list(self._actors):
            self._retire(actor)

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; an error of ours there reaches everybody who waits, since nothing would go on."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure = None if task.cancelled() else task.exception()
        if isinstance(failure, Exception):
            self._end = failure
            for key in self._callers:
                self._fail(key, failure)

    def _stir(self) -> None:
        """Something has changed: let everybody who waits for that look again."""
        self._wake.set()
        for actor in self._actors:
            actor.wake.set()

    async def _govern(self) -> None:
        """Keep the number of actors right, and their turns fair."""
        while True:
            self._set_number(room_is_wanted=await self._room_is_wanted())
            self._make_way()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout=LOOK_SECONDS)

    async def _room_is_wanted(self) -> bool:
        """Whether a placement group has waited since the last look, which is a second ago, for what actors hold."""
        now = time.monotonic()
        if len(self._actors) <= self._bounds[0]:
            self._without_room, self._room_wanted_since = frozenset(), None
        elif now - self._looked >= LOOK_SECONDS:
            self._looked = now
            found = await asyncio.to_thread(ray_cluster.groups_without_room, self._holding)
            wanted, self._without_room = bool(found & self._without_room), found
            if not wanted:
                self._room_wanted_since = None
            elif self._room_wanted_since is None:
                self._room_wanted_since = now
        return bool(self._without_room) and self._room_wanted_since is not None

    def _set_number(self, *, room_is_wanted: bool) -> None:
        """Start the actors that are missing; end those that are coming or idle and not needed."""
        now = time.monotonic()
        coming = [actor for actor in reversed(self._actors) if actor.pid is None]
        number_up = len(self._actors) - len(coming)
        wanted = wanted_actors(self._turns, bounds=self._bounds, number_up=number_up, room_is_wanted=room_is_wanted)
        if now >= self._next_start:
            for _ in range(wanted - len(self._actors)):
                self._start()
        patience = 0.0 if room_is_wanted else self._idle_seconds
        idle = [actor for actor in self._actors if actor.is_idle and now - actor.idle_since >= patience]
        unneeded = [*coming, *sorted(idle, key=lambda actor: actor.idle_since)]
        for actor in unneeded[: max(0, len(self._actors) - wanted)]:
            self._retire(actor)
        if room_is_wanted and self._room_wanted_since is not None and now - self._room_wanted_since >= ROOM_PATIENCE_SECONDS:
            self._give_one_away()
            self._room_wanted_since = now

    def _give_one_away(self) -> None:
        """Let the actor with the youngest run go after its cell, if scoring goes on without it."""
        at_work = [actor for actor in self._actors if actor.run and not actor.leaving]
        if len(self._actors) > max(self._bounds[0], 1) and at_work:
            actor = max(at_work, key=lambda actor: actor.run.since if actor.run else 0.0)
            actor.leaving = True
            if actor.run:
                self._tell_to_end(actor.run)

    def _make_way(self) -> None:
        """Tell a run to end where that is fair, or worth it; end an actor that hangs at what nobody waits for."""
        now = time.monotonic()
        someone_is_idle = any(actor.is_idle for actor in self._actors)
        run = self._turns.worth_splitting() if someone_is_idle else self._turns.must_make_way(now=now)
        if run is not None:
            self._tell_to_end(run)
        for actor in list(self._actors):
            if actor.run and actor.run.order.key not in self._callers and now - actor.run.answered > ABANDONED_SECONDS:
                words = next((cell.words for cell in actor.run.owed.values()), "cells")
                log.warning("a scoring actor has been at %s, that nobody waits for, since %g s; it is ended", words, ABANDONED_SECONDS)
                self._retire(actor)

    def _tell_to_end(self, run: Run) -> None:
        run.making_way = True
        for actor in self._actors:
            if actor.run is run:
                actor.handle.stop.options(concurrency_group="control").remote(run.number)

    def _end_runs(self, key: str) -> None:
        for run in self._turns.leave(key):
            self._tell_to_end(run)

    def _fail(self, key: str, failure: Exception) -> None:
        """End an order; its caller, if it still waits, is told when it has taken the answers that are there."""
        if key in self._callers:
            self._callers[key].fail(failure)
            self._end_runs(key)

    def _end_those_without_runs(self) -> None:
        at_work = {actor.run.order.key for actor in self._actors if actor.run}
        for key in self._callers:
            if self._end is not None and key not in at_work:
                self._fail(key, self._end)

    def _start(self) -> None:
        actor = _Actor(handle=self._remote.remote(*(self._engine or [None]), **self._given), started=time.monotonic())
        self._actors.append(actor)
        self._watch(self._serve(actor))

    def _retire(self, actor: _Actor) -> None:
        """End an actor at once."""
        actor.leaving = True
        actor.wake.set()
        self._actors.remove(actor)
        ray.kill(actor.handle)

    async def _serve(self, actor: _Actor) -> None:
        """An actor's life: up, one run after another, gone."""
        try:
            actor.pid = await actor.handle.ready.remote()
        except RayError as error:
            self._note_failed_start(actor, error)
            return
        self._failed_starts = 0
        actor.idle_since = time.monotonic()
        while not actor.leaving:
            actor.wake.clear()
            run = self._next_run(actor)
            if run is None:
                await actor.wake.wait()
                continue
            actor.run, actor.base = run, run.order.base
            await self._answer(actor, run)
            actor.run, actor.idle_since = None, time.monotonic()
            self._end_those_without_runs()
            self._stir()
        if actor in self._actors:
            self._retire(actor)

    def _next_run(self, actor: _Actor) -> Run | None:
        if self._end is not None:
            return None
        now = time.monotonic()
        expected = [other for other in self._actors if other.pid is not None or now - other.started < STARTING_SECONDS]
        return self._turns.next_run(base=actor.base, actors=len(expected), now=now)

    async def _answer(self, actor: _Actor, run: Run) -> None:
        """Pass on what an actor answers until it has answered all, was told to end, or is lost."""
        caller = self._callers[run.order.key]
        method = actor.handle.answer_otherwise if caller.otherwise else actor.handle.answer
        stream = method.options(num_returns="streaming").remote(run.number, caller.job, list(run.owed.values()))
        caller.runs += 1
        caller.news.set()
        try:
            async for item in stream:
                result = await item
                if isinstance(result, list):
                    self._turns.begun(run, result)
                    continue
                self._turns.answered(run, result.cell_id, now=time.monotonic())
                self._tally.add(result, asked="recheck" if caller.otherwise else caller.job.asked)
                caller.results.append(result)
                caller.news.set()
        except RayTaskError as error:
            self._fail(run.order.key, error)
        except RayError as error:
            if not actor.leaving:
                self._note_loss(caller, run, error)
            actor.leaving = True
        finally:
            self._turns.end(run, now=time.monotonic())
            caller.runs -= 1
            caller.news.set()

    def _note_failed_start(self, actor: _Actor, error: RayError) -> None:
        if actor.leaving:
            return
        self._retire(actor)
        self._failed_starts += 1
        self._next_start = time.monotonic() + min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** min(self._failed_starts, 10))
        reason = " ".join(str(error).split())
        if self._failed_starts < MOST_FAILED_STARTS or any(other.pid is not None for other in self._actors):
            log.warning("a scoring actor did not come up (%s)", reason)
            return
        missing = ray_cluster.without_package(reason)
        for key in self._callers:
            self._fail(key, ClusterError(missing) if missing else FleetError(f"no scoring actor comes up: {reason}"))

    def _note_loss(self, caller: _Caller, run: Run, error: RayError) -> None:
        """Count the loss against the first cell that was owed: the actor was there, or a few cells further."""
        if not run.owed:
            return
        cell = next(iter(run.owed.values()))
        caller.losses[cell.id] += 1
        reason = " ".join(str(error).split())
        if caller.losses[cell.id] >= MOST_LOSSES_PER_CELL:
            told = f"{caller.losses[cell.id]} scoring actors were lost at or soon after the {cell.words}; the last one: {reason}"
            self._fail(run.order.key, FleetError(told))
            return
        with about(caller.job.trial):
            told = "a scoring actor was lost at or soon after the %s; its %d cells are asked again (%s)"
            log.warning(told, cell.words, len(run.owed), reason)

    async def _until_gone(self, key: str, caller: Any) -> None:
        """End the order when its caller's process has died: a call that waits behind the caller's own fails at once then."""
        while key in self._callers:
            try:
                await caller.__ray_ready__.remote()
            except ActorUnavailableError:
                log.info("%s: its process cannot be reached for the moment", self._callers[key].job.trial)
            except RayActorError:
                await self.leave(key)
                return
            await asyncio.sleep(5 * LOOK_SECONDS)


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
