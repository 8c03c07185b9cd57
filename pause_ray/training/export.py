"""Export of a checkpoint as a plain model folder, which transformers and servers load without this project. Knows no Ray.

The base model is read, merged and written file by file, so the export takes no more memory than the largest file.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from pause_ray.core.errors import CheckpointError, ModelError, StorageError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, building, file_sha256, read_json, space_errors, write_json
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER, TOKENIZER_COMPANIONS, Checkpoint
from pause_ray.models.sources import read_config
from pause_ray.models.weights import INDEX, StoredWeights, empty_base, read_adapter, start_marker_row

CONFIG = "config.json"
PREFIX = "base_model.model."
"""Prefix that PEFT puts before the name of a tensor."""
ROW = ".token_adapter.trainable_tokens_delta"

BASE = "base_model_name_or_path"
"""Field of an adapter's configuration that names its base model."""
Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


def base_of(checkpoint: Checkpoint) -> str:
    """Return the folder or hub id of the base model that was trained.

    Raises:
        CheckpointError: the adapter's configuration names no base model, or one that no longer exists.
    """
    path = checkpoint.folder / ADAPTER_CONFIG
    source = read_json(path).get(BASE)
    remedy = "give it with --model FOLDER_OR_HUB_ID"
    if not source or not isinstance(source, str):
        raise CheckpointError(f"{path}: names no base model; {remedy}")
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise CheckpointError(f"{path}: the base model was in {source} while training, and that folder no longer exists; {remedy}")
    return source


def check_target(folder: Path) -> None:
    """Refuse a folder that a model cannot be written into, before anything is fetched or read.

    Raises:
        StorageError: the folder is not empty, or its path goes through a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder}: is not empty; name a folder that does not exist")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise StorageError(f"{folder}: {above} is a file; name a folder that does not exist")


def export_model(checkpoint: Checkpoint, *, model_dir: Path, folder: Path, dtype: str | None, progress: Progress) -> None:
    """Merge adapter and marker of ``checkpoint`` into the base model and write it, with its tokenizer, into ``folder``.

    Sums are computed in float32 and rounded once. A manifest beside the model tells what it was made of.

    Args:
        checkpoint: Adapter, marker and tokenizer.
        model_dir: The base model that it was trained on.
        folder: Must not exist yet, or be empty.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the base model's.
        progress: Called after every file.

    Raises:
        CheckpointError: the adapter cannot be read, or has parts that fit no weight of the base.
        ModelError: the base cannot be read, or its weights are quantised.
        StorageError: ``folder`` is not empty or cannot be written, or the disk is full.
    """
    check_target(folder)
    config = read_config(model_dir / CONFIG)
    if "quantization_config" in config:
        raise ModelError(
            f"{model_dir}: its weights are quantised, so an adapter cannot be merged into them; export onto the plain base model"
        )
    base = empty_base(model_dir, dtype="float32", marker=checkpoint.marker)
    stored = StoredWeights(model_dir, base)
    merge = _Merge(checkpoint, rows=base.get_input_embeddings().weight.shape[0])
    merge.check_fits(stored)
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    tables = {name for name, _ in base.named_parameters(remove_duplicate=False) if base.get_submodule(name.rpartition(".")[0]) in layers}
    with building(folder) as scratch, space_errors(folder):
        places: dict[str, str] = {}
        for number, (file, names) in enumerate(sorted(stored.files.items())):
            tensors = {}
            for name, known in names.items():
                tensor = stored.read_stored(file, name)
                merged = merge.apply(known, tensor, is_table=known in tables) if known else tensor
                wanted = getattr(torch, dtype) if dtype and tensor.is_floating_point() else tensor.dtype
                tensors[name] = merged.to(wanted).contiguous()
            safetensors.torch.save_file(tensors, scratch / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
            progress(number + 1, len(stored.files))
        if len(stored.files) > 1:
            size = sum((scratch / file).stat().st_size for file in stored.files)
            write_json(scratch / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
        write_json(scratch / CONFIG, _exported_config(config, rows=merge.rows, dtype=dtype))
        for name in (TOKENIZER, *TOKENIZER_COMPANIONS):
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, scratch / name)
        origin = {
            "made_by": "pause-ray export",
            "base_digest": checkpoint.base_digest,
            "adapter_sha256": file_sha256(checkpoint.folder / ADAPTER_WEIGHTS),
            "marker": checkpoint.marker.text if checkpoint.marker else None,
            "dtype": dtype,
        }
        write_json(scratch / MANIFEST, origin)


class _Merge:
    """Adds an adapter to the weights of its base model."""

    def __init__(self, checkpoint: Checkpoint, *, rows: int) -> None:
        """Read the adapter; the vocabulary tables get ``rows`` rows."""
        config, weights = read_adapter(checkpoint.folder, device="cpu")
        self.rows, self._marker, self._folder = rows, checkpoint.marker, checkpoint.folder
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in weights.items():
            layer, part = _split(key)
            self._parts.setdefault(f"{layer}.weight", {})[part] = tensor.float()
        self._scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)

    def check_fits(self, stored: StoredWeights) -> None:
        """Refuse an adapter with a part that belongs to no weight of the base model."""
        unmatched = sorted(name for name in self._parts if name not in stored)
        if unmatched:
            raise CheckpointError(f"adapter {self._folder}: was made for another base model: {unmatched[0]} has no counterpart")

    @torch.no_grad()
    def apply(self, name: str, tensor: torch.Tensor, *, is_table: bool) -> torch.Tensor:
        """Return the weight ``name`` merged with the adapter; it is float32 where something changed."""
        parts = self._parts.get(name, {})
        if "lora_A" in parts:
            merged = tensor.float().addmm(parts["lora_B"], parts["lora_A"], alpha=self._scale)
            if "lora_magnitude_vector" in parts:
                merged *= (parts["lora_magnitude_vector"] / merged.norm(dim=1)).unsqueeze(1)
            return merged
        if not is_table or self._marker is None:
            return tensor
        grown = torch.zeros(self.rows, *tensor.shape[1:])
        grown[: len(tensor)] = tensor
        start_marker_row(grown, self._marker)
        if ROW in parts:
            grown[self._marker.token_id] = parts[ROW][0]
        return grown


def _split(key: str) -> tuple[str, str]:
    """Split into the model's layer and the adapter's part a key such as ``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight``."""
    name = key.removeprefix(PREFIX)
    if name.endswith(ROW):
        return name.removesuffix(ROW), ROW
    layer, _, part = name.removesuffix(".weight").rpartition(".")
    return layer, part


def _exported_config(config: JsonObject, *, rows: int, dtype: str | None) -> JsonObject:
    """Return the base's configuration with the new vocabulary size and precision; a multimodal model has them in its text part."""
    precision = {"dtype": dtype} if dtype else {}
    text = {**config["text_config"], "vocab_size": rows, **precision} if "text_config" in config else None
    changed = {**config, **({"text_config": text} if text else {"vocab_size": rows}), **precision}
    if dtype:
        changed.pop("torch_dtype", None)  # the name it had before
    return changed
