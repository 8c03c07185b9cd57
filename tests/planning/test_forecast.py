"""A dry run lists every trial and step, finds what is on storage, and predicts what is left, without starting anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pause_ray.core import ray_cluster
from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, digest, with_overrides
from pause_ray.core.storage import Storage, write_json
from pause_ray.data.shards import ShardSet
from pause_ray.evaluation.ledger import Ledger
from pause_ray.planning.forecast import Effort, SweepForecast, TrialOutlook, forecast_sweep, total
from pause_ray.sweep.search import SearchLog, SweepTrial, SweepTrials
from pause_ray.sweep.spec import SweepSpec
from pause_ray.training.launch import train_digest
from pause_ray.trial.needs import GpuSpec, Hardware
from pause_ray.trial.run import training_job
from tests.evaluation.answered_rows import row
from tests.evaluation.tiny import STOCK, make_haystack_folder, make_suite, make_tokenizer_folder
from tests.planning.test_trial_forecast import SHAPE
from tests.training.tiny_llama import make_rows, make_shards

pytestmark = pytest.mark.ray
GPU = GpuSpec(
    name="H100",
    memory_gb=80,
    bf16_tflops=989,
    memory_gb_per_second=3350,
    link_gb_per_second=450,
    price_per_hour=2,
    price_source="here",
    price_date="2026-01-01",
)
STEPS = 4


def hardware(gpus: int = 1) -> Hardware:
    return Hardware(gpu=GPU, gpus=gpus, gpus_per_node=8, utilization=0.4, network_gb_per_second=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights of a few bytes, and texts."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("forecast")
    model = make_tokenizer_folder(folder / "model", limit_tokens=4000)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | SHAPE))
    save_file({"weight": np.zeros(4, np.float32)}, model / "model.safetensors")
    make_haystack_folder(folder / "essays")
    make_haystack_folder(folder / "training", num_documents=3)
    return folder


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("PAUSE_RAY_CACHE", str(tmp_path / "cache"))
    return Storage.open(tmp_path / "runs")


def sweep_of(folder: Path, **changes: object) -> SweepSpec:
    """Two ranks, a baseline."""
    needle = {"needle": "The key of {city} is {word}.", "question": "Which is the key of {city}?"}
    slots = {"city": ["Oslo", "Lima"], "word": ["elm", "oak"]}
    suite = make_suite(folder / "essays", context_tokens=[512, 1024, 2048]).resolved()
    trial = {
        "model": {"source": str(folder / "model"), "dtype": "float32"},
        "pauses": {"unit": "paragraph"},
        "corpus": {
            "sources": [{"path": str(folder / "training" / "*.txt")}],
            "facts": {"facts": [{**needle, "slots": slots}]},
            "sequence_len": 512,
            "min_context_tokens": 256,
            "num_sequences": 8,
        },
        "train": {"max_steps": STEPS, "micro_batch_size": 2, "gradient_accumulation_steps": 1},
        "eval": suite,
    }
    whole = {
        "name": "small",
        "trial": trial,
        "search": {"train.lora.rank": {"grid": [4, 8]}},
        "arms": {"baseline": {"pauses": None, "train": None}},
    }
    return SweepSpec.parse(with_overrides(whole, {path.replace("__", "."): value for path, value in changes.items()}), origin="test")


def look(sweep: SweepSpec, storage: Storage, *, at: Hardware | None = None) -> SweepForecast:
    import ray

    with pytest.MonkeyPatch.context() as without:  # whether other tests have a cluster in this process or not
        without.setattr(ray, "init", lambda *args, **options: pytest.fail("Ray was started"))
        without.setattr(ray_cluster, "connection", lambda: pytest.fail("Ray was asked for"))
        found = forecast_sweep(sweep, storage=storage, hardware=at, progress=lambda done, of: None)
    json.dumps(found.as_json(), allow_nan=False)
    return found


def trials_of(sweep: SweepSpec, storage: Storage) -> list[SweepTrial]:
    known = SweepTrials(sweep, storage=storage, command="", progress=lambda done, of: None)
    return list(known.by_digest.values())


def steps_of(trial: TrialOutlook) -> dict[str, tuple[int, int, bool]]:
    return {step.name: (step.done, step.total, step.made_by is not None) for step in trial.steps}


def store_rows(trial: SweepTrial, storage: Storage) -> None:
    assert trial.prepared.shards is not None
    make_shards(storage.shards / digest(trial.prepared.shards.identity()), make_rows(8))


def checkpoint_of(trial: SweepTrial, storage: Storage) -> Path:
    assert trial.prepared.shards is not None
    job = training_job(trial.prepared, ShardSet.open(storage.shards / digest(trial.prepared.shards.identity())))
    assert job is not None
    return storage.checkpoints / train_digest(job)


def answer(trial: SweepTrial, storage: Storage, *, cells: int, seconds: float = 0.5) -> None:
    place = storage.trials / trial.prepared.digest
    ledger = Ledger(place / "cells.jsonl")
    for number, cell in enumerate(trial.prepared.cells[:cells]):
        tokens = {"prompt_tokens": cell.context_tokens, "prefilled_tokens": cell.context_tokens}
        ledger.append(row(number, STOCK.needle, cell_id=cell.id, seconds=seconds, **tokens))
    write_json(place / "spec.json", trial.prepared.spec.resolved())


def finish(trial: SweepTrial, storage: Storage, *, checkpoint: Path | None) -> None:
    write_json(storage.trials / trial.prepared.digest / "manifest.json", {"checkpoint": str(checkpoint) if checkpoint else None})


def test_every_trial_and_step_is_listed_and_what_two_share_is_made_once(folder: Path, storage: Storage) -> None:
    found = look(sweep_of(folder), storage, at=hardware())
    assert [trial.label for trial in found.trials] == ["pause_tuned rank=4 #0", "pause_tuned rank=8 #0", "baseline #0"]
    assert [steps_of(trial) for trial in found.trials] == [
        {"data": (0, 8, False), "training": (0, STEPS, False), "scoring": (0, 9, False)},
        {"data": (0, 8, True), "training": (0, STEPS, False), "scoring": (0, 9, False)},
        {"scoring": (0, 9, False)},
    ]
    assert {trial.state for trial in found.trials} == {"not begun"}
    assert all((trial.left.seconds or 0) > 0 and (trial.left.cost or 0) > 0 for trial in found.trials)
    assert found.left == total(trial.left for trial in found.trials)
    assert not [folder for folder in (storage.trials, storage.shards, storage.checkpoints, storage.sweeps) if folder.exists()]


def test_what_is_on_storage_is_found_and_not_counted_again(folder: Path, storage: Storage) -> None:
    sweep = sweep_of(folder)
    fresh = look(sweep, storage, at=hardware())
    first, second, baseline = trials_of(sweep, storage)
    store_rows(first, storage)
    checkpoint = checkpoint_of(first, storage)
    write_json(checkpoint / "manifest.json", {})
    answer(first, storage, cells=3)
    answer(baseline, storage, cells=9)
    finish(baseline, storage, checkpoint=None)
    running = checkpoint_of(second, storage)
    write_json(running.with_name(f".{running.name}.training") / "step-3" / "manifest.json", {})
    found = look(sweep, storage, at=hardware())
    assert [trial.state for trial in found.trials] == ["begun", "begun", "finished"]
    assert [steps_of(trial) for trial in found.trials] == [
        {"data": (8, 8, False), "training": (STEPS, STEPS, False), "scoring": (3, 9, False)},
        {"data": (8, 8, False), "training": (3, STEPS, False), "scoring": (0, 9, False)},
        {"scoring": (9, 9, False)},
    ]
    assert found.trials[0].steps[1].left == found.trials[2].left == Effort()
    quarter, whole = found.trials[1].steps[1].left, fresh.trials[1].steps[1].left
    assert quarter.seconds == pytest.approx((whole.seconds or 0) / 4)
    assert 0 < (found.trials[0].left.tokens or 0) < (fresh.trials[0].steps[2].left.tokens or 0)


def test_the_same_training_for_two_questions_is_done_once(folder: Path, storage: Storage) -> None:
    sweep = sweep_of(folder, search={"eval.max_new_tokens": {"grid": [8, 16]}})
    assert [steps_of(trial).get("training") for trial in look(sweep, storage, at=hardware()).trials[:2]] == [
        (0, STEPS, False),
        (0, STEPS, True),
    ]


def test_times_are_those_of_the_same_model_before_or_not_told(folder: Path, storage: Storage) -> None:
    sweep = sweep_of(folder)
    untold = look(sweep, storage)
    assert untold.left.seconds is None
    assert (untold.left.flops or 0) > 0
    assert "no trial of this model has run" in untold.throughput
    first, _, baseline = trials_of(sweep, storage)
    store_rows(first, storage)
    checkpoint = checkpoint_of(first, storage)
    write_json(checkpoint / "manifest.json", {})
    (checkpoint / "training.jsonl").write_text("".join(json.dumps({"step": n, "tokens": 600, "seconds": 3.0}) + "\n" for n in range(STEPS)))
    for trial in (first, baseline):
        answer(trial, storage, cells=9)
    finish(first, storage, checkpoint=checkpoint)
    found = look(sweep, storage)
    assert found.throughput.startswith(f"by the speed of {STEPS} training steps and 18 answers of this model")
    training = found.trials[1].steps[1]
    assert training.left.seconds == pytest.approx((training.left.tokens or 0) * 3.0 / 600)
    alone = sum(0.5 for _ in range(9))
    assert 0 < (found.trials[1].steps[2].left.seconds or 0) < alone  # prompts that share their beginnings are computed once


def test_a_model_whose_weights_are_not_here_is_planned_all_the_same(folder: Path, storage: Storage, tmp_path: Path) -> None:
    sweep = sweep_of(folder, trial__model__source=str(make_bare(folder / "model", tmp_path / "bare")))
    found = look(sweep, storage, at=hardware())
    assert {trial.digest for trial in found.trials} == {None}
    assert (found.left.seconds or 0) > 0


def make_bare(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_search_that_learns_is_told_by_an_example(folder: Path, storage: Storage) -> None:
    algorithm: JsonObject = {"kind": "tpe", "points": 10, "random_points": 2}
    sweep = sweep_of(folder, search={"train.lora.rank": {"int": [2, 32]}}, algorithm=algorithm)
    found = look(sweep, storage, at=hardware())
    assert [trial.arm for trial in found.trials] == ["baseline"]
    assert (found.points_to_come, [trial.arm for trial in found.example]) == (10, ["pause_tuned"])
    one = found.example[0].left.tokens or 0
    assert found.left.tokens == (found.trials[0].left.tokens or 0) + 10 * one
    known = SweepTrials(sweep, storage=storage, command="", progress=lambda done, of: None)
    SearchLog(known.folder).append({"event": "asked", "round": 0, "points": [{"train.lora.rank": 5}]})
    asked = look(sweep, storage, at=hardware())
    assert [trial.label for trial in asked.trials] == ["baseline #0", "pause_tuned rank=5 #0"]
    assert asked.points_to_come == 9


def test_stopped_points_are_left_out_in_all_arms(folder: Path, storage: Storage) -> None:
    sweep = sweep_of(
        folder,
        trial__train__max_steps=27,
        trial__corpus__num_sequences=54,
        scheduler={"kind": "asha", "grace_period": 3},
        arms__bare={"pauses": None},
    )
    known = SweepTrials(sweep, storage=storage, command="", progress=lambda done, of: None)
    stopped = next(key for key, trial in known.by_digest.items() if trial.planned.label == "pause_tuned rank=4 #0")
    event = {"event": "stopped", "trial": stopped, "point": {"train.lora.rank": 4}, "rung": 0, "by": "asha"}
    SearchLog(known.folder).append(event)
    states = {trial.label: trial.state for trial in look(sweep, storage, at=hardware()).trials}
    assert states == {
        "pause_tuned rank=4 #0": "stopped",
        "pause_tuned rank=8 #0": "not begun",
        "baseline #0": "not begun",
        "bare rank=4 #0": "stopped",
        "bare rank=8 #0": "not begun",
    }


def test_a_mistake_is_told_before_anything_is_built(folder: Path, storage: Storage) -> None:
    with pytest.raises(SpecError, match="no trial reads"):
        look(sweep_of(folder, trial__train=None), storage)


def test_sums_of_what_is_not_known_are_not_known() -> None:
    one = Effort(tokens=1, flops=2.0, seconds=None, cost=0.5)
    assert total([one, one]) == Effort(tokens=2, flops=4.0, seconds=None, cost=1.0)
    assert total([]) == Effort()
