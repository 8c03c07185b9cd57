"""Checkpoint folders: finished adapters, and the saved steps of a running training. Files only; no model library.

A finished adapter, which an engine or plain PEFT loads (``Checkpoint``):

adapter_config.json, adapter_model.safetensors   as PEFT writes them (the marker's row is in the safetensors)
tokenizer.json, …                                the base tokenizer, with the marker where one was added
training.jsonl                                   one row per optimizer step: step, loss, learning_rate, …
documents.json                                   digests of the documents it was trained on
manifest.json                                    written last; without it the folder is no checkpoint

A saved step of a training that still runs (``SavedStep``), in ``.<digest>.training/step-N/`` beside the finished ones:

state.safetensors                                float32 masters and AdamW's moments, whole, by ``kind/parameter``
training.jsonl                                   the rows up to this step
manifest.json                                    identity of the training, the step, every file's digest

``.<digest>.after-N/`` is a finished ``Checkpoint`` of the adapter after N steps, from ``fit(job, until=N)``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_ray.core.errors import CheckpointError, StorageError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import (
    MANIFEST,
    building,
    file_sha256,
    is_complete,
    read_json,
    read_json_lines,
    space_errors,
    write_json,
    write_text,
)
from pause_ray.text.tokenizer import MarkerToken

FORMAT = 2
STATE_FORMAT = 1
STATE_TENSORS = "state.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINING_LOG = "training.jsonl"
STOP = "stop"
"""File whose presence asks a training for a last checkpoint and an end after the running step."""
DOCUMENTS = "documents.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that are copied where the base model has them, so that the folder works as a tokenizer folder."""
REQUIRED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINING_LOG, TOKENIZER)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished adapter. Only ``open`` makes one, so its files are complete."""

    folder: Path
    base_digest: str
    """``model_digest`` of the base model that the adapter was trained on."""
    tokenizer_digest: str
    """Digest of the base model's tokenizer."""
    marker: MarkerToken | None
    """The marker whose row was trained, or None when markers are ordinary text or there are none."""
    spec: JsonObject
    """The training's inputs: train spec, pause policy, shard set, seed."""
    num_steps: int
    """Number of optimizer steps."""
    final_loss: float
    """Mean loss per labelled token of the last step, in nats."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open the checkpoint in ``folder`` after comparing every file with the manifest.

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
        _check_files(folder, manifest["files"], remedy="remove the folder and run again")
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

    def check_fits(self, *, base_digest: str, tokenizer_digest: str, marker: MarkerToken | None) -> None:
        """Refuse to be used with another base model, tokenizer or marker than it was trained with.

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
        if tokenizer_digest != self.tokenizer_digest:
            raise CheckpointError(
                f"{self.folder}: trained with tokenizer {self.tokenizer_digest}, but the model here has {tokenizer_digest}; "
                f"put the {TOKENIZER} back that it was trained with, or train again"
            )
        if marker is not None and marker != self.marker:
            trained = "no marker row" if self.marker is None else f"the marker {self.marker.text!r} (token {self.marker.token_id})"
            raise CheckpointError(
                f"{self.folder}: trained with {trained}, but the pauses here are {marker.text!r} (token {marker.token_id}); "
                "use the pauses it was trained with, or train again"
            )

    @property
    def document_digests(self) -> frozenset[str]:
        """Digests of the documents that it was trained on, as in ``ShardSet.document_digests``."""
        return frozenset(read_json(self.folder / DOCUMENTS)["digests"])

    def losses(self) -> list[JsonObject]:
        """Return the rows of training.jsonl by step: ``step`` (from 1), ``loss`` in nats, ``learning_rate``, ``tokens`` and so on."""
        return read_json_lines(self.folder / TRAINING_LOG)


def copy_tokenizer(model_dir: Path, folder: Path, *, marker: MarkerToken | None) -> None:
    """Copy the base model's tokenizer into ``folder``; an added marker becomes a special token of it.

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
    log = read_json_lines(folder / TRAINING_LOG)
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
            "files": {path.name: _settled(path) for path in files},
        },
    )


def _settled(path: Path) -> JsonObject:
    """Return a file's fingerprint after forcing it to disk: a manifest must not survive a crash that its files did not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _fingerprint(path)


def _fingerprint(path: Path) -> JsonObject:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _check_files(folder: Path, fingerprints: Mapping[str, JsonObject], *, remedy: str) -> None:
    for name, expected in fingerprints.items():
        if not (folder / name).is_file() or _fingerprint(folder / name) != expected:
            raise CheckpointError(f"{folder / name}: missing or changed since it was written; {remedy}")


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """The state of a running training after one step. Only ``RunningTraining`` makes one, so its files are complete."""

    folder: Path
    step: int
    """Number of finished steps."""
    facts: JsonObject
    """State of the training beside its tensors, as plain JSON data."""

    @property
    def tensors(self) -> Path:
        """The safetensors file."""
        return self.folder / STATE_TENSORS

    def log_rows(self) -> list[JsonObject]:
        """Read the rows of the training log up to this step."""
        return read_json_lines(self.folder / TRAINING_LOG)


@dataclass(frozen=True, kw_only=True)
class RunningTraining:
    """The folder of a training's saved steps; only one process at a time may write there."""

    folder: Path
    belongs_to: JsonObject
    """Identity of the training: a saved step of another one is refused with the first difference."""

    def latest(self) -> SavedStep | None:
        """Return the last complete saved step after comparing its files with its manifest; a half-written one does not exist.

        Raises:
            CheckpointError: it is of another training or format, or a file is missing or was changed.
        """
        steps = self._steps()
        return self._open(steps[-1]) if steps else None

    def last_step(self) -> int:
        """Return the number of the last complete saved step; 0 without one."""
        return max(self._steps(), default=0)

    def save(
        self,
        step: int,
        *,
        write_tensors: Callable[[Path], None],
        log_rows: Sequence[Mapping[str, object]],
        facts: JsonObject,
        keep_last: int,
    ) -> None:
        """Save the state after ``step`` steps, then remove all but the last ones and the one with the best validation loss.

        Args:
            step: Steps done.
            write_tensors: Writes the safetensors file.
            log_rows: Rows of the training log; the last one may have a ``validation_loss``.
            facts: Plain JSON data, returned with the tensors.
            keep_last: How many of the last ones stay.

        Raises:
            StorageError: disk full or not writable; the earlier ones are still there.
        """
        with building(self._folder_of(step)) as scratch:
            write_tensors(scratch / STATE_TENSORS)
            write_text(scratch / TRAINING_LOG, "".join(json.dumps(row) + "\n" for row in log_rows))
            manifest = {
                "format": STATE_FORMAT,
                "step": step,
                "belongs_to": self.belongs_to,
                "facts": facts,
                "validation_loss": log_rows[-1].get("validation_loss") if log_rows else None,
                "files": {name: _settled(scratch / name) for name in (STATE_TENSORS, TRAINING_LOG)},
            }
            write_json(scratch / MANIFEST, manifest | {"digest": digest(manifest)})
        self._remove_all_but(keep_last)

    def _steps(self) -> list[int]:
        """Return the steps with a complete folder, ascending."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        named = (re.fullmatch(r"step-(\d+)", name) for name in names if is_complete(self.folder / name))
        return sorted(int(match[1]) for match in named if match)

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _open(self, step: int) -> SavedStep:
        folder = self._folder_of(step)
        remedy = f"remove {folder} to go on from the one before, or {self.folder} to start anew"
        try:
            manifest = read_json(folder / MANIFEST)
        except StorageError as error:
            raise CheckpointError(f"{folder / MANIFEST}: cannot be read; {remedy}") from error
        if manifest.get("format") != STATE_FORMAT:
            raise CheckpointError(f"{folder}: format {manifest.get('format')!r}, this version reads {STATE_FORMAT}; {remedy}")
        if manifest.pop("digest", None) != digest(manifest) or manifest["step"] != step:
            raise CheckpointError(f"{folder / MANIFEST}: changed since it was written; {remedy}")
        difference = _first_difference(manifest["belongs_to"], self.belongs_to)
        if difference:
            raise CheckpointError(f"{folder}: checkpoint of another training ({difference}); {remedy}")
        _check_files(folder, manifest["files"], remedy=remedy)
        return SavedStep(folder=folder, step=step, facts=manifest["facts"])

    def _remove_all_but(self, keep_last: int) -> None:
        steps = self._steps()
        losses = {step: read_json(self._folder_of(step) / MANIFEST)["validation_loss"] for step in steps}
        measured = [step for step in steps if losses[step] is not None]
        kept = {*steps[-keep_last:], *([min(measured, key=lambda step: losses[step])] if measured else [])}
        for folder in {*self.folder.iterdir()} - {self._folder_of(step) for step in kept}:  # also what a killed training half wrote
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed checkpoint counts as absent
            shutil.rmtree(folder, ignore_errors=True)


def training_folder(checkpoint: Path) -> Path:
    """Return the folder of saved steps of the training that will make ``checkpoint``."""
    return checkpoint.with_name(f".{checkpoint.name}.training")


def partial_folder(checkpoint: Path, *, step: int) -> Path:
    """Return the folder of the adapter after ``step`` steps of the training that will leave ``checkpoint``."""
    return checkpoint.with_name(f".{checkpoint.name}.after-{step}")


def remove_training(checkpoint: Path) -> None:
    """Remove the training's own checkpoints and its adapters after fewer steps, which a finished training no longer needs."""
    for folder in (training_folder(checkpoint), *checkpoint.parent.glob(f".{checkpoint.name}.after-*")):
        shutil.rmtree(folder, ignore_errors=True)


def _first_difference(saved: JsonObject, wanted: JsonObject, *, path: str = "") -> str | None:
    """Return where two nested mappings differ, as text."""
    for key in sorted({*saved, *wanted}):
        ours, theirs = wanted.get(key), saved.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            if found := _first_difference(theirs, ours, path=f"{path}{key}."):
                return found
        elif ours != theirs:
            return f"its {path}{key} is {theirs}, here it is {ours}"
    return None
