"""What a trial need not do because storage has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.storage import Storage
from pause_ray.data.shards import ShardSet
from pause_ray.data.spec import ShardJob
from pause_ray.evaluation.ledger import Ledger
from pause_ray.models.checkpoint import RunningTraining, training_folder
from pause_ray.text.tokenizer import Marker
from pause_ray.training.launch import train_digest
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.run import shares_on_storage, training_job
from pause_ray.trial.spec import TrialSpec
from tests.evaluation.answered_rows import row
from tests.evaluation.tiny import make_suite
from tests.trained import store_checkpoint
from tests.training.tiny_llama import make_rows, make_shards

pytestmark = pytest.mark.ray  # is imported, not started
STEPS = 8


def prepared(folder: Path, *, is_trained: bool) -> PreparedTrial:
    suite = make_suite(None, noise="Grass is green.", context_tokens=[200, 300]).resolved()
    data = {"model": {"source": "m"}, "eval": suite}
    if is_trained:
        corpus = {"sources": [{"path": "x"}], "objective": "language_modeling"}
        data |= {"corpus": corpus, "train": {"max_steps": STEPS, "zero": {"stage": 0}}}
    spec = TrialSpec.parse(data, origin="test")
    shards = None
    if spec.corpus:
        shards = ShardJob(spec=spec.corpus, prompt=spec.eval.prompt, policy=None, model_dir=folder, tokenizer_digest="t", seed=0)
    return PreparedTrial(spec=spec, digest="d", model_dir=folder, base_digest="b", marker=Marker((), None), shards=shards)


@pytest.mark.parametrize("is_trained", [False, True])
def test_of_cells_those_that_are_answered_and_have_a_score(tmp_path: Path, is_trained: bool) -> None:
    storage, trial = Storage.open(tmp_path / "runs"), prepared(tmp_path, is_trained=is_trained)
    shards = ShardSet.open(make_shards(tmp_path / "shards", make_rows(20))) if is_trained else None
    assert shares_on_storage(trial, shards=shards, storage=storage) == (0, 0)
    ledger = Ledger(storage.trials / trial.digest / "cells.jsonl")
    first, second, *_ = trial.cells
    ledger.append(row(0, "An answer.", cell_id=first.id))
    ledger.append(row(0, None, cell_id=second.id))
    assert shares_on_storage(trial, shards=shards, storage=storage) == (0, 1 / len(trial.cells))


def test_of_a_training_the_steps_to_its_last_checkpoint_and_all_of_a_finished_one(tmp_path: Path) -> None:
    storage, trial = Storage.open(tmp_path / "runs"), prepared(tmp_path, is_trained=True)
    shards = ShardSet.open(make_shards(tmp_path / "shards", make_rows(20)))
    job = training_job(trial, shards)
    assert job is not None
    folder = storage.checkpoints / train_digest(job)
    running = RunningTraining(folder=training_folder(folder), belongs_to={})
    running.save(2, write_tensors=lambda path: path.write_bytes(b""), log_rows=[], facts={}, keep_last=1)
    assert shares_on_storage(trial, shards=shards, storage=storage) == (2 / STEPS, 0)
    store_checkpoint(folder)
    assert shares_on_storage(trial, shards=shards, storage=storage) == (1, 0)
