"""The spec of a trial: model + pauses + corpus + training + evaluation + seed, and the fields that define its identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pause_ray.core.spec import JsonObject, Spec, check_path, inline_files, read_yaml, with_overrides
from pause_ray.data.spec import CorpusSpec
from pause_ray.evaluation.suite import SuiteSpec
from pause_ray.inference.engine import EndpointSpec, EngineSpec, HfEngineSpec
from pause_ray.models.spec import ModelSpec
from pause_ray.text.pauses import PausePolicy
from pause_ray.training.batching import batch_layout
from pause_ray.training.spec import TrainSpec

_SUITE_FILE_FIELDS = ("task.needles", "task.groups")
FILE_FIELDS = ("eval", *(f"eval.{field}" for field in _SUITE_FILE_FIELDS), "corpus.facts")
"""Dotted paths where a trial's YAML may name a file instead of writing its content."""


class _Range(Spec):
    """A number between two bounds that follows the free resources or the work."""

    min: int
    """The fewest."""
    max: int = Field(ge=1)
    """The most."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; swap them")
        return self


class WorkerRange(_Range):
    """Ray Train takes as many workers as the cluster has room for, and goes on from the last checkpoint when that changes."""

    min: int = Field(ge=1)
    """With fewer, training waits."""
    max: int = Field(ge=1)
    """The number that is requested from an autoscaling cluster."""


class ActorRange(_Range):
    """Scoring actors come when there is work for them, and go."""

    min: int = Field(ge=0)
    """Kept for the whole sweep; 0 gives all their places back when nothing is scored."""
    max: int = Field(ge=1)
    """With work for more, it waits."""


def _number_or_range(data: object) -> str:
    """So that a mistake is told by the rule of what was meant."""
    return "<range>" if isinstance(data, dict | Spec) else "<number>"


Workers = Annotated[Annotated[int, Field(ge=0), Tag("<number>")] | Annotated[WorkerRange, Tag("<range>")], Discriminator(_number_or_range)]
Actors = Annotated[Annotated[int, Field(ge=1), Tag("<number>")] | Annotated[ActorRange, Tag("<range>")], Discriminator(_number_or_range)]
IDLE_SECONDS = 60.0
"""Less than it takes to load a large model again, more than between two trials."""


class Resources(Spec):
    """Resources of a trial. They are in no digest: the same trial on other machines is the same trial."""

    train_workers: Workers = 0
    """Ray Train workers; 0 trains inside the trial's own process (one process start fewer), but on GPUs that a range of scoring
    actors shares in a worker of its own; ``{min, max}`` for as many as there is room for, which needs ``train.checkpoint_every``."""
    train_gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs of each training worker; null: one where the cluster has several, half of one where it has one, else none."""
    train_cpus_per_worker: float = Field(default=1, gt=0)
    """Logical CPUs of each training worker."""
    scoring_actors: Actors = 1
    """Ray actors that answer cells, shared by all trials of a sweep; ``{min, max}`` for as many as there is work for, so that
    training and scoring can take turns on the same GPUs."""
    scoring_idle_seconds: float | None = Field(default=None, ge=0)
    """An actor beyond ``scoring_actors.min`` gives its place back after so long without work, and at once where training waits
    for it; null: 60."""
    scoring_gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs of each scoring actor; null: as for training."""
    scoring_cpus_per_actor: float = Field(default=1, gt=0)
    """Logical CPUs of each scoring actor."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of one computation on the CPU; null: all cores of the machine, or of the container that the
    process is in, divided among training workers, or scoring actors, there."""

    @model_validator(mode="after")
    def _idle_actors_may_go(self) -> Self:
        fewest, most = self.scoring_bounds
        if self.scoring_idle_seconds is not None and fewest == most:
            raise ValueError(
                f"scoring_idle_seconds {self.scoring_idle_seconds:g} has no effect on scoring_actors {most}, which stay; "
                f"leave it out, or set scoring_actors: {{min: 0, max: {most}}}"
            )
        return self

    @property
    def scoring_bounds(self) -> tuple[int, int]:
        """Fewest and most scoring actors."""
        actors = self.scoring_actors
        return (actors.min, actors.max) if isinstance(actors, ActorRange) else (actors, actors)

    @property
    def idle_seconds(self) -> float:
        """After which a scoring actor beyond the fewest goes."""
        return IDLE_SECONDS if self.scoring_idle_seconds is None else self.scoring_idle_seconds

    @property
    def worker_bounds(self) -> tuple[int, int]:
        """Fewest and most training workers."""
        workers = self.train_workers
        return (workers.min, workers.max) if isinstance(workers, WorkerRange) else (workers, workers)


class TrialSpec(Spec):
    """One condition, reproducible from this alone."""

    model: ModelSpec
    """The base model."""
    pauses: PausePolicy | None = None
    """The pause policy of training and evaluation text; null for no pauses."""
    corpus: CorpusSpec | None = None
    """The training data; unused without ``train``."""
    train: TrainSpec | None = None
    """The fine-tuning; null scores the base model."""
    adapter: str | None = None
    """Folder of a finished checkpoint to score instead of training one."""
    eval: SuiteSpec
    """The suite of questions; in YAML, the path of a suite file."""
    engine: EngineSpec = HfEngineSpec()
    """The engine that answers: transformers here, or a server."""
    seed: int = Field(default=0, ge=0)
    """The seed of haystack order, training facts, data order and initial adapter."""
    replicate: int = Field(default=0, ge=0)
    """Which repetition this is: shifts the seed and chooses the needle's wording."""
    resources: Resources = Resources()
    """The resources on which it runs."""

    @model_validator(mode="after")
    def _training_has_a_corpus(self) -> Self:
        if self.train is not None and self.corpus is None:
            raise ValueError("train needs a corpus; give one, or set train to null to score the base model")
        return self

    @model_validator(mode="after")
    def _corpus_fills_a_step(self) -> Self:
        if self.train is not None and self.corpus is not None and self.corpus.num_sequences < self.train.rows_per_step:
            raise ValueError(
                f"corpus.num_sequences {self.corpus.num_sequences} is less than one optimizer step takes: {self.train.step_formula}; "
                "raise corpus.num_sequences or lower train.gradient_accumulation_steps"
            )
        return self

    @model_validator(mode="after")
    def _elastic_training_keeps_checkpoints(self) -> Self:
        if self.train is not None and isinstance(self.resources.train_workers, WorkerRange):
            if self.train.checkpoint_every is None:
                raise ValueError(
                    "resources.train_workers {min, max} starts training again whenever the number changes; "
                    "set train.checkpoint_every, or it begins at step 1 each time"
                )
            if self.train.sequence_parallel > 1:
                raise ValueError(
                    "resources.train_workers {min, max} may leave incomplete groups for train.sequence_parallel; give one number"
                )
        return self

    @model_validator(mode="after")
    def _workers_share_the_rows(self) -> Self:
        if self.train is not None and isinstance(self.resources.train_workers, int):
            batch_layout(self.train, num_workers=max(1, self.resources.train_workers))
        return self

    @model_validator(mode="after")
    def _adapter_is_made_or_given(self) -> Self:
        if self.train is not None and self.adapter is not None:
            raise ValueError(f"adapter {self.adapter} and train exclude each other; set train to null to score that adapter")
        return self

    @model_validator(mode="after")
    def _lengths_share_no_dynamic_positions(self) -> Self:
        dynamic = self.model.rope is not None and self.model.rope.kind == "dynamic"
        if dynamic and isinstance(self.engine, HfEngineSpec) and self.engine.reuse == "full":
            raise ValueError(
                "model.rope dynamic turns every position by the prompt's whole length, so prompts of different lengths share nothing; "
                "set engine.reuse to depth"
            )
        return self

    @model_validator(mode="after")
    def _a_server_can_answer_so(self) -> Self:
        """Refuse what a server would refuse later, after a training."""
        if not isinstance(self.engine, EndpointSpec):
            return self
        if self.model.quantize is not None:
            raise ValueError(f"model.quantize {self.model.quantize} has no effect on an endpoint; choose it on the server")
        if self.model.rope is not None:
            raise ValueError(f"model.rope {self.model.rope.kind} has no effect on an endpoint; scale positions on the server")
        token = self.pauses.token if self.pauses else "text"
        if token == "added" or (token == "reserved" and self.train is not None):
            raise ValueError(
                f"pauses.token {token}: a server does not load the marker's row; use pauses.token: text, or engine: {{kind: hf}}"
            )
        if (self.train is not None or self.adapter is not None) and not self.engine.load_adapters:
            raise ValueError("engine.load_adapters: must be true for a server to answer with an adapter; set it, or use engine: {kind: hf}")
        return self

    @property
    def data_seed(self) -> int:
        """The seed of this replicate: of haystack order, training facts, data order and initial adapter."""
        return self.seed + 1000 * self.replicate

    def defining(self) -> JsonObject:
        """The fields that change the result.

        Without resources, without the corpus when nothing is trained, and without the precision where a server decides it.
        """
        data = self.resolved()
        del data["resources"]
        data["engine"] = self.engine.identity()
        if isinstance(self.engine, EndpointSpec):
            del data["model"]["dtype"]
        if self.train is None:
            del data["corpus"]
        else:
            data["train"] = self.train.identity()
        return data


def read_trial(path: Path, overrides: JsonObject) -> TrialSpec:
    """A trial from its YAML file, or from the ``trial`` part of a sweep's file, with overrides applied.

    Raises:
        SpecError: unknown field or path, or a value that breaks a rule.
    """
    data = read_yaml(path)
    if isinstance(data.get("trial"), dict):
        data = data["trial"]
    return TrialSpec.parse(sparse_trial(data, overrides, origin=path), origin=str(path))


def read_suite(path: Path, overrides: JsonObject) -> SuiteSpec:
    """A suite from its YAML file, with overrides applied.

    Raises:
        SpecError: unknown field or path, a value that breaks a rule, or a file it names that is not there.
    """
    for dotted in overrides:
        check_path(SuiteSpec, dotted, origin="--set")
    whole = inline_files(read_yaml(path), _SUITE_FILE_FIELDS, origin=path)
    return SuiteSpec.parse(inline_files(with_overrides(whole, overrides), _SUITE_FILE_FIELDS, origin=path), origin=str(path))


def sparse_trial(data: JsonObject, overrides: JsonObject, *, origin: Path) -> JsonObject:
    """Sparse trial data with overrides applied and every file it names read in.

    Raises:
        SpecError: an override of a path that a trial does not have, or a file that is not there.
    """
    for dotted in overrides:
        check_path(TrialSpec, dotted, origin="--set")
    whole = inline_files(data, FILE_FIELDS, origin=origin)  # first, so that an override can reach into a named file
    return inline_files(with_overrides(whole, overrides), FILE_FIELDS, origin=origin)
