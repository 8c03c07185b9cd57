"""A checkpoint folder: what fine-tuning leaves and an engine or plain PEFT loads. Knows files, no model library.

adapter_config.json, adapter_model.safetensors   as PEFT writes them (the marker's row is in the safetensors)
tokenizer.json, …                                the base tokenizer, with the marker where one was added
training.jsonl                                   one row per optimizer step: step, loss, learning_rate, …
documents.json                                   digests of the documents it was trained on
manifest.json                                    written last; without it the folder is no checkpoint
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pause_ray.errors import CheckpointError, StorageError
from pause_ray.spec import JsonObject
from pause_ray.storage import MANIFEST, file_sha256, is_complete, read_json, space_errors, write_json, write_text
from pause_ray.text.tokens import MarkerToken

FORMAT = 2
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINING_LOG = "training.jsonl"
DOCUMENTS = "documents.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Copied where the base model has them, so that the folder works as a tokenizer folder."""
REQUIRED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINING_LOG, TOKENIZER)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished adapter. ``open`` is the only way to get one, so its files are whole."""

    folder: Path
    """Holds the files named in this module's docstring."""
    base_digest: str
    """``model_digest`` of the base model it was trained on."""
    tokenizer_digest: str
    """Digest of the base model's tokenizer."""
    marker: MarkerToken | None
    """The marker whose row was trained, or None when markers are ordinary text or there are none."""
    spec: JsonObject
    """How it was made: train spec, pause policy, shard set, seed."""
    num_steps: int
    """Optimizer steps."""
    final_loss: float
    """Mean loss per labelled token of the last step, in nats."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """The checkpoint in ``folder``, after comparing every file with the manifest.

        Raises:
            CheckpointError: unfinished, of another format, or a file is missing or was changed.
        """
        if not is_complete(folder):
            raise CheckpointError(f"{folder}: no finished checkpoint (no {MANIFEST}); run the training again")
        try:
            manifest = read_json(folder / MANIFEST)
        except StorageError as error:
            raise CheckpointError(str(error)) from error
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}; remove the folder and train again"
            )
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file() or _fingerprint(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: missing or changed since training; remove the folder and run again")
        marker = manifest["marker"]
        return cls(
            folder=folder,
            base_digest=manifest["base_digest"],
            tokenizer_digest=manifest["tokenizer_digest"],
            marker=MarkerToken(**{**marker, "initial_ids": tuple(marker["initial_ids"])}) if marker else None,
            spec=manifest["spec"],
            num_steps=manifest["num_steps"],
            final_loss=manifest["final_loss"],
        )

    def check_fits(self, *, base_digest: str, marker: MarkerToken | None) -> None:
        """Refuse to be read on another base model, or with another marker, than it was trained with.

        A checkpoint without a trained marker row fits any text marker and none; one with such a row fits only its own
        marker, or a run without pauses.

        Raises:
            CheckpointError: naming both sides.
        """
        if base_digest != self.base_digest:
            raise CheckpointError(
                f"{self.folder}: adapter of base model {self.base_digest}, but the model here is {base_digest}; "
                "use the model it was trained on, or train an adapter for this one"
            )
        if marker is not None and marker != self.marker:
            trained = "no marker row" if self.marker is None else f"the marker {self.marker.text!r} (token {self.marker.token_id})"
            raise CheckpointError(
                f"{self.folder}: trained with {trained}, but the pauses here are {marker.text!r} (token {marker.token_id}); "
                "use the pauses it was trained with, or train again"
            )

    @property
    def document_digests(self) -> frozenset[str]:
        """Of the documents it was trained on, as ``ShardSet.document_digests`` has them."""
        return frozenset(read_json(self.folder / DOCUMENTS)["digests"])

    def losses(self) -> list[JsonObject]:
        """The rows of training.jsonl by step: ``step`` (from 1), ``loss`` in nats, ``learning_rate``, ``tokens``, ``seconds`` and so on."""
        return read_training_log(self.folder / TRAINING_LOG)


def read_training_log(path: Path) -> list[JsonObject]:
    """The complete rows of a training log, which may still be growing or not exist yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    complete, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def copy_tokenizer(model_dir: Path, folder: Path, *, marker: MarkerToken | None) -> None:
    """Put the base model's tokenizer into ``folder``; an added marker becomes a special token of it.

    Raises:
        CheckpointError: the tokenizer would give the added marker another id than the one that was trained.
        StorageError: disk full or not writable.
    """
    with space_errors(folder):
        for name in (TOKENIZER, *TOKENIZER_COMPANIONS):
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, folder / name)
    if marker is None or not marker.added:
        return
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.add_special_tokens([tokenizers.AddedToken(marker.text, normalized=False, special=True)])
    token_id = tokenizer.token_to_id(marker.text)
    if token_id != marker.token_id:
        raise CheckpointError(
            f"{model_dir / TOKENIZER}: gives the marker {marker.text!r} the id {token_id}, trained was {marker.token_id}; "
            "use token: reserved with an entry the vocabulary already has"
        )
    write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))


def seal(
    folder: Path,
    *,
    base_digest: str,
    tokenizer_digest: str,
    marker: MarkerToken | None,
    spec: JsonObject,
    document_digests: frozenset[str],
) -> None:
    """Write the manifest, which makes ``folder`` a checkpoint; every other file must be there.

    Raises:
        CheckpointError: a file is missing, or the training log is empty.
        StorageError: disk full or not writable.
    """
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    log = read_training_log(folder / TRAINING_LOG)
    if missing or not log:
        raise CheckpointError(f"{folder}: training left no {', '.join(missing) or 'step'}; run it again")
    write_json(folder / DOCUMENTS, {"digests": sorted(document_digests)})
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "base_digest": base_digest,
            "tokenizer_digest": tokenizer_digest,
            "marker": dataclasses.asdict(marker) if marker else None,
            "spec": spec,
            "num_steps": len(log),
            "final_loss": log[-1]["loss"],
            "files": {path.name: _fingerprint(path) for path in files},
        },
    )


def _fingerprint(path: Path) -> JsonObject:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
