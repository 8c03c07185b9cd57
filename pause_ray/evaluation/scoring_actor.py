"""What a scoring actor does: answers cells of any trial, with base weights that are loaded once. Knows no Ray and no other actor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from joblib import cpu_count

from pause_ray.core.process import about, write_lines
from pause_ray.evaluation.answer import Condition, OtherwiseEngine, Reader, answer_cells, answer_otherwise, planned
from pause_ray.evaluation.cell_scheduler import Asked
from pause_ray.evaluation.haystack import Haystack, load_haystack, prompt_builder
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.suite import Cell, SuiteSpec
from pause_ray.inference.engine import Engine, EngineSpec, HfEngineSpec, LoadedAs
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker

log = logging.getLogger("pause_ray")


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
    trial: str = ""
    """How log lines name the trial."""
    asked: Asked = "grid"
    """Why; for those who count."""

    @property
    def base(self) -> tuple[object, ...]:
        """Jobs of which this is equal are answered with the same base weights; the adapter may differ."""
        return (self.engine, self.loaded.model_dir, self.loaded.dtype, self.loaded.quantize)


class ScoringActor:
    """Answers one run of cells after another; ``stop`` may be called from another thread while one is answered."""

    def __init__(self, engine: Engine | None, *, threads: int | None, neighbours: int) -> None:
        """Load nothing yet.

        Args:
            engine: Answers whatever a job's own engine is; None for the job's.
            threads: Threads of CPU computation; None for the cores that this process may use, divided among actors.
            neighbours: Actors on this machine, this one included.
        """
        self._given = engine
        self._threads = threads or max(1, cpu_count() // neighbours)
        self._made: tuple[EngineSpec, Engine] | None = None
        self._haystack: tuple[object, Haystack] | None = None
        self._reader: tuple[object, Reader] | None = None
        self._stopped_run: int | None = None
        write_lines()

    def ready(self) -> int:
        """The actor's process, as soon as it is up."""
        return os.getpid()

    def stop(self, run: int) -> None:
        """End that run after the cell that it is at; without effect on others."""
        self._stopped_run = run

    def answer(self, run: int, job: ScoringJob, cells: list[Cell]) -> Iterator[list[Cell] | CellResult]:
        """First the cells in the order of their walk, then their results one by one, until ``stop``."""
        with about(job.trial):
            log.info("answering %d cells (%s)", len(cells), job.asked)
            engine, reader = self._engine_of(job.engine), self._reader_of(job)
            engine.use(job.loaded)
            local = job.engine if isinstance(job.engine, HfEngineSpec) else HfEngineSpec()
            asked = planned(cells, reader=reader, grain_tokens=engine.grain_tokens, reuse=local.reuse, drafts=local.drafts)
            named = {cell.id: cell for cell in cells}
            yield [cell for cell, _ in asked]
            for result in answer_cells(asked, engine=engine, reader=reader, condition=job.condition):
                if result.unscored_reason is not None:
                    log.warning("%s: not scored: %s", named[result.cell_id].words, result.unscored_reason)
                yield result
                if self._stopped_run == run:
                    return

    def answer_otherwise(self, run: int, job: ScoringJob, cells: list[Cell]) -> Iterator[CellResult]:
        """Results of the cells computed in other shapes, one by one, until ``stop``."""
        with about(job.trial):
            log.info("answering %d cells again in other shapes", len(cells))
            engine = self._engine_of(job.engine)
            engine.use(job.loaded)
            if not isinstance(engine, OtherwiseEngine):
                raise TypeError(f"engine {engine.name} cannot compute an answer in other shapes")
            reader = self._reader_of(job)
            for cell in cells:
                with about(cell.words):
                    [result] = answer_otherwise([cell], engine=engine, reader=reader, condition=job.condition)
                yield result
                if self._stopped_run == run:
                    return

    def _engine_of(self, spec: EngineSpec) -> Engine:
        """The engine of a spec; the last one is kept, since the trials of a sweep mostly share it."""
        if self._given is not None:
            return self._given
        if self._made is None or self._made[0] != spec:
            self._made = None  # frees the old weights before the new ones come
            self._made = (spec, _make_engine(spec, threads=self._threads))
        return self._made[1]

    def _reader_of(self, job: ScoringJob) -> Reader:
        """The job's reader; the last one is kept, since trials that differ in their adapters read the same prompts."""
        key = (job.suite, job.policy, job.seed, job.replicate, job.data_seed, job.loaded.model_dir)
        if self._reader is None or self._reader[0] != key:
            tokenizer = ModelTokenizer.load(job.loaded.model_dir)
            marker = resolve_marker(tokenizer, job.policy)
            builder = prompt_builder(
                self._haystack_of(job),
                suite=job.suite,
                tokenizer=tokenizer,
                policy=job.policy,
                marker=marker,
                seed=job.data_seed,
                cache=job.cache,
            )
            reader = Reader(builder=builder, tokenizer=tokenizer, policy=job.policy, marker=marker, max_new_tokens=job.suite.max_new_tokens)
            self._reader = (key, reader)
        return self._reader[1]

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
        from pause_ray.inference.endpoint import EndpointEngine

        return EndpointEngine(spec)
    # PEFT imports bitsandbytes, which notes on every CPU that an optional package is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from pause_ray.inference.hf import HfEngine

    return HfEngine(spec, threads=threads)
