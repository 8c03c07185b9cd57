"""A look at adapters that are still being trained: the proxy is asked of them while their training goes on in a thread.

Knows the fleet and threads; no Tune, and not what follows from a score.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.core.errors import ModelError, SpecError, TextError, UserError
from pause_ray.core.process import Stage
from pause_ray.core.spec import digest
from pause_ray.core.storage import Storage, is_complete
from pause_ray.evaluation.haystack import ask, check_fits, check_lengths, load_haystack, prompt_builder
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.proxy import proxy_suite
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.models.checkpoint import Checkpoint, RunningTraining, rung_folder, training_folder
from pause_ray.models.sources import model_limit_tokens
from pause_ray.text.tokenizer import ModelTokenizer
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.run import scoring_job

POLL_SECONDS = 0.2
"""Between two looks for an adapter; a step takes seconds."""


@dataclass(frozen=True, kw_only=True)
class ProxyScore:
    """What the proxy says of one adapter."""

    score: float
    """Mean of its cells, 0 to 1."""
    num_cells: int
    """Of which it is the mean; others could not be scored."""
    seconds: float
    """From the question to the last answer, the wait for a scoring actor included."""
    prefilled_tokens: int
    """Prompt tokens that were computed for it."""


def score_proxy(
    trial: PreparedTrial,
    adapter: Checkpoint,
    suite: SuiteSpec,
    *,
    arm: str,
    storage: Storage,
    fleet: ScoringPool,
    progress: Callable[[Stage, int, int], None],
) -> ProxyScore:
    """Ask the proxy of an adapter.

    Args:
        trial: Whose adapter it is.
        adapter: As it is after some steps.
        suite: The trial's ``proxy_suite``.
        arm: The trial's.
        storage: Where packages are kept.
        fleet: Who answers.
        progress: Is told how many of the proxy's cells are answered (stage ``proxy``), and while none can be (``queued``) how many of
            the trial's own; what it raises ends the asking.

    Raises:
        ModelError: no cell could be scored.
        UserError: as for ``ScoringPool.score``.
    """
    started = time.monotonic()
    job = dataclasses.replace(scoring_job(trial, arm=arm, checkpoint=adapter, storage=storage), suite=suite, purpose="proxy")
    asked = cells(suite, identity=f"{trial.digest} {adapter.num_steps}", replicate=trial.spec.replicate, seed=trial.spec.data_seed)
    rows: list[CellResult] = []

    def keep(result: CellResult) -> None:
        rows.append(result)
        progress(Stage.PROXY, len(rows), len(asked))

    def show(waits: bool) -> None:  # noqa: FBT001 (the fleet's)
        if waits:
            progress(Stage.QUEUED, 0, len(trial.cells))
        else:
            progress(Stage.PROXY, len(rows), len(asked))

    fleet.score(job, asked, on_result=keep, on_wait=show)
    scores = [row.score for row in rows if row.score is not None]
    if not scores:
        raise ModelError(
            f"none of the {len(rows)} proxy cells after step {adapter.num_steps} could be scored ({rows[0].unscored_reason}); "
            "put that right, or leave scheduler out"
        )
    return ProxyScore(
        score=sum(scores) / len(scores),
        num_cells=len(scores),
        seconds=round(time.monotonic() - started, 3),
        prefilled_tokens=sum(row.prefilled_tokens for row in rows),
    )


class TrainingInBackground:
    """A training in a thread of its own, so that its adapters can be scored while it goes on."""

    def __init__(self, train: Callable[[], Checkpoint], *, checkpoint: Path, stop: threading.Event) -> None:
        """Begin.

        Args:
            train: Trains until its end, or until ``stop`` is set and a checkpoint of the training is written (``train.launch.fit``).
            checkpoint: Folder that it leaves.
            stop: Asks it to end.
        """
        self._train = train
        self._training = training_folder(checkpoint)
        self._stop = stop
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._train()
        except Exception as error:  # noqa: BLE001 (a thread's border: raised again by the one that waits)
            self._error = error

    def adapter_after(self, step: int) -> Checkpoint | None:
        """The adapter as it is after ``step`` steps, as soon as it is there; None if the training was further than that before.

        Raises:
            PauseRayError: what the training raised.
        """
        folder = rung_folder(self._training, step=step)
        while self._thread.is_alive() and RunningTraining(folder=self._training, belongs_to={}).last_step() < step:
            if is_complete(folder):
                break
            self._thread.join(POLL_SECONDS)
        if not is_complete(folder) and self._error is not None:
            raise self._error
        try:
            return Checkpoint.open(folder) if is_complete(folder) else None
        except UserError:
            if is_complete(folder):
                raise
            return None  # another process has finished the same training meanwhile, and removed what it no longer needs

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until the training has come to its end.

        Raises:
            PauseRayError: what the training raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Let it write a checkpoint after the running step and end; returns when it has, and no worker holds anything any more."""
        self._stop.set()
        self._thread.join()

    def forget(self, steps: Sequence[int]) -> None:
        """Remove the adapters after these steps, which nobody needs any more."""
        for step in steps:
            shutil.rmtree(rung_folder(self._training, step=step), ignore_errors=True)


def proxy_lengths(trials: Collection[PreparedTrial], *, facts: int, context_tokens: Sequence[int] | None, cache: Path) -> tuple[int, ...]:
    """Lengths at which the proxy can be asked of all ``trials``, so that their scores compare.

    Args:
        trials: Of one sweep.
        facts: Of the proxy.
        context_tokens: The lengths that are wanted; None for the longest that all suites have and that fits all trials.
        cache: Where packages are kept.

    Raises:
        SpecError: the suites have no length in common, or no text to hide facts in.
        ModelError: a prompt is longer than the model takes.
        TextError: a length leaves no room for the facts.
    """
    distinct = {digest(_asked_as(trial)): trial for trial in trials}
    shared = set.intersection(*(set(trial.spec.eval.context_tokens) for trial in distinct.values()))
    if context_tokens is None and not shared:
        raise SpecError("scheduler: the trials' suites have no length in common; set scheduler.proxy.context_tokens")
    wanted = [tuple(context_tokens)] if context_tokens is not None else [(length,) for length in sorted(shared, reverse=True)]
    for lengths in wanted:
        try:
            for trial in distinct.values():
                _check_proxy(trial, proxy_suite(trial.spec.eval, facts=facts, context_tokens=lengths), cache=cache)
        except (ModelError, TextError):
            if lengths == wanted[-1]:
                raise
        else:
            return lengths
    raise AssertionError("every suite has a length")


def _asked_as(trial: PreparedTrial) -> list[object]:
    """What decides the prompts of a trial's proxy."""
    spec = trial.spec
    return [spec.eval.resolved(), spec.pauses.resolved() if spec.pauses else None, str(trial.model_dir), spec.seed, spec.replicate]


def _check_proxy(trial: PreparedTrial, suite: SuiteSpec, *, cache: Path) -> None:
    """Build its shortest and its longest prompt."""
    spec, limit_tokens = trial.spec, model_limit_tokens(trial.model_dir)
    check_lengths(suite, limit_tokens=limit_tokens, origin=spec.model.source)
    haystack = load_haystack(suite, cache=cache, seed=spec.seed, replicate=spec.replicate, data_seed=spec.data_seed)
    tokenizer = ModelTokenizer.load(trial.model_dir)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=spec.pauses, marker=trial.marker, seed=spec.data_seed)
    asked = cells(suite, identity="", replicate=spec.replicate, seed=spec.data_seed)
    for length in {min(suite.context_tokens), max(suite.context_tokens)}:
        prompt = ask(next(cell for cell in asked if cell.context_tokens == length), builder)
        check_fits(prompt, max_new_tokens=suite.max_new_tokens, limit_tokens=limit_tokens, origin=spec.model.source)
