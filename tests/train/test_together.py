"""Adapters that are trained together on one base are those that each would be alone."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pause_ray.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE_TENSORS, Checkpoint, RunningTraining, training_folder
from pause_ray.errors import SpecError, StoppedError, TrainingError
from pause_ray.spec import JsonObject
from pause_ray.storage import Storage
from pause_ray.train import launch, training_log
from pause_ray.train.launch import TrainJob, fit
from pause_ray.train.spec import LoraSpec, TrainSpec, ZeroSpec
from pause_ray.train.together import check_jobs, fit_together
from tests.engines.tiny_model import added_marker as family_marker
from tests.engines.tiny_model import make_model as make_family
from tests.train.tiny_llama import added_marker, make_model, make_rows, make_shards, reserved_marker

torch_only = pytest.mark.torch
SAME = 1e-4
"""Largest difference of two float32 adapters after a few steps: AdamW divides rounding errors by gradients that are hardly larger."""
ALL_KINDS = (
    {"rank": 4, "alpha": 4},
    {"rank": 8, "alpha": 16, "rslora": True, "targets": ("q_proj", "v_proj")},
    {"rank": 2, "alpha": 4, "dora": True},
    {"rank": 3, "alpha": 6, "dropout": 0.5, "targets": ("down_proj", "o_proj")},
    {"rank": 4, "alpha": 2, "dora": True, "dropout": 0.2},
)
"""Every kind of adapter, on different layers."""


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script called by its absolute path may find neither ninja nor g++."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without markers, which most of these trainings do not have."""
    return make_shards(tmp_path_factory.mktemp("shards") / "set", make_rows(20))


def job_of(llama: Path, shards: Path, *, seed: int = 0, lora: JsonObject | None = None, marker: Any = None, **changes: Any) -> TrainJob:
    settings = {"steps": 4, "batch_size": 2, "accumulation": 2, "warmup_steps": 1, "learning_rate": 1e-2, "precision": "float32"}
    train = TrainSpec(lora=LoraSpec.model_validate(lora or ALL_KINDS[0]), **(settings | changes))
    return TrainJob(train=train, model_dir=llama, base_digest="tiny", shards=shards, marker=marker, policy=None, seed=seed, threads=1)


def all_kinds(llama: Path, shards: Path, **changes: Any) -> list[TrainJob]:
    return [job_of(llama, shards, seed=seed, lora=lora, **changes) for seed, lora in enumerate(ALL_KINDS)]


def alone(job: TrainJob, root: Path, *, num_workers: int = 0, progress: Any = lambda *_: None) -> Checkpoint:
    return fit(job, storage=Storage.open(root), num_workers=num_workers, cpus_per_worker=1, gpus_per_worker=0, progress=progress)


def together(jobs: Sequence[TrainJob], root: Path, *, num_workers: Any = 0, progress: Any = lambda *_: None, stop: Any = None) -> list[Any]:
    places: JsonObject = {"storage": Storage.open(root), "num_workers": num_workers, "cpus_per_worker": 1, "gpus_per_worker": 0}
    return fit_together(jobs, progress=progress, stop=stop, **places)


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    import safetensors.torch

    return {name: part.float() for name, part in safetensors.torch.load_file(checkpoint.folder / ADAPTER_WEIGHTS).items()}


def largest_difference(a: Checkpoint, b: Checkpoint) -> float:
    first, second = weights(a), weights(b)
    assert {name: part.shape for name, part in first.items()} == {name: part.shape for name, part in second.items()}
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def change(checkpoint: Checkpoint) -> float:
    """How far training went: of the second matrices, which begin at zero."""
    return max(float(part.abs().max()) for name, part in weights(checkpoint).items() if "lora_B" in name)


@torch_only
@pytest.mark.parametrize(("marker", "tied"), [("none", True), ("added", True), ("added", False), ("reserved", False)])
def test_each_is_what_it_is_alone(tmp_path: Path, marker: str, tied: bool) -> None:
    llama = make_model(tmp_path / "model", tied=tied)
    token = {"none": lambda _: None, "added": added_marker, "reserved": reserved_marker}[marker](llama)
    rows = make_rows(20, marker_id=token and token.token_id)
    jobs = all_kinds(llama, make_shards(tmp_path / "set", rows, validation=rows[:3]), marker=token)
    made = together(jobs, tmp_path / "together")
    for job, checkpoint in zip(jobs, made, strict=True):
        own = alone(job, tmp_path / "alone")
        assert checkpoint.folder.name == own.folder.name
        assert (checkpoint.folder / ADAPTER_CONFIG).read_bytes() == (own.folder / ADAPTER_CONFIG).read_bytes()
        assert change(own) > 100 * SAME
        assert largest_difference(checkpoint, own) < SAME
        for row, its in zip(checkpoint.losses(), own.losses(), strict=True):
            for name in ("loss", "gradient_norm", "learning_rate"):
                assert row[name] == pytest.approx(its[name], rel=1e-3)
            assert (row["tokens"], row["labelled_tokens"]) == (its["tokens"], its["labelled_tokens"])
        assert checkpoint.losses()[-1]["validation_loss"] == pytest.approx(own.losses()[-1]["validation_loss"], rel=1e-3)


@torch_only
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_other_families_and_logits_that_a_model_makes_itself(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma scales embeddings and bounds logits, with windows in between; of Llama, the way of models that ``loss`` does not know."""
    from pause_ray.train import loss

    if kind == "llama":
        monkeypatch.setattr(loss, "PLAIN_OUTPUT", frozenset())
    folder = make_family(tmp_path / "model", kind=kind, tied=True)
    token = family_marker(folder)
    shards = make_shards(tmp_path / "set", make_rows(20, marker_id=token.token_id))
    jobs = [job_of(folder, shards, seed=seed, lora=lora, marker=token) for seed, lora in enumerate(ALL_KINDS[:3])]
    for job, checkpoint in zip(jobs, together(jobs, tmp_path / "together"), strict=True):
        assert largest_difference(checkpoint, alone(job, tmp_path / "alone")) < SAME


@torch_only
def test_each_has_its_own_rows_rate_length_and_passes(llama: Path, shards: Path, tmp_path: Path) -> None:
    others = make_rows(9, seed=3)
    jobs = [
        job_of(llama, shards, learning_rate=3e-3, schedule="cosine"),
        job_of(llama, make_shards(tmp_path / "others", others, validation=others[:2]), seed=5, steps=3, validate_every=2),
        job_of(llama, shards, seed=2, accumulation=3, weight_decay=0.1, gradient_clip=0.01, steps=6),
    ]
    for job, checkpoint in zip(jobs, together(jobs, tmp_path / "together"), strict=True):
        own = alone(job, tmp_path / "alone")
        assert largest_difference(checkpoint, own) < SAME
        assert [row.get("validation_loss", 0) for row in checkpoint.losses()] == pytest.approx(
            [row.get("validation_loss", 0) for row in own.losses()], rel=1e-3
        )


@torch_only
def test_activations_may_be_computed_again(llama: Path, shards: Path, tmp_path: Path) -> None:
    """Dropout too, which then draws a second time in each layer."""
    for job, checkpoint in zip(
        all_kinds(llama, shards),
        together(all_kinds(llama, shards, gradient_checkpointing=True), tmp_path / "together"),
        strict=True,
    ):
        assert largest_difference(checkpoint, alone(job, tmp_path / "alone")) < SAME


@torch_only
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_below_float32_each_is_as_near_as_rounding_allows(llama: Path, shards: Path, tmp_path: Path, quantize: str | None) -> None:
    """The masters are float32: what differs is activations and gradients, by up to 2⁻⁸ of themselves."""
    jobs = all_kinds(llama, shards, precision="bfloat16", quantize=quantize, steps=3)
    for job, checkpoint in zip(jobs, together(jobs, tmp_path / "together"), strict=True):
        own = alone(job, tmp_path / "alone")
        assert [row["loss"] for row in checkpoint.losses()] == pytest.approx([row["loss"] for row in own.losses()], rel=0.02)
        first, second = weights(checkpoint), weights(own)
        apart = sum(float((first[name] - second[name]).abs().sum()) for name in first)
        moved = sum(float(part.abs().sum()) for name, part in second.items() if "lora_B" in name)
        assert apart < 0.2 * moved


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_workers_share_the_rows_of_all(tmp_path: Path) -> None:
    """Two for three rows, so that one has none in some passes."""
    llama = make_model(tmp_path / "model")
    marker = added_marker(llama)
    shards = make_shards(tmp_path / "set", make_rows(20, marker_id=marker.token_id))
    changes = {"marker": marker, "checkpoint_every": 2, "batch_size": 1, "accumulation": 3}
    jobs = [job_of(llama, shards, **changes), job_of(llama, shards, seed=1, lora={"rank": 8, "alpha": 16}, **changes)]
    made = together(jobs, tmp_path / "together", num_workers=(2, 2))
    for job, checkpoint in zip(jobs, made, strict=True):
        assert largest_difference(checkpoint, alone(job, tmp_path / "alone")) < SAME
        assert {path.name for path in checkpoint.folder.parent.iterdir() if path.is_dir()} == {its.folder.name for its in made}


@torch_only
def test_one_that_was_stopped_goes_on_alone_or_with_others(
    llama: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (launch, training_log):  # a step of so small a model takes less than the usual look
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    changes = {"steps": 60, "learning_rate": 1e-4, "checkpoint_every": 50}
    first, second, third = (job_of(llama, shards, seed=seed, lora={"rank": 2, "alpha": 2}, **changes) for seed in range(3))
    stop = threading.Event()
    with pytest.raises(StoppedError, match="the same command goes on there"):
        together([first, second], tmp_path / "runs", stop=stop, progress=lambda job, done, steps, row: stop.set())
    kept = [RunningTraining(folder=path, belongs_to={}) for path in (tmp_path / "runs" / "checkpoints").glob(".*.training")]
    assert len(kept) == 2
    assert all(1 <= running.last_step() < 50 for running in kept)
    with pytest.raises(StoppedError, match="before it began"):
        together([first, second], tmp_path / "runs", stop=stop)
    told: list[int] = []
    went_on_alone = alone(first, tmp_path / "runs", progress=lambda done, total, row: told.append(done))
    went_on_together, new = together([second, third], tmp_path / "runs")
    assert told == list(range(1, 61))
    for job, checkpoint in ((first, went_on_alone), (second, went_on_together), (third, new)):
        assert largest_difference(checkpoint, alone(job, tmp_path / "alone")) < SAME
        assert not training_folder(checkpoint.folder).exists()


@torch_only
def test_a_checkpoint_of_training_alone_is_gone_on_from(llama: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the two lie at different steps too."""
    changes = {"steps": 6, "checkpoint_every": 2}
    begun, new = job_of(llama, shards, **changes), job_of(llama, shards, seed=1, **changes)

    from pause_ray.train import worker

    with monkeypatch.context() as patched:
        patched.setattr(worker, "write_adapter", lambda *_, **__: (_ for _ in ()).throw(TrainingError("the machine went away")))
        with pytest.raises(TrainingError, match="went away"):
            alone(begun, tmp_path / "runs")
    [left] = (tmp_path / "runs" / "checkpoints").glob(".*.training")
    assert (left / "step-4" / STATE_TENSORS).exists()
    for job, checkpoint in zip([begun, new], together([begun, new], tmp_path / "runs"), strict=True):
        assert largest_difference(checkpoint, alone(job, tmp_path / "alone")) < SAME


@torch_only
def test_one_that_fails_leaves_the_others_alone(llama: Path, shards: Path, tmp_path: Path) -> None:
    """One whose loss overflows, one whose rows have nothing to learn, one whose layers the model does not have."""
    silent = [dataclasses.replace(row, labels=row.labels * 0 - 100) for row in make_rows(8)]
    jobs = [
        job_of(llama, shards),
        job_of(llama, shards, seed=1, learning_rate=1e30, warmup_steps=0, schedule="constant"),
        job_of(llama, make_shards(tmp_path / "silent", silent)),
        job_of(llama, shards, lora={"targets": ("gate",)}),
        job_of(llama, shards, seed=2),
    ]
    well, overflown, unlearned, unfit, also_well = together(jobs, tmp_path / "together")
    assert isinstance(overflown, TrainingError)
    assert "lower train.learning_rate" in str(overflown)
    assert isinstance(unlearned, TrainingError)
    assert "no token with a loss" in str(unlearned)
    assert isinstance(unfit, SpecError)
    assert "train.lora.targets" in str(unfit)
    for job, checkpoint in ((jobs[0], well), (jobs[4], also_well)):
        assert largest_difference(checkpoint, alone(job, tmp_path / "alone")) < SAME
    with pytest.raises(TrainingError, match=re.escape(str(overflown))):
        alone(jobs[1], tmp_path / "alone")
    left = {path.name for path in (tmp_path / "together" / "checkpoints").iterdir() if path.is_dir()}
    assert {well.folder.name, also_well.folder.name} == {name for name in left if not name.startswith(".")}


@torch_only
def test_what_is_finished_is_found_and_the_rest_trained(llama: Path, shards: Path, tmp_path: Path) -> None:
    jobs = [job_of(llama, shards, seed=seed) for seed in range(3)]
    finished = alone(jobs[1], tmp_path)
    told: set[int] = set()
    made = together(jobs, tmp_path, progress=lambda job, done, steps, row: told.add(job))
    assert (made[1], told) == (finished, {0, 2})
    told.clear()
    assert together(jobs, tmp_path, progress=lambda job, done, steps, row: told.add(job)) == made
    assert told == set()


@torch_only
def test_a_base_that_drops_out_itself_is_refused(shards: Path, tmp_path: Path) -> None:
    import json

    llama = make_model(tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(SpecError, match="dropout of its own"):
        together([job_of(llama, shards), job_of(llama, shards, seed=1)], tmp_path / "runs")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero": ZeroSpec(stage=2)}, "train.zero.stage 2"),
        ({"zero": ZeroSpec(stage="auto")}, "train.zero.stage auto"),
        ({"sequence_parallel": 2}, "train.sequence_parallel 2"),
        ({"precision": "float16"}, "train.precision float16"),
        ({"precision": "bfloat16"}, "train.precision float32 and bfloat16"),
        ({"gradient_checkpointing": True}, "train.gradient_checkpointing False and True"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(tmp_path: Path, changes: JsonObject, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        check_jobs([job_of(tmp_path, tmp_path), job_of(tmp_path, tmp_path, **changes)])


def test_jobs_of_two_bases_are_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, tmp_path)
    with pytest.raises(SpecError, match="base model tiny and other cannot be trained together"):
        check_jobs([job, dataclasses.replace(job, base_digest="other")])


def test_the_same_training_twice_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, make_shards(tmp_path / "set", make_rows(4)))
    with pytest.raises(SpecError, match="the same"):
        together([job, job], tmp_path / "runs")
