"""Properties of checkpoint folders: whole or not there, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pause_ray.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DOCUMENTS,
    TOKENIZER,
    TRAINING_LOG,
    Checkpoint,
    copy_tokenizer,
    read_training_log,
    seal,
)
from pause_ray.errors import CheckpointError, StorageError
from pause_ray.storage import MANIFEST, building, is_complete, read_json, write_json
from pause_ray.text.tokens import MarkerToken

MARKER = MarkerToken(text="<PAUSE>", token_id=12, added=True, initial_ids=(3, 4))


def write_files(folder: Path) -> None:
    (folder / ADAPTER_CONFIG).write_text("{}")
    (folder / ADAPTER_WEIGHTS).write_bytes(bytes(range(100)))
    (folder / TOKENIZER).write_text("{}")
    (folder / TRAINING_LOG).write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n')


def make(folder: Path, *, marker: MarkerToken | None = MARKER) -> Path:
    with building(folder) as scratch:
        write_files(scratch)
        seal(
            scratch, base_digest="base-a", tokenizer_digest="tok", marker=marker, spec={"seed": 3}, document_digests=frozenset({"d2", "d1"})
        )
    return folder


@pytest.mark.parametrize("marker", [None, MARKER])
def test_what_is_sealed_is_opened(tmp_path: Path, marker: MarkerToken | None) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "c", marker=marker))
    assert (checkpoint.base_digest, checkpoint.tokenizer_digest, checkpoint.marker) == ("base-a", "tok", marker)
    assert (checkpoint.num_steps, checkpoint.final_loss, checkpoint.spec) == (2, 1.25, {"seed": 3})
    assert [row["loss"] for row in checkpoint.losses()] == [2.5, 1.25]
    assert checkpoint.document_digests == {"d1", "d2"}


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER, TRAINING_LOG, DOCUMENTS])
@pytest.mark.parametrize("damage", ["edited", "truncated", "removed"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = make(tmp_path / "c") / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(tmp_path / "c")


def test_another_format_is_refused(tmp_path: Path) -> None:
    manifest = make(tmp_path / "c") / MANIFEST
    write_json(manifest, read_json(manifest) | {"format": 99})
    with pytest.raises(CheckpointError, match="format 99"):
        Checkpoint.open(tmp_path / "c")


def test_an_unreadable_manifest_is_a_checkpoint_error(tmp_path: Path) -> None:
    (make(tmp_path / "c") / MANIFEST).write_text('{"format": 1, "fil')
    with pytest.raises(CheckpointError, match=MANIFEST):
        Checkpoint.open(tmp_path / "c")


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base-a.*base-b"):
        Checkpoint.open(make(tmp_path / "c")).check_fits(base_digest="base-b", marker=MARKER)


def test_a_trained_marker_fits_itself_and_no_pauses_but_no_other(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "c"))
    checkpoint.check_fits(base_digest="base-a", marker=MARKER)
    checkpoint.check_fits(base_digest="base-a", marker=None)
    with pytest.raises(CheckpointError, match="<THINK>"):
        checkpoint.check_fits(base_digest="base-a", marker=MarkerToken(text="<THINK>", token_id=12, added=True, initial_ids=(3,)))


def test_an_adapter_without_marker_row_does_not_fit_a_marker_that_needs_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "c", marker=None))
    checkpoint.check_fits(base_digest="base-a", marker=None)
    with pytest.raises(CheckpointError, match="no marker row"):
        checkpoint.check_fits(base_digest="base-a", marker=MARKER)


@pytest.mark.parametrize("missing", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER, TRAINING_LOG])
def test_an_unfinished_folder_is_not_sealed(tmp_path: Path, missing: str) -> None:
    write_files(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        seal(tmp_path, base_digest="a", tokenizer_digest="t", marker=None, spec={}, document_digests=frozenset())
    assert not is_complete(tmp_path)


def test_a_full_disk_leaves_no_checkpoint_and_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(StorageError, match="disk is full"), building(folder) as scratch:
        (scratch / ADAPTER_WEIGHTS).symlink_to("/dev/full")
        (scratch / ADAPTER_WEIGHTS).write_bytes(b"x" * 4096)
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_before_sealing_leaves_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    code = f"""
import os, signal
from pathlib import Path
from pause_ray.storage import building
with building(Path({str(folder)!r})) as scratch:
    (scratch / {ADAPTER_WEIGHTS!r}).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir())
    assert not folder.exists()
    assert Checkpoint.open(make(folder)).final_loss == 1.25
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_growing_log_shows_its_complete_rows_only(tmp_path: Path) -> None:
    log = tmp_path / TRAINING_LOG
    assert read_training_log(log) == []
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_training_log(log) == [{"step": 1, "loss": 2.0}]


def save_tokenizer(folder: Path) -> int:
    """A word-level tokenizer with an end token; returns its number of entries."""
    import tokenizers

    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return int(tokenizer.get_vocab_size())


def test_the_tokenizer_of_an_added_marker_has_it_under_the_trained_id(tmp_path: Path) -> None:
    import tokenizers

    next_id = save_tokenizer(tmp_path / "base")
    (tmp_path / "c").mkdir()
    copy_tokenizer(tmp_path / "base", tmp_path / "c", marker=MarkerToken(text="<PAUSE>", token_id=next_id, added=True, initial_ids=(0,)))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "c" / TOKENIZER))
    assert tokenizer.encode("a<PAUSE>b").ids == [0, next_id, 1]
    assert (tmp_path / "c" / "tokenizer_config.json").is_file()


def test_without_an_added_marker_the_tokenizer_is_the_base_models_own(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base")
    (tmp_path / "c").mkdir()
    copy_tokenizer(tmp_path / "base", tmp_path / "c", marker=MarkerToken(text="<|end|>", token_id=3, added=False, initial_ids=(0,)))
    assert (tmp_path / "c" / TOKENIZER).read_bytes() == (tmp_path / "base" / TOKENIZER).read_bytes()


def test_an_added_marker_that_would_get_another_id_is_refused(tmp_path: Path) -> None:
    next_id = save_tokenizer(tmp_path / "base")
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match=str(next_id)):
        copy_tokenizer(
            tmp_path / "base", tmp_path / "c", marker=MarkerToken(text="<PAUSE>", token_id=next_id + 5, added=True, initial_ids=(0,))
        )


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_a_storage_error(tmp_path: Path, small_disk: Path) -> None:
    save_tokenizer(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("x" * 2_000_000)
    with pytest.raises(StorageError, match="disk is full"):
        copy_tokenizer(tmp_path / "base", small_disk, marker=None)


def test_what_rust_says_of_a_full_disk_is_a_storage_error(small_disk: Path) -> None:
    """Tokenizers and safetensors raise exceptions of their own, which are no OSErrors."""
    import numpy as np
    import safetensors.numpy
    import tokenizers

    vocabulary = {f"word{number}": number for number in range(60_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    for save in (
        lambda folder: tokenizer.save(str(folder / TOKENIZER)),
        lambda folder: safetensors.numpy.save_file({"a": np.zeros(200_000)}, folder / ADAPTER_WEIGHTS),
    ):
        with pytest.raises(StorageError, match="disk is full"), building(small_disk / "c") as scratch:
            save(scratch)
        assert list(small_disk.iterdir()) == []
