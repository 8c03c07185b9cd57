"""A pool of scoring actors on Ray: starts and stops them, assigns them cells, and passes their answers on.

One controller actor owns all scoring actors of a sweep. Trials never hold an actor, so no trial can wait for another that waits for
it. An actor that is lost, with its process or its node, is replaced where there are resources, and its unanswered cells are assigned
again. The rules of assignment are in ``cell_scheduler``.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.core import ray_cluster
from pause_ray.core.errors import ClusterError, PauseRayError, ScoringPoolError, StoppedError
from pause_ray.core.process import about, log_to_stderr
from pause_ray.evaluation.cell_scheduler import Batch, CellScheduler, PoolState, Purpose, ScoringStats
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.scoring_actor import STOPPED, ScoringActor, ScoringJob
from pause_ray.evaluation.suite import Cell
from pause_ray.inference.engine import Engine

log = logging.getLogger("pause_ray")

MAX_LOSSES_PER_CELL = 3
"""Actors that may be lost during one cell; then the cell is taken to be the reason, and scoring fails."""
MAX_FAILED_STARTS = 3
"""Starts in a row that may fail while no actor is up; then scoring fails."""
MAX_START_DELAY_SECONDS = 30.0
"""The longest delay between two attempts to start an actor; the first is a second, and each doubles."""
START_SECONDS = 30.0
"""Time after which a starting actor is taken to lack resources, so that its share of the cells is assigned to others."""
POLL_SECONDS = 1.0
"""Interval of looking at what causes no event: pending placement groups, elapsed turns, idle actors."""
RELEASE_SECONDS = 30.0
"""Time that a placement group waits for resources of working actors before one of them is stopped; then the same for the next."""
MAX_CALLS = 10_000
"""The number of calls that may wait for answers at the same time."""


@dataclass(kw_only=True, eq=False)
class _Actor:
    handle: Any
    started: float
    pid: int | None = None
    """The process id; None while the actor is starting."""
    base_model: object = None
    """The base model that the actor has loaded."""
    batch: Batch | None = None
    idle_since: float = 0.0
    leaving: bool = False
    """Whether the actor gets no more cells."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(kw_only=True, eq=False)
class _Call:
    """A call of ``ScoringPool.score`` that waits for answers."""

    job: ScoringJob
    results: list[CellResult] = field(default_factory=list)
    failure: Exception | None = None
    """The first failure; it is raised in the caller after the answers that are there."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_actors: int = 0
    """The number of actors that are answering."""
    losses: collections.Counter[str] = field(default_factory=collections.Counter)
    """The number of actors that were lost, by the cell that they were at."""


class PoolController:
    """The Ray actor that owns a pool's scoring actors. Its methods are coroutines, so one that waits does not block the others."""

    def __init__(
        self,
        *,
        bounds: tuple[int, int],
        idle_seconds: float,
        resources: dict[str, float],
        actor_arguments: dict[str, Any],
        engine: Sequence[Any],
    ) -> None:
        """Create a controller that has started nothing yet.

        Args:
            bounds: The fewest and the most actors.
            idle_seconds: Time after which an idle actor beyond the fewest is stopped.
            resources: ``CPU`` and ``GPU`` of each actor.
            actor_arguments: Keyword arguments of ``ScoringActor``.
            engine: A reference to the engine of all actors, or nothing.
        """
        self._bounds, self._idle_seconds, self._resources = bounds, idle_seconds, resources
        # DEFAULT: not inside the placement group of a Tune trial, which would wait for resources in it for ever.
        remote = ray.remote(concurrency_groups={"control": 1})(ScoringActor).options(
            num_cpus=resources["CPU"], num_gpus=resources["GPU"], scheduling_strategy="DEFAULT", max_restarts=0
        )
        self._create: Callable[[], Any] = lambda: remote.remote(*(engine or [None]), **actor_arguments)
        self._scheduler = CellScheduler()
        self._stats: collections.defaultdict[Purpose, ScoringStats] = collections.defaultdict(ScoringStats)
        self._calls: dict[str, _Call] = {}
        self._actors: list[_Actor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._failed_starts, self._next_start = 0, 0.0
        self._polled, self._pending_groups = 0.0, frozenset[str]()
        self._resources_wanted_since: float | None = None
        self._failure: Exception | None = None
        """The error that all present and future calls get; None while all is well."""
        log_to_stderr()

    async def begin(self) -> None:
        """Start the fewest actors, and from now on as many as are needed; return when the fewest have been requested from Ray."""
        if not self._tasks:
            self._resize(resources_wanted=False)
            self._run(self._manage())

    async def submit(self, key: str, job: ScoringJob, cells: list[Cell], *, caller: Any) -> None:
        """Add a request unless its key is known. The end of ``caller``, the actor that calls, withdraws it; None for the driver."""
        await self.begin()
        if key in self._calls:
            return
        self._calls[key] = _Call(job=job, failure=self._failure)
        self._scheduler.submit(key, cells, base_model=job.base_model, now=time.monotonic())
        if caller is not None:
            self._run(self._withdraw_after(key, caller))
        self._notify()

    async def next_results(self, key: str, received: int, *, waits: bool) -> tuple[list[CellResult], bool] | None:
        """Wait for a change; return the results after the first ``received`` and whether no actor is answering.

        ``waits`` is what was returned last, or True. None is returned for an unknown request.

        Raises:
            Exception: the request failed, and all earlier results were returned.
        """
        if key not in self._calls:
            return None
        call = self._calls[key]
        while len(call.results) <= received and (call.num_actors == 0) == waits:
            if call.failure is not None:
                raise call.failure
            call.changed.clear()
            await call.changed.wait()
        return call.results[received:], call.num_actors == 0

    async def withdraw(self, key: str) -> None:
        """Forget a request; actors that work on it are free after their current cell."""
        self._calls.pop(key, None)
        for batch in self._scheduler.withdraw(key):
            self._preempt(batch)
        self._notify()

    async def finish(self) -> None:
        """Let current cells be answered, then end every request, now and later, with ``StoppedError``."""
        self._failure = StoppedError(STOPPED)
        for actor in self._actors:
            if actor.batch:
                self._preempt(actor.batch)
        self._fail_unserved()

    async def state(self) -> PoolState:
        """Return a snapshot."""
        pids = tuple(actor.pid for actor in self._actors if actor.pid is not None)
        return PoolState(
            pids=pids,
            busy=sum(actor.batch is not None for actor in self._actors),
            starting=len(self._actors) - len(pids),
            requests=len(self._calls),
            stats=dict(self._stats),
        )

    async def stop(self) -> None:
        """Kill all actors, whatever they are doing."""
        self._bounds = (0, 0)
        self._fail_all(ScoringPoolError("the scoring pool was stopped"))
        for actor in list(self._actors):
            self._kill(actor)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; a bug there fails all requests, since nothing would go on."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            failure = None if task.cancelled() else task.exception()
            if isinstance(failure, Exception):
                self._failure = failure
                self._fail_all(failure)

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(done)

    def _notify(self) -> None:
        """Let everything that waits for a change look again."""
        self._wake.set()
        for actor in self._actors:
            actor.wake.set()

    async def _manage(self) -> None:
        """Keep the number of actors right and their assignment fair."""
        while True:
            self._resize(resources_wanted=await self._resources_wanted())
            is_idle = any(actor.pid is not None and actor.batch is None for actor in self._actors)
            if batch := self._scheduler.choose_preemption(actor_is_idle=is_idle, now=time.monotonic()):
                self._preempt(batch)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout=POLL_SECONDS)

    async def _resources_wanted(self) -> bool:
        """Return whether a placement group was pending in two polls in a row for resources that actors hold."""
        now = time.monotonic()
        if len(self._actors) <= self._bounds[0]:
            self._pending_groups, self._resources_wanted_since = frozenset(), None
        elif now - self._polled >= POLL_SECONDS:
            self._polled = now
            pending = await asyncio.to_thread(ray_cluster.blocked_groups, self._resources)
            still_pending, self._pending_groups = pending & self._pending_groups, pending
            self._resources_wanted_since = (self._resources_wanted_since or now) if still_pending else None
        return self._resources_wanted_since is not None

    def _resize(self, *, resources_wanted: bool) -> None:
        """Start missing actors; kill starting and idle actors that are not needed; release a working one that others wait for long."""
        now = time.monotonic()
        starting = [actor for actor in reversed(self._actors) if actor.pid is None]
        num_up = len(self._actors) - len(starting)
        target = self._scheduler.target_actors(bounds=self._bounds, num_up=num_up, resources_wanted=resources_wanted)
        if now >= self._next_start:
            for _ in range(target - len(self._actors)):
                self._actors.append(_Actor(handle=self._create(), started=now))
                self._run(self._serve(self._actors[-1]))
        patience = 0.0 if resources_wanted else self._idle_seconds
        idle = [actor for actor in self._actors if actor.pid is not None and not actor.batch and now - actor.idle_since >= patience]
        unneeded = [*starting, *sorted(idle, key=lambda actor: actor.idle_since)]
        for actor in unneeded[: max(0, len(self._actors) - target)]:
            self._kill(actor)
        if self._resources_wanted_since is not None and now - self._resources_wanted_since >= RELEASE_SECONDS:
            self._resources_wanted_since = now
            working = [(actor.batch.started, actor.batch, actor) for actor in self._actors if actor.batch and not actor.leaving]
            if working and len(self._actors) > max(self._bounds[0], 1):
                _, batch, actor = max(working, key=lambda each: each[0])
                actor.leaving = True
                self._preempt(batch)

    def _preempt(self, batch: Batch) -> None:
        """Tell the batch's actor to stop after its current cell."""
        batch.preempted = True
        for actor in self._actors:
            if actor.batch is batch:
                actor.handle.stop.options(concurrency_group="control").remote(batch.number)

    def _fail(self, key: str, failure: Exception) -> None:
        """End a request; its caller gets the failure after the results that are there."""
        if call := self._calls.get(key):
            call.failure = call.failure or failure
            call.changed.set()
            for batch in self._scheduler.withdraw(key):
                self._preempt(batch)

    def _fail_all(self, failure: Exception) -> None:
        for key in self._calls:
            self._fail(key, failure)

    def _fail_unserved(self) -> None:
        """After ``finish``, end the requests that no actor works on any more."""
        served = {actor.batch.request.key for actor in self._actors if actor.batch}
        if self._failure is not None:
            for key in self._calls.keys() - served:
                self._fail(key, self._failure)

    def _kill(self, actor: _Actor) -> None:
        actor.leaving = True
        actor.wake.set()
        self._actors.remove(actor)
        ray.kill(actor.handle)

    async def _serve(self, actor: _Actor) -> None:
        """Follow an actor from its start to its end."""
        try:
            actor.pid = await actor.handle.ready.remote()
        except RayError as error:
            self._note_failed_start(actor, error)
            return
        self._failed_starts = 0
        actor.idle_since = time.monotonic()
        while not actor.leaving:
            actor.wake.clear()
            now = time.monotonic()
            num_actors = sum(each.pid is not None or now - each.started < START_SECONDS for each in self._actors)
            batch = None
            if self._failure is None:
                batch = self._scheduler.assign(base_model=actor.base_model, num_actors=num_actors, now=now)
            if batch is None:
                await actor.wake.wait()
                continue
            actor.batch, actor.base_model = batch, batch.request.base_model
            await self._answer(actor, batch)
            actor.batch, actor.idle_since = None, time.monotonic()
            self._fail_unserved()
            self._notify()
        if actor in self._actors:
            self._kill(actor)

    async def _answer(self, actor: _Actor, batch: Batch) -> None:
        """Collect an actor's results until the batch is answered or preempted, or the actor is lost."""
        call = self._calls[batch.request.key]
        stream = actor.handle.answer.options(num_returns="streaming").remote(batch.number, call.job, list(batch.remaining.values()))
        call.num_actors += 1
        call.changed.set()
        try:
            async for item in stream:
                result = await item
                if isinstance(result, list):
                    batch.remaining = {cell.id: cell for cell in result}
                    continue
                self._scheduler.record_answer(batch, result.cell_id, now=time.monotonic())
                self._stats[call.job.purpose] = self._stats[call.job.purpose].including(result)
                call.results.append(result)
                call.changed.set()
        except RayTaskError as error:
            self._fail(batch.request.key, error)
        except RayError as error:
            if not actor.leaving:
                self._note_loss(call, batch, error)
            actor.leaving = True
        finally:
            self._scheduler.end(batch, now=time.monotonic())
            call.num_actors -= 1
            call.changed.set()

    def _note_failed_start(self, actor: _Actor, error: RayError) -> None:
        if actor.leaving:
            return
        self._kill(actor)
        self._failed_starts += 1
        self._next_start = time.monotonic() + min(MAX_START_DELAY_SECONDS, 0.5 * 2 ** min(self._failed_starts, 10))
        reason = " ".join(str(error).split())
        if self._failed_starts < MAX_FAILED_STARTS or any(other.pid is not None for other in self._actors):
            log.warning("a scoring actor did not start (%s)", reason)
            return
        missing = ray_cluster.explain_missing_package(reason)
        self._fail_all(ClusterError(missing) if missing else ScoringPoolError(f"no scoring actor starts: {reason}"))

    def _note_loss(self, call: _Call, batch: Batch, error: RayError) -> None:
        """Count the loss against the first unanswered cell; the actor was at it, or a few cells further."""
        if not batch.remaining:
            return
        cell = next(iter(batch.remaining.values()))
        call.losses[cell.id] += 1
        reason = " ".join(str(error).split())
        if (times := call.losses[cell.id]) >= MAX_LOSSES_PER_CELL:
            message = f"{times} scoring actors were lost at or soon after the {cell.words}; the last one: {reason}"
            self._fail(batch.request.key, ScoringPoolError(message))
            return
        with about(call.job.trial):
            message = "a scoring actor was lost at or soon after the %s; its %d cells are assigned again (%s)"
            log.warning(message, cell.words, len(batch.remaining), reason)

    async def _withdraw_after(self, key: str, caller: Any) -> None:
        """Withdraw the request when its caller's process has died; Ray then fails the call that is queued behind the caller's own."""
        while key in self._calls:
            try:
                await caller.__ray_ready__.remote()
            except ActorUnavailableError:
                log.info("%s: its process cannot be reached for the moment", self._calls[key].job.trial)
            except RayActorError:
                await self.withdraw(key)
                return
            await asyncio.sleep(5 * POLL_SECONDS)


@dataclass(frozen=True)
class ScoringPool:
    """Scoring actors on Ray. Can be passed to other processes of the same cluster, such as trials."""

    controller: Any

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
        """Request actors from Ray, which start while the caller goes on. Ray must be initialized.

        Args:
            num_actors: The number of actors, each with its own base model; or the fewest and the most, as many as there is work for.
            cpus: Logical CPUs of each actor.
            gpus: GPUs of each actor; may be a fraction.
            threads: CPU threads of each actor; None divides a node's cores among its actors.
            idle_seconds: Time after which an idle actor beyond the fewest is stopped; it is stopped at once where a placement group (a
                trial, training workers) waits for its resources.
            engine: The engine to use instead of each job's own, copied to every actor; or None.
        """
        bounds = (num_actors, num_actors) if isinstance(num_actors, int) else num_actors
        num_nodes = sum(node["Alive"] for node in ray.nodes())
        # On the node of the sweep itself, so that it is lost with the sweep only.
        here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
        controller = ray.remote(PoolController).options(
            num_cpus=0, scheduling_strategy=here, max_concurrency=MAX_CALLS, max_restarts=-1, max_task_retries=-1
        )
        pool = cls(
            controller.remote(
                bounds=bounds,
                idle_seconds=idle_seconds,
                resources={"CPU": cpus, "GPU": gpus},
                actor_arguments={"threads": threads, "num_neighbors": math.ceil(bounds[1] / num_nodes)},
                engine=[] if engine is None else [ray.put(engine)],
            )
        )
        ray.get(pool.controller.begin.remote())  # before trials take resources that the actors may need
        return pool

    def score(
        self,
        job: ScoringJob,
        cells: Sequence[Cell],
        *,
        on_result: Callable[[CellResult], None],
        on_wait: Callable[[bool], None] = lambda waits: None,
    ) -> None:
        """Answer every cell once, as ``CellScorer.score``. When the calling process dies, its cells are answered no further."""
        context = ray.get_runtime_context()
        caller = context.current_actor if context.get_actor_id() else None
        unanswered = {cell.id: cell for cell in cells}
        while unanswered:  # again where Ray has restarted the controller, which then knows no request
            key = uuid.uuid4().hex
            try:
                _call(self.controller.submit, key, job, list(unanswered.values()), caller=caller)
                received, waits = 0, True
                on_wait(waits)
                while unanswered and (update := _call(self.controller.next_results, key, received, waits=waits)) is not None:
                    results, waits_now = update
                    received += len(results)
                    for result in results:
                        del unanswered[result.cell_id]
                        on_result(result)
                    if waits_now != waits and unanswered:
                        waits = waits_now
                        on_wait(waits)
            finally:
                self.controller.withdraw.options(max_task_retries=0).remote(key)

    def finish(self) -> None:
        """Let current cells be answered, then end every call of ``score``, now and later, with ``StoppedError``."""
        ray.get(self.controller.finish.remote())

    def state(self, *, timeout_seconds: float | None = None) -> PoolState:
        """Return the number of actors, what waits for them, and what they have answered.

        Raises:
            RayError: the controller does not answer in time; None waits for ever.
        """
        state: PoolState = ray.get(self.controller.state.remote(), timeout=timeout_seconds)
        return state

    def stop(self) -> None:
        """Kill the actors and free their resources."""
        ray.get(self.controller.stop.remote())
        ray.kill(self.controller)


def _call(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the controller; an error of ours arrives as itself."""
    try:
        return ray.get(method.remote(*args, **kwargs))
    except RayActorError as error:
        raise ScoringPoolError(f"the scoring pool is gone: {' '.join(str(error).split())}") from error
    except RayTaskError as error:
        if isinstance(error.cause, PauseRayError):
            raise error.cause from error
        raise
