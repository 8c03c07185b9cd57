"""The exported trial is the best one, whole, and says how it can be used."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.spec import parse_assignments, read_yaml
from pause_ray.core.storage import Storage, exclusive, lock_of, write_json
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.models.spec import ModelSpec
from pause_ray.report.ranking import export_best, exported
from pause_ray.report.results import read_results
from pause_ray.text.pauses import PausePolicy
from pause_ray.trial.spec import TrialSpec, sparse_trial
from tests.stored_sweep import rows, store_sweep, store_trial
from tests.trained import store_checkpoint

ROOT = Path(__file__).resolve().parents[2]
GRID = {(1024, 10.0): 1.0, (1024, 50.0): 0.5}
PAUSES = {"unit": "paragraph", "every": 2, "marker": "<PAUSE>", "token": "added"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def tuned(storage: Storage, key: str, score: float, *, replicate: int = 0, model: dict[str, Any] | None = None) -> None:
    checkpoint = store_checkpoint(storage.checkpoints / f"{key}{key}")
    spec = {"model": model or {"source": "some/model"}, "pauses": PAUSES, "train": {"max_steps": 3}, "eval": {"max_new_tokens": 8}}
    folder = store_trial(storage, key, rows(dict.fromkeys(GRID, score), trial=key, replicate=replicate), trained=True, spec=spec)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**manifest, "checkpoint": str(checkpoint)})


def sweep(storage: Storage, **options: Any) -> Path:
    store_trial(storage, "b0", rows(dict.fromkeys(GRID, 0.5), trial="b0"))
    return store_sweep(storage, [("b0", "baseline", {}, 0), ("p0", "paused", {}, 0), ("q0", "other", {}, 0)], **options)


def test_the_best_trained_trial_is_exported_whole(storage: Storage) -> None:
    tuned(storage, "p0", 0.75)
    tuned(storage, "q0", 0.25)
    folder = export_best(read_results(sweep(storage), storage), storage)
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {"trial.json", "adapter", "README.md", "manifest.json"}
    assert Checkpoint.open(folder / "adapter").num_steps == 3
    assert json.loads((folder / "trial.json").read_text())["pauses"] == PAUSES
    manifest = exported(folder.parent)
    assert manifest is not None
    assert (manifest["trial"], manifest["condition"], manifest["value"]) == ("p0", "paused", 0.75)
    assert manifest["better_untrained"] is None
    readme = (folder / "README.md").read_text()
    assert all(words in readme for words in ("some/model", "pause-ray export adapter", "PeftModel", "<PAUSE>", "resize_token_embeddings"))
    [(module, name)] = re.findall(r"from (pause_ray\S*) import (\w+)", readme)
    assert importlib.util.find_spec(module) is not None
    assert f"class {name}:" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize(
    "model",
    [
        {"source": "pypi:some-model==1.0#some/model.gguf", "sha256": "a" * 64, "dtype": "float32", "revision": None},
        {"source": "some/model", "dtype": "bfloat16", "rope": {"kind": "dynamic", "factor": 2.0}},
    ],
)
def test_the_ways_to_use_it_are_those_of_its_model(storage: Storage, model: dict[str, Any]) -> None:
    tuned(storage, "p0", 0.75, model=model)
    folder = export_best(read_results(sweep(storage), storage), storage)
    assert folder is not None
    readme = (folder / "README.md").read_text()
    assert "PeftModel" not in readme  # transformers cannot load the one, and would load the other with other positions
    [line] = [line for line in readme.splitlines() if line.strip().startswith("pause-ray eval")]
    _, verb, suite, *options = shlex.split(line)
    assert verb == "eval"
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given["--model"] == model["source"]
    overrides = parse_assignments([value for name, value in zip(options[::2], options[1::2], strict=True) if name == "--set"])
    data = sparse_trial({"model": {"source": given["--model"]}, "eval": read_yaml(ROOT / suite)}, overrides, origin=ROOT / suite)
    asked = TrialSpec.parse(data, origin="README.md")
    assert asked.model == ModelSpec.parse(model, origin="model")
    assert asked.pauses == PausePolicy.parse(PAUSES, origin="pauses")


def test_an_untrained_arm_that_did_better_is_named(storage: Storage) -> None:
    tuned(storage, "p0", 0.25)
    folder = export_best(read_results(sweep(storage), storage), storage)
    assert folder is not None
    manifest = exported(folder.parent)
    assert manifest is not None
    assert (manifest["trial"], manifest["better_untrained"]) == ("p0", "baseline")
    assert "did better: baseline" in (folder / "README.md").read_text()


def test_a_sweep_that_trains_nothing_exports_a_spec_alone(storage: Storage) -> None:
    folder = export_best(read_results(sweep(storage), storage), storage)
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {"trial.json", "README.md", "manifest.json"}
    assert "PeftModel" not in (folder / "README.md").read_text()


def test_an_export_that_is_right_is_left_alone_and_a_better_trial_replaces_it(storage: Storage) -> None:
    tuned(storage, "p0", 0.5)
    folder = export_best(read_results(sweep(storage), storage), storage)
    assert folder is not None
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    export_best(read_results(folder.parent, storage), storage)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    tuned(storage, "q0", 1.0)
    export_best(read_results(folder.parent, storage), storage)
    manifest = exported(folder.parent)
    assert manifest is not None
    assert manifest["trial"] == "q0"


def test_two_commands_do_not_export_at_the_same_time(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    tuned(storage, "p0", 0.5)
    folder = sweep(storage)
    other = threading.Thread(target=export_best, args=(read_results(folder, storage), storage))
    with exclusive(lock_of(folder / "best")):
        other.start()
        while "waiting for process" not in caplog.text:
            assert other.is_alive()
            time.sleep(0.01)
        assert exported(folder) is None
    other.join()
    assert exported(folder) is not None


def test_an_adapter_that_is_gone_or_was_changed_is_said_and_not_exported(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    tuned(storage, "p0", 0.5)
    folder = sweep(storage)
    (storage.checkpoints / "p0p0" / "adapter_model.safetensors").write_bytes(b"something else")
    assert export_best(read_results(folder, storage), storage) is None
    assert "adapter_model.safetensors: missing or changed" in caplog.text
    shutil.rmtree(storage.checkpoints / "p0p0")
    assert export_best(read_results(folder, storage), storage) is None
    assert "p0p0: no finished checkpoint" in caplog.text
    assert exported(folder) is None


def test_an_adapter_is_found_where_the_storage_root_was_moved_to(storage: Storage, tmp_path: Path) -> None:
    tuned(storage, "p0", 0.5)
    folder = sweep(storage)
    moved = Storage(tmp_path.with_name("moved"))
    shutil.move(storage.root, moved.root)
    assert export_best(read_results(moved.sweeps / folder.name, moved), moved) is not None


def test_nothing_is_exported_while_nothing_has_finished(storage: Storage) -> None:
    assert export_best(read_results(store_sweep(storage, [("none", "baseline", {}, 0)]), storage), storage) is None
