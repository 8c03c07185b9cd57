"""Properties of training in this process: a tiny random Llama, the real DeepSpeed, the real PEFT."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import CheckpointError, ModelError, SourceError, SpecError, StorageError, TrainingError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, STATE_TENSORS, TOKENIZER, TRAINING_LOG, Checkpoint, training_folder
from pause_ray.training.launch import fit, train_digest
from pause_ray.training.spec import LoraSpec, TrainJob, TrainSpec, ZeroSpec
from tests.training.tiny_llama import added_marker, make_model, make_rows, make_shards, reserved_marker

torch_only = pytest.mark.torch


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script called by its absolute path may find neither ninja nor g++."""
    monkeypatch.setenv("PATH", str(tmp_path))


def job_of(llama: Path, shards: Path, **changes: Any) -> TrainJob:
    settings = {
        "max_steps": 4,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "precision": "float32",
    }
    train = TrainSpec(lora=LoraSpec(rank=4, alpha=4), **(settings | changes))
    return TrainJob(
        train=train, model_dir=llama, base_digest="tiny", shards=shards, marker=added_marker(llama), policy=None, seed=0, threads=1
    )


def run(job: TrainJob, root: Path, progress: Any = lambda *_: None) -> Checkpoint:
    return fit(job, storage=Storage.open(root), num_workers=0, cpus_per_worker=1, gpus_per_worker=0, progress=progress)


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    import safetensors.torch

    return {name: tensor.float() for name, tensor in safetensors.torch.load_file(checkpoint.folder / ADAPTER_WEIGHTS).items()}


def largest_difference(a: Checkpoint, b: Checkpoint) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_whatever_changes_the_adapter_changes_its_digest(tmp_path: Path) -> None:
    job = TrainJob(
        train=TrainSpec(),
        model_dir=tmp_path,
        base_digest="a",
        shards=make_shards(tmp_path / "a", make_rows(4)),
        marker=None,
        policy=None,
        seed=0,
        threads=None,
    )
    others = [
        dataclasses.replace(job, train=TrainSpec(max_steps=61)),
        dataclasses.replace(job, base_digest="b"),
        dataclasses.replace(job, shards=make_shards(tmp_path / "b", make_rows(4, seed=1))),
        dataclasses.replace(job, seed=1),
    ]
    assert len({train_digest(other) for other in [job, *others]}) == 5
    same = dataclasses.replace(job, threads=4, shards=make_shards(tmp_path / "elsewhere", make_rows(4)), model_dir=tmp_path / "moved")
    assert train_digest(same) == train_digest(job)


def test_rows_that_cannot_be_shared_are_refused_before_anything_starts(tmp_path: Path) -> None:
    job = TrainJob(
        train=TrainSpec(),
        model_dir=tmp_path / "none",
        base_digest="a",
        shards=tmp_path / "none",
        marker=None,
        policy=None,
        seed=0,
        threads=None,
    )
    with pytest.raises(SpecError, match="8 rows per step cannot be shared by 3 workers"):
        fit(job, storage=Storage.open(tmp_path), num_workers=3, cpus_per_worker=1, gpus_per_worker=0, progress=lambda *_: None)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "set", make_rows(4))
    shard = next(shards.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    job = TrainJob(train=TrainSpec(), model_dir=tmp_path, base_digest="a", shards=shards, marker=None, policy=None, seed=0, threads=None)
    with pytest.raises(SourceError, match=shard.name):
        run(job, tmp_path / "runs")


@torch_only
def test_training_is_followed_recorded_and_not_done_twice(llama: Path, shards: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    job = job_of(llama, shards, max_steps=60)
    checkpoint = run(job, tmp_path, lambda done, steps, row: seen.append((done, steps, row["loss"])))
    losses = [row["loss"] for row in checkpoint.losses()]
    assert seen == [(step + 1, 60, loss) for step, loss in enumerate(losses)]
    assert losses[-1] < losses[0] / 2
    assert (checkpoint.num_steps, checkpoint.final_loss) == (60, losses[-1])
    assert checkpoint.document_digests == {"d0", "d1"}
    seen.clear()
    left_by_a_kill = training_folder(checkpoint.folder) / "step-1"
    left_by_a_kill.mkdir(parents=True)
    assert run(job, tmp_path, lambda *row: seen.append(row)) == checkpoint
    assert seen == []
    assert not left_by_a_kill.parent.exists()


@torch_only
def test_a_display_that_fails_is_an_error_and_costs_no_adapter(llama: Path, shards: Path, tmp_path: Path) -> None:
    def fail(done: int, steps: int, row: JsonObject) -> None:
        raise BrokenPipeError("nobody looks")

    job = job_of(llama, shards)
    with pytest.raises(BrokenPipeError):
        run(job, tmp_path, fail)
    assert run(job, tmp_path, fail).num_steps == 4


@torch_only
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_job_gives_the_same_bytes(llama: Path, shards: Path, tmp_path: Path, precision: str) -> None:
    job = job_of(llama, shards, precision=precision)
    first, second = run(job, tmp_path / "a"), run(job, tmp_path / "b")
    names = {path.name for path in first.folder.iterdir()} - {TRAINING_LOG, "manifest.json"}
    assert names == {path.name for path in second.folder.iterdir()} - {TRAINING_LOG, "manifest.json"}
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


@torch_only
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_the_same_adapter(llama: Path, shards: Path, tmp_path: Path, stage: int) -> None:
    reference = run(job_of(llama, shards), tmp_path)
    assert largest_difference(reference, run(job_of(llama, shards, zero=ZeroSpec(stage=stage)), tmp_path)) < 1e-4


@torch_only
def test_parameters_that_zero_3_has_partitioned_are_saved_whole(
    llama: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed leaves tensors this small unpartitioned by default; real ones are not this small."""
    from pause_ray.training import worker

    def all_partitioned(*args: Any, **keywords: Any) -> dict[str, Any]:
        return plain(*args, **keywords) | {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

    plain = worker.deepspeed_config
    reference = run(job_of(llama, shards), tmp_path)
    monkeypatch.setattr(worker, "deepspeed_config", all_partitioned)
    assert largest_difference(reference, run(job_of(llama, shards, zero=ZeroSpec(stage=3)), tmp_path)) < 1e-4


@torch_only
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_in_this_process_leaves_no_weights_and_no_patches(llama: Path, shards: Path, tmp_path: Path, stage: int) -> None:
    import torch

    def live_values() -> int:
        gc.collect()
        return sum(found.numel() for found in gc.get_objects() if isinstance(found, torch.Tensor))

    job = job_of(llama, shards, zero=ZeroSpec(stage=stage))
    job = dataclasses.replace(job, train=job.train.model_copy(update={"lora": LoraSpec(rank=1, alpha=1)}))
    linear, before = torch.nn.functional.linear, live_values()
    run(job, tmp_path)
    assert torch.nn.functional.linear is linear
    assert not torch.distributed.is_initialized()
    assert "LOCAL_RANK" not in os.environ
    assert live_values() - before < 10_000, "of 28,000 base weights"


@torch_only
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_training_follows_float32(llama: Path, shards: Path, tmp_path: Path, stage: int) -> None:
    """Also the first steps, where a wrong bias correction of AdamW would show as 0.1."""
    reference = run(job_of(llama, shards), tmp_path).losses()
    losses = run(job_of(llama, shards, precision="bfloat16", zero=ZeroSpec(stage=stage)), tmp_path).losses()
    assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in reference], abs=1e-2)


@pytest.fixture
def float16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks a CPU for fast kernels; without them torch computes in float16 all the same."""
    import deepspeed

    monkeypatch.setattr(deepspeed.get_accelerator(), "is_fp16_supported", lambda: True)


@torch_only
@pytest.mark.usefixtures("float16_everywhere")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float16_training_follows_float32(llama: Path, shards: Path, tmp_path: Path, stage: int) -> None:
    reference = run(job_of(llama, shards), tmp_path).losses()
    rows = run(job_of(llama, shards, precision="float16", zero=ZeroSpec(stage=stage)), tmp_path).losses()
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], abs=1e-2)
    assert [row["gradient_norm"] for row in rows] == pytest.approx([row["gradient_norm"] for row in reference], rel=1e-2)
    assert all("skipped_steps" not in row for row in rows)


@torch_only
@pytest.mark.usefixtures("float16_everywhere")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_float16_step_that_overflows_is_skipped_counted_and_no_error(
    llama: Path, shards: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first loss scale that is too large is halved until gradients fit; the training goes on from there."""
    from pause_ray.training import zero_config

    monkeypatch.setattr(zero_config, "FIRST_LOSS_SCALE_POWER", 22)
    rows = run(job_of(llama, shards, precision="float16", zero=ZeroSpec(stage=stage), max_steps=30), tmp_path).losses()
    skipped = [row.get("skipped_steps", 0) for row in rows]
    assert skipped == sorted(skipped)
    assert 0 < skipped[-1] < 15
    assert rows[-1]["loss"] < rows[0]["loss"]


@torch_only
def test_a_precision_that_the_device_does_not_know_is_refused(llama: Path, shards: Path, tmp_path: Path) -> None:
    import deepspeed

    if deepspeed.get_accelerator().is_fp16_supported():
        pytest.skip("this one does")
    with pytest.raises(SpecError, match=r"train\.precision float16"):
        run(job_of(llama, shards, precision="float16"), tmp_path)


@torch_only
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
        {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
    ],
)
def test_how_a_step_is_cut_up_changes_nothing(llama: Path, shards: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert largest_difference(run(job_of(llama, shards), tmp_path), run(job_of(llama, shards, **changes), tmp_path)) < 1e-4


@torch_only
def test_a_loss_that_is_no_number_stops_training_and_leaves_nothing(llama: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step \d+, rows \["):
        run(job_of(llama, shards, learning_rate=1e30, max_steps=8), tmp_path)
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == []
    assert run(job_of(llama, shards), tmp_path).num_steps == 4


@torch_only
def test_a_disk_that_fills_up_while_training_is_a_storage_error_and_leaves_nothing(llama: Path, shards: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill(done: int, steps: int, row: JsonObject) -> None:
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with pytest.raises(StorageError, match="disk is full"):
        run(job_of(llama, shards, max_steps=100), small_disk, fill)
    assert [path for path in (small_disk / "checkpoints").iterdir() if path.is_dir()] == []
    filler.unlink()
    assert run(job_of(llama, shards), small_disk).num_steps == 4


@torch_only
def test_layers_that_the_model_lacks_are_named(llama: Path, shards: Path, tmp_path: Path) -> None:
    job = job_of(llama, shards)
    wrong = dataclasses.replace(job, train=job.train.model_copy(update={"lora": LoraSpec(targets=("q_proj", "c_attn"))}))
    with pytest.raises(SpecError, match=r"c_attn.*q_proj"):
        run(wrong, tmp_path)


@torch_only
def test_a_model_folder_without_weights_is_a_model_error(llama: Path, shards: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / TOKENIZER).write_bytes((llama / TOKENIZER).read_bytes())
    with pytest.raises(ModelError):
        run(dataclasses.replace(job_of(llama, shards), model_dir=empty), tmp_path)


@torch_only
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make_marker", [added_marker, reserved_marker])
def test_the_adapter_loads_with_plain_peft(tmp_path: Path, tied: bool, make_marker: Any) -> None:
    """On the base model, resized where the marker was added; the marker's row is trained, all others are the base's."""
    import peft
    import torch
    import transformers

    from pause_ray.training.batching import collate
    from pause_ray.training.loss import LossModel, tensors

    llama = make_model(tmp_path / "model", tied=tied)
    marker = make_marker(llama)
    rows = make_rows(20, marker_id=marker.token_id)
    checkpoint = run(
        dataclasses.replace(job_of(llama, make_shards(tmp_path / "set", rows), max_steps=100), marker=marker),
        tmp_path,
    )
    assert checkpoint.marker == marker

    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    assert tokenizer.convert_tokens_to_ids(marker.text) == marker.token_id
    base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().weight.shape[0]), mean_resizing=False)
    before = base.get_input_embeddings().weight.detach().clone()
    model = peft.PeftModel.from_pretrained(base, checkpoint.folder)
    with torch.no_grad():
        after = model.get_input_embeddings()(torch.arange(len(before)))
        plain = model(torch.tensor([[5, 9]]), output_hidden_states=True)
        loss, batch = LossModel(model), tensors(collate(rows), device="cpu")
        tuned = loss(**batch)
        with model.disable_adapter():
            untuned = loss(**batch)
    changed = (after != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [marker.token_id]
    assert tuned < untuned / 2
    if tied:
        assert torch.allclose(plain.logits[..., marker.token_id], plain.hidden_states[-1] @ after[marker.token_id], atol=1e-4)


@torch_only
@pytest.mark.parametrize("stage", [0, 3])
def test_the_loss_of_held_out_rows_is_told_and_changes_nothing(llama: Path, tmp_path: Path, stage: int) -> None:
    import peft
    import torch

    from pause_ray.models.weights import load_base
    from pause_ray.training.batching import collate, num_loss_tokens
    from pause_ray.training.loss import LossModel, tensors

    rows = make_rows(23, marker_id=added_marker(llama).token_id)
    shards = make_shards(tmp_path / "set", rows[:20], validation=rows[20:])
    settings = {"zero": ZeroSpec(stage=stage)}
    job = job_of(llama, shards, validate_every=3, **settings)
    job = dataclasses.replace(job, train=job.train.model_copy(update={"lora": LoraSpec(rank=4, alpha=4, dropout=0.3)}))
    checkpoint = run(job, tmp_path)
    told = {row["step"]: row["validation_loss"] for row in checkpoint.losses() if "validation_loss" in row}
    assert list(told) == [3, 4]
    model = peft.PeftModel.from_pretrained(load_base(llama, dtype="float32", marker=job.marker, device="cpu"), checkpoint.folder)
    with torch.no_grad():
        loss = sum(LossModel(model)(**tensors(collate([row]), device="cpu")).item() for row in rows[20:])
    assert told[4] == pytest.approx(loss / sum(num_loss_tokens(row) for row in rows[20:]), abs=1e-4)
    seldom = dataclasses.replace(job, train=job.train.model_copy(update={"validate_every": None}))
    assert largest_difference(checkpoint, run(seldom, tmp_path / "seldom")) == 0


@torch_only
def test_a_loss_of_held_out_rows_that_is_no_number_stops_training(llama: Path, tmp_path: Path) -> None:
    rows = make_rows(23, marker_id=added_marker(llama).token_id)
    shards = make_shards(tmp_path / "set", rows[:20], validation=rows[20:])
    job = job_of(llama, shards, learning_rate=1e30, warmup_steps=0, validate_every=1, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"validation loss is nan after step 1; lower train\.learning_rate"):
        run(job, tmp_path)
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == []


@torch_only
def test_without_a_marker_no_row_is_trained(llama: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(job_of(llama, make_shards(tmp_path / "set", make_rows(20))), marker=None)
    checkpoint = run(job, tmp_path)
    assert checkpoint.marker is None
    assert all("lora_" in name for name in weights(checkpoint))


@torch_only
def test_a_finished_training_keeps_no_checkpoints_of_itself(llama: Path, shards: Path, tmp_path: Path) -> None:
    checkpoint = run(job_of(llama, shards, checkpoint_every=1), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == [checkpoint.folder.name]
    assert largest_difference(checkpoint, run(job_of(llama, shards), tmp_path / "without")) == 0


def diverged(llama: Path, shards: Path, root: Path) -> tuple[TrainJob, Path]:
    """A job whose loss is no number at step 2 or later, and the folder of its last checkpoint."""
    job = job_of(llama, shards, learning_rate=1e30, warmup_steps=0, max_steps=8, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"at step \d+, rows \["):
        run(job, root)
    folder = training_folder(root / "checkpoints" / train_digest(job))
    return job, max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


@torch_only
def test_a_loss_that_is_no_number_leaves_the_last_checkpoint_and_the_same_command_stops_there_again(
    llama: Path, shards: Path, tmp_path: Path
) -> None:
    job, last = diverged(llama, shards, tmp_path)
    seen: list[int] = []
    step = int(last.name.removeprefix("step-"))
    with pytest.raises(TrainingError, match=rf"at step {step + 1}, rows"):
        run(job, tmp_path, lambda done, steps, row: seen.append(done))
    assert seen == list(range(1, step + 1))


@torch_only
def test_a_training_does_not_go_on_from_a_checkpoint_that_was_changed(llama: Path, shards: Path, tmp_path: Path) -> None:
    job, last = diverged(llama, shards, tmp_path)
    tensors = last / STATE_TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{STATE_TENSORS}: .*remove {last}"):
        run(job, tmp_path)


@torch_only
def test_a_training_does_not_go_on_with_another_tokenizer(llama: Path, shards: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    job, last = diverged(model, shards, tmp_path)
    text = (model / TOKENIZER).read_text()
    (model / TOKENIZER).write_text(text.replace('"<|unused|>"', '"<|other|>"'))
    with pytest.raises(CheckpointError, match=rf"another training \(its tokenizer is .*remove {last}"):
        run(job, tmp_path)


@torch_only
def test_a_disk_that_is_full_when_a_checkpoint_is_due_leaves_the_one_before(llama: Path, shards: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    job = job_of(llama, shards, max_steps=200, checkpoint_every=20)

    def fill(done: int, steps: int, row: JsonObject) -> None:
        if done > 20:  # the checkpoint after step 20 is written before step 21 is told
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(StorageError, match="disk is full"):
        run(job, small_disk, fill)
    (folder,) = (path for path in (small_disk / "checkpoints").iterdir() if path.is_dir())
    kept = [int(path.name.removeprefix("step-")) for path in folder.iterdir()]
    assert kept
    filler.unlink()
    seen: list[float] = []
    assert run(job, small_disk, lambda done, steps, row: seen.append(row["seconds"])).num_steps == 200
    assert len(seen) == 200


def test_elastic_workers_need_checkpoints_and_whole_groups(tmp_path: Path) -> None:
    def refused(train: TrainSpec, workers: tuple[int, int], message: str) -> None:
        job = TrainJob(train=train, model_dir=tmp_path, base_digest="a", shards=tmp_path, marker=None, policy=None, seed=0, threads=None)
        with pytest.raises(SpecError, match=message):
            fit(job, storage=Storage.open(tmp_path), num_workers=workers, cpus_per_worker=1, gpus_per_worker=0, progress=lambda *_: None)

    refused(TrainSpec(), (1, 2), r"train\.checkpoint_every")
    refused(TrainSpec(checkpoint_every=5, sequence_parallel=2), (2, 4), r"sequence_parallel 2")
    refused(TrainSpec(checkpoint_every=5), (1, 9), r"9 workers, but only 8 rows")
