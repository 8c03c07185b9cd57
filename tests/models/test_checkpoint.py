"""Properties of checkpoint folders: whole or not there, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pause_ray.core.errors import CheckpointError, StorageError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, building, is_complete, read_json, read_json_lines, write_json
from pause_ray.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DOCUMENTS,
    STATE_TENSORS,
    TOKENIZER,
    TRAINING_LOG,
    Checkpoint,
    RunningTraining,
    copy_tokenizer,
    seal,
)
from pause_ray.text.tokenizer import MarkerToken

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
        Checkpoint.open(make(tmp_path / "c")).check_fits(base_digest="base-b", tokenizer_digest="tok", marker=MARKER)


def test_an_adapter_trained_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer tok, .* other; put"):
        Checkpoint.open(make(tmp_path / "c")).check_fits(base_digest="base-a", tokenizer_digest="other", marker=MARKER)


def test_a_trained_marker_fits_itself_and_no_pauses_but_no_other(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "c"))
    checkpoint.check_fits(base_digest="base-a", tokenizer_digest="tok", marker=MARKER)
    checkpoint.check_fits(base_digest="base-a", tokenizer_digest="tok", marker=None)
    with pytest.raises(CheckpointError, match="<THINK>"):
        checkpoint.check_fits(
            base_digest="base-a", tokenizer_digest="tok", marker=MarkerToken(text="<THINK>", token_id=12, added=True, initial_ids=(3,))
        )


def test_an_adapter_without_marker_row_does_not_fit_a_marker_that_needs_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "c", marker=None))
    checkpoint.check_fits(base_digest="base-a", tokenizer_digest="tok", marker=None)
    with pytest.raises(CheckpointError, match="no marker row"):
        checkpoint.check_fits(base_digest="base-a", tokenizer_digest="tok", marker=MARKER)


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
from pause_ray.core.storage import building
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
    assert read_json_lines(log) == []
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_json_lines(log) == [{"step": 1, "loss": 2.0}]


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


TRAINING = {"train": {"max_steps": 9, "lora": {"rank": 4}}, "tokenizer": "tok", "seed": 0}


def training_in(folder: Path, **changes: object) -> RunningTraining:
    return RunningTraining(folder=folder, belongs_to={**TRAINING, **changes})


def save_step(training: RunningTraining, step: int, *, validation_loss: float | None = None, keep_last: int = 2) -> None:
    measured = {} if validation_loss is None else {"validation_loss": validation_loss}
    training.save(
        step,
        write_tensors=lambda path: path.write_bytes(bytes([step]) * 50) and None,
        log_rows=[*({"step": number, "loss": 1.0} for number in range(1, step)), {"step": step, "loss": 0.5, **measured}],
        facts={"applied_steps": step},
        keep_last=keep_last,
    )


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_running_training_goes_on_from_its_last_step(tmp_path: Path) -> None:
    training = training_in(tmp_path / "t")
    assert (training.latest(), training.last_step()) == (None, 0)
    for step in (2, 10, 9):
        save_step(training, step, keep_last=3)
    saved = training.latest()
    assert saved is not None
    assert (saved.step, saved.facts, training.last_step()) == (10, {"applied_steps": 10}, 10)
    assert saved.tensors.read_bytes() == bytes([10]) * 50
    assert [row["step"] for row in saved.log_rows()] == list(range(1, 11))


def test_what_a_killed_process_half_wrote_or_half_removed_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    training = training_in(tmp_path)
    save_step(training, 1)
    for name in ("step-2", ".step-3.77-00ff00ff.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    assert training.last_step() == 1
    save_step(training, 4)
    assert kept(tmp_path) == {"step-1", "step-4"}


def test_the_last_ones_and_the_best_one_are_kept(tmp_path: Path) -> None:
    training = training_in(tmp_path)
    for step, loss in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None), (6, None)]:
        save_step(training, step, validation_loss=loss)
    assert kept(tmp_path) == {"step-2", "step-5", "step-6"}
    save_step(training, 7, validation_loss=0.5)
    assert kept(tmp_path) == {"step-6", "step-7"}


@pytest.mark.parametrize("name", [STATE_TENSORS, TRAINING_LOG, MANIFEST])
@pytest.mark.parametrize("damage", ["edited", "truncated", "removed"])
def test_a_damaged_step_is_refused_and_the_remedy_goes_on_from_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    training = training_in(tmp_path)
    save_step(training, 3)
    save_step(training, 6)
    path = tmp_path / "step-6" / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content.replace(content[:1], b"#", 1))
    if (name, damage) == (MANIFEST, "removed"):
        assert training.last_step() == 3, "without a manifest it does not exist"
        return
    with pytest.raises(CheckpointError, match=rf"{name}: .*; remove {tmp_path / 'step-6'} to go on from the one before"):
        training.latest()
    shutil.rmtree(tmp_path / "step-6")
    assert training.last_step() == 3


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    training = training_in(tmp_path)
    save_step(training, 3)
    path = tmp_path / "step-3" / MANIFEST
    write_json(path, read_json(path) | {"step": 8})
    with pytest.raises(CheckpointError, match="step-3"):
        training.latest()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"max_steps": 9, "lora": {"rank": 8}}}, r"its train\.lora\.rank is 4, here it is 8"),
        ({"tokenizer": "other"}, r"its tokenizer is tok, here it is other"),
        ({"seed": 1}, r"its seed is 0, here it is 1"),
    ],
)
def test_a_step_of_another_training_is_refused_naming_the_difference(tmp_path: Path, changes: JsonObject, named: str) -> None:
    save_step(training_in(tmp_path), 3)
    with pytest.raises(CheckpointError, match=f"{named}.*remove"):
        training_in(tmp_path, **changes).latest()


def test_a_step_of_another_format_is_refused(tmp_path: Path) -> None:
    training = training_in(tmp_path)
    save_step(training, 3)
    path = tmp_path / "step-3" / MANIFEST
    write_json(path, read_json(path) | {"format": 99})
    with pytest.raises(CheckpointError, match="format 99"):
        training.latest()


def test_a_process_killed_while_it_saves_a_step_leaves_the_one_before(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.models.test_checkpoint import save_step, training_in
training = training_in(Path({str(tmp_path)!r}))
save_step(training, 3)
def die(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
training.save(6, write_tensors=die, log_rows=[], facts={{}}, keep_last=1)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == -signal.SIGKILL
    training = training_in(tmp_path)
    assert training.last_step() == 3
    save_step(training, 6, keep_last=1)
    assert kept(tmp_path) == {"step-6"}


def test_a_disk_that_is_too_small_for_a_step_leaves_the_one_before(small_disk: Path) -> None:
    training = training_in(small_disk / "t")
    save_step(training, 3)
    with pytest.raises(StorageError, match="disk is full"):
        training.save(6, write_tensors=lambda path: path.write_bytes(bytes(2_000_000)) and None, log_rows=[], facts={}, keep_last=1)
    assert training.last_step() == 3
    assert kept(small_disk / "t") == {"step-3"}
