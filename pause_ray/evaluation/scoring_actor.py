"""Answers cells of any trial with base weights that are loaded once: in a Ray actor of the scoring pool, or in this process.

Knows neither Ray nor other actors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from joblib import cpu_count

from pause_ray.core.errors import StoppedError
from pause_ray.core.process import about, log_to_stderr
from pause_ray.evaluation.answer import CellRunner, Provenance, answer_cells, check_numerics, plan_cells
from pause_ray.evaluation.cell_scheduler import Purpose, ScoringStats
from pause_ray.evaluation.haystack import Haystack, load_haystack, prompt_builder
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.suite import Cell, SuiteSpec
from pause_ray.inference.engine import Engine, EngineSpec, HfEngineSpec, LoadedAs
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker

log = logging.getLogger("pause_ray")
T = TypeVar("T")
STOPPED = "scoring was asked to end after the running cells; the same command goes on"
"""The message of the ``StoppedError`` that ``finish`` causes."""


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """Everything that is needed to answer cells of one trial."""

    suite: SuiteSpec
    policy: PausePolicy | None
    replicate: int
    seed: int
    """The seed of the haystack's order, together with ``replicate``."""
    data_seed: int
    """The seed of randomly placed pauses."""
    engine: EngineSpec
    loaded: LoadedAs
    provenance: Provenance
    cache: Path
    trial: str = ""
    """The trial's name in log lines."""
    purpose: Purpose = "grid"

    @property
    def base_model(self) -> tuple[object, ...]:
        """A key that is equal for jobs that the same base weights answer; their adapters may differ."""
        return (self.engine, self.loaded.model_dir, self.loaded.dtype, self.loaded.quantize)


class CellScorer(Protocol):
    """Answers cells: a scoring pool on Ray, or this process."""

    def score(
        self, job: ScoringJob, cells: Sequence[Cell], *, on_result: Callable[[CellResult], None], on_wait: Callable[[bool], None]
    ) -> None:
        """Answer every cell once.

        Args:
            job: The job of all cells.
            cells: The cells to answer.
            on_result: Called with each answer as soon as it is there, in this thread.
            on_wait: Called in this thread with False when answering begins, and with True when it pauses because no actor is free.

        Raises:
            UserError: the prompt, the model or the adapter has a mistake.
            StoppedError: ``finish`` was called; results of cells that were being answered were given to ``on_result``.
            ScoringPoolError: the same cell cost several actors, no actor starts, or the pool was stopped.
        """


class _LastMade(Generic[T]):
    """Caches the last value that was made, since consecutive jobs mostly need the same one."""

    def __init__(self) -> None:
        self._entry: tuple[object, T] | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        if self._entry is None or self._entry[0] != key:
            self._entry = None  # frees the old value, such as a model's weights, before the new one is made
            self._entry = (key, make())
        return self._entry[1]


class ScoringActor:
    """Answers one batch of cells after another; ``stop`` may be called from another thread meanwhile."""

    def __init__(self, engine: Engine | None, *, threads: int | None, num_neighbors: int) -> None:
        """Create an actor that has loaded nothing yet.

        Args:
            engine: The engine to use instead of each job's own, or None.
            threads: The number of CPU threads; None divides this process's cores among the ``num_neighbors`` actors of the machine.
            num_neighbors: The number of actors on this machine, including this one.
        """
        self._fixed_engine = engine
        self._threads = threads or max(1, cpu_count() // num_neighbors)
        self._engine: _LastMade[Engine] = _LastMade()
        self._haystack: _LastMade[Haystack] = _LastMade()
        self._runner: _LastMade[CellRunner] = _LastMade()
        self._stopped_batch: int | None = None
        log_to_stderr()

    def ready(self) -> int:
        """Return the process id; an answer means that the actor is up."""
        return os.getpid()

    def stop(self, batch: int) -> None:
        """End a batch after its current cell; other batches are not affected."""
        self._stopped_batch = batch

    def answer(self, batch: int, job: ScoringJob, cells: list[Cell]) -> Iterator[list[Cell] | CellResult]:
        """Yield the cells in the order in which they will be answered, then their results one by one until ``stop``."""
        names = {cell.id: cell.words for cell in cells}
        with about(job.trial):
            log.info("answering %d cells (%s)", len(cells), job.purpose)
            runner = self._runner_of(job)
            engine = self._fixed_engine or self._engine.get(job.engine, lambda: _make_engine(job.engine, threads=self._threads))
            engine.use(job.loaded)
            if job.purpose == "numerics_check":
                ordered, results = cells, check_numerics(cells, engine=engine, runner=runner, provenance=job.provenance)
            else:
                local = job.engine if isinstance(job.engine, HfEngineSpec) else HfEngineSpec()
                steps = plan_cells(cells, runner=runner, prefix_block_size=engine.prefix_block_size, reuse=local.reuse, drafts=local.drafts)
                ordered = [cell for cell, _ in steps]
                results = answer_cells(steps, engine=engine, runner=runner, provenance=job.provenance)
            yield ordered
            for result in results:
                if result.unscored_reason is not None:
                    log.warning("%s: not scored: %s", names[result.cell_id], result.unscored_reason)
                yield result
                if self._stopped_batch == batch:
                    return

    def _runner_of(self, job: ScoringJob) -> CellRunner:
        """Return the job's runner; trials that differ in their adapters share it."""
        text = (job.suite, job.seed, job.replicate, job.data_seed)

        def make() -> CellRunner:
            suite, policy = job.suite, job.policy
            haystack = self._haystack.get(
                text,
                lambda: load_haystack(suite, cache=job.cache, seed=job.seed, replicate=job.replicate, data_seed=job.data_seed),
            )
            tokenizer = ModelTokenizer.load(job.loaded.model_dir)
            marker = resolve_marker(tokenizer, policy)
            builder = prompt_builder(
                haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=job.data_seed, cache=job.cache
            )
            return CellRunner(builder=builder, tokenizer=tokenizer, policy=policy, marker=marker, max_new_tokens=suite.max_new_tokens)

        return self._runner.get((*text, job.policy, job.loaded.model_dir), make)


def _make_engine(spec: EngineSpec, *, threads: int) -> Engine:
    if not isinstance(spec, HfEngineSpec):
        from pause_ray.inference.endpoint import EndpointEngine

        return EndpointEngine(spec)
    # PEFT imports bitsandbytes, which notes on every CPU that an optional package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from pause_ray.inference.hf import HfEngine

    return HfEngine(spec, threads=threads)


class LocalScorer:
    """Answers cells in this process, without Ray."""

    def __init__(self, engine: Engine | None = None, *, threads: int | None) -> None:
        """Create a scorer; the arguments are those of ``ScoringActor``."""
        self._actor = ScoringActor(engine, threads=threads, num_neighbors=1)
        self._finishing = False
        self.stats = ScoringStats()
        """Totals over all answers."""

    def score(
        self,
        job: ScoringJob,
        cells: Sequence[Cell],
        *,
        on_result: Callable[[CellResult], None],
        on_wait: Callable[[bool], None] = lambda waits: None,
    ) -> None:
        """Answer every cell once, as ``CellScorer.score``."""
        unanswered = len(cells)
        if not self._finishing:
            on_wait(False)  # noqa: FBT003
            for item in self._actor.answer(0, job, list(cells)):
                if not isinstance(item, list):
                    self.stats = self.stats.including(item)
                    on_result(item)
                    unanswered -= 1
        if self._finishing and unanswered:
            raise StoppedError(STOPPED)

    def finish(self) -> None:
        """Let the current cell be answered, then end every call of ``score``, now and later, with ``StoppedError``."""
        self._finishing = True
        self._actor.stop(0)
