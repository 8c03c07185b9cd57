"""An exported model is a plain one: transformers loads it, and it answers as base and adapter do together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pause_ray.core.errors import CheckpointError, ModelError, StorageError
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, Checkpoint
from pause_ray.training.spec import LoraSpec, ZeroSpec
from tests.inference.tiny_model import added_marker, make_checkpoint, make_model
from tests.training.test_families import PROMPT, marker_of, train

pytestmark = pytest.mark.torch
CASES: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("llama", "added", True, {"dora": True}),
    ("llama", "added", False, {"rslora": True}),
    ("llama", "text", False, {"targets": ("v_proj", "down_proj")}),
    ("qwen2", "reserved", True, {}),
    ("gemma2", "added", True, {}),
    ("phi3", "reserved", False, {"dora": True, "rslora": True}),
]


def export(checkpoint: Checkpoint, model_dir: Path, folder: Path, dtype: str | None = None) -> list[tuple[int, int]]:
    from pause_ray.training.export import export_model

    done: list[tuple[int, int]] = []
    export_model(checkpoint, model_dir=model_dir, folder=folder, dtype=dtype, progress=lambda *files: done.append(files))
    return done


def logits(folder: Path, ids: list[int]) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def in_shards(model_dir: Path, size: str = "20KB") -> Path:
    """The same model, saved in several files."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size=size)
    assert len(list(model_dir.glob("*.safetensors"))) > 2
    return model_dir


@pytest.mark.parametrize(("kind", "token", "tied", "lora"), CASES)
def test_the_exported_model_answers_as_base_and_adapter_do(tmp_path: Path, kind: str, token: str, tied: bool, lora: dict[str, Any]) -> None:
    import torch
    import transformers

    from pause_ray.models.weights import load_adapter, load_base

    model_dir = in_shards(make_model(tmp_path / "model", kind=kind, tied=tied))
    marker = marker_of(model_dir, token)
    checkpoint = train(model_dir, tmp_path, marker=marker, lora=LoraSpec(rank=4, alpha=8, **lora), zero=ZeroSpec(stage=3))
    files = len(list(model_dir.glob("*.safetensors")))
    assert export(checkpoint, model_dir, tmp_path / "exported") == [(number + 1, files) for number in range(files)]

    ids = [*PROMPT, marker.token_id, 17] if marker else PROMPT
    base = load_base(model_dir, dtype="float32", marker=marker, device="cpu")
    with torch.no_grad():
        untrained = base(torch.tensor([ids])).logits
        wanted = load_adapter(base, checkpoint.folder)(torch.tensor([ids])).logits
    got = logits(tmp_path / "exported", ids)
    assert torch.allclose(got, wanted, atol=2e-5)
    assert (got - untrained).abs().max() > 1e-2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    if marker:
        assert tokenizer.encode(marker.text, add_special_tokens=False) == [marker.token_id]
    assert not list((tmp_path / "exported").glob("adapter*"))


def test_a_vocabulary_with_spare_rows_keeps_its_size(tmp_path: Path) -> None:
    import safetensors.torch

    model_dir = make_model(tmp_path / "model", vocab_size=448)
    marker = added_marker(model_dir)
    checkpoint = train(model_dir, tmp_path, marker=marker, zero=ZeroSpec(stage=3))
    export(checkpoint, model_dir, tmp_path / "exported")
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (model_dir, tmp_path / "exported"))
    table = "model.embed_tokens.weight"
    assert before[table].shape == after[table].shape == (448, 32)
    assert (before[table] != after[table]).any(dim=1).nonzero().flatten().tolist() == [marker.token_id]
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == 448


def test_the_precision_can_be_chosen(tmp_path: Path) -> None:
    import torch
    import transformers

    model_dir = make_model(tmp_path / "model")
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", model_dir, seed=1, marker=added_marker(model_dir)))
    export(checkpoint, model_dir, tmp_path / "half", "bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_the_command_finds_the_base_where_it_was_and_refuses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pause_ray.models.sources import model_digest

    monkeypatch.setenv("PAUSE_RAY_CACHE", str(tmp_path / "cache"))
    model_dir = make_model(tmp_path / "model")
    base_digest = model_digest(model_dir, cache=tmp_path / "cache")
    checkpoint = train(model_dir, tmp_path, marker=added_marker(model_dir), base_digest=base_digest, zero=ZeroSpec(stage=3))

    def pause_ray(*words: str) -> Any:
        from pause_ray.cli.main import app

        return CliRunner().invoke(app, ["export", *words, "--storage", str(tmp_path / "runs")])

    by_digest = pause_ray(checkpoint.folder.name, str(tmp_path / "one"), "--json")
    assert by_digest.exit_code == 0, by_digest.output
    assert json.loads(by_digest.stdout) == {"folder": str(tmp_path / "one"), "base_digest": base_digest, "marker": "<PAUSE>"}
    by_folder = pause_ray(str(checkpoint.folder), str(tmp_path / "two"), "--dtype", "float16")
    assert by_folder.exit_code == 0, by_folder.output
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    refused = pause_ray(str(checkpoint.folder), str(tmp_path / "three"), "--model", str(make_model(tmp_path / "other", seed=1)))
    assert isinstance(refused.exception, CheckpointError)
    assert base_digest in str(refused.exception)
    assert not (tmp_path / "three").exists()
    (tmp_path / "file").write_text("mine")
    below = pause_ray(str(checkpoint.folder), str(tmp_path / "file" / "four"))
    assert isinstance(below.exception, StorageError)
    assert str(below.exception).endswith("file is a file; name a folder that does not exist")
    model_dir.rename(tmp_path / "moved")
    gone = pause_ray(str(checkpoint.folder), str(tmp_path / "five"))
    assert isinstance(gone.exception, CheckpointError)
    assert str(gone.exception).endswith(
        f"was in {model_dir} while training, and that folder no longer exists; give it with --model FOLDER_OR_HUB_ID"
    )
    found = pause_ray(str(checkpoint.folder), str(tmp_path / "five"), "--model", str(tmp_path / "moved"))
    assert found.exit_code == 0, found.output


@pytest.mark.real
def test_the_real_model_exported_answers_as_with_its_adapter(tmp_path: Path, model_dir: Path) -> None:
    """In bytes that transformers alone reads; the marker stands in the prompt."""
    import peft
    import torch
    import transformers

    from pause_ray.models.checkpoint import TRAINING_LOG, copy_tokenizer, seal
    from pause_ray.models.weights import load_adapter, load_base

    marker = added_marker(model_dir)
    folder = tmp_path / "checkpoint"
    base = load_base(model_dir, dtype="float32", marker=marker, device="cpu")
    config = peft.LoraConfig(r=8, target_modules="all-linear", use_dora=True, trainable_token_indices={"embed_tokens": [marker.token_id]})
    made = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.02)
    made.save_pretrained(str(folder), save_embedding_layers=False)
    copy_tokenizer(model_dir, folder, marker=marker)
    (folder / TRAINING_LOG).write_text('{"step": 1, "loss": 1.0}\n')
    seal(folder, base_digest="real", tokenizer_digest="real", marker=marker, spec={}, document_digests=frozenset())
    export(Checkpoint.open(folder), model_dir, tmp_path / "exported")

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer.encode("The river bends twice before the mill.<PAUSE> The miller's name is")
    assert marker.token_id in ids
    del base, made
    base = load_base(model_dir, dtype="float32", marker=marker, device="cpu")
    with torch.no_grad():
        untrained = base(torch.tensor([ids])).logits
        wanted = load_adapter(base, folder)(torch.tensor([ids])).logits
    got = logits(tmp_path / "exported", ids)
    assert (got - wanted).abs().max() < 1e-3
    assert (got - untrained).abs().max() > 0.1


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", model_dir, seed=1, marker=added_marker(model_dir)))
    out = tmp_path / "exported"

    other = make_model(tmp_path / "other", kind="phi3")
    with pytest.raises(CheckpointError, match="another base model"):
        export(checkpoint, other, out)
    quantised = tmp_path / "quantised"
    shutil.copytree(model_dir, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="quantised"):
        export(checkpoint, quantised, out)
    cut = tmp_path / "cut"
    shutil.copytree(model_dir, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read"):
        export(checkpoint, cut, out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not empty"):
        export(checkpoint, model_dir, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (checkpoint.folder / ADAPTER_WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        export(checkpoint, model_dir, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    model_dir = make_model(tmp_path / "model", intermediate_size=4096)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", model_dir, seed=1, marker=added_marker(model_dir)))
    with pytest.raises(StorageError, match="disk is full"):
        export(checkpoint, model_dir, small_disk / "exported")
    assert list(small_disk.iterdir()) == []
