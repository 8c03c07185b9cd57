"""docs/security.md: what it names is there, and what it says of the program is so."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import pytest

from pause_ray.core.errors import ModelError, SourceError, SpecError
from pause_ray.core.files import parse_package_source
from pause_ray.sweep.spec import expand, read_sweep
from tests.cluster_files.autoscaler import CLUSTER, ROOT
from tests.evaluation.tiny import make_tokenizer_folder

TEXT = (ROOT / "docs" / "security.md").read_text()
PACKAGE = sorted((ROOT / "pause_ray").rglob("*.py"))


def test_the_tests_it_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", TEXT))
    assert named
    assert named <= {path.name for path in Path(__file__).parent.glob("test_*.py")}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.yaml|kuberay/|mlflow/)`", TEXT))))
def test_the_files_it_names_exist(name: str) -> None:
    assert (CLUSTER / name).exists()


@functools.cache
def calls() -> list[tuple[str, ast.Call]]:
    """(file, call) of the whole package."""
    nodes = [(path.name, node) for path in PACKAGE for node in ast.walk(ast.parse(path.read_text()))]
    return [(name, node) for name, node in nodes if isinstance(node, ast.Call)]


@pytest.mark.seconds
def test_no_model_brings_code() -> None:
    """``trust_remote_code`` is nowhere but false, and where weights are loaded from somebody's folder it is said."""
    said = [(name, keyword.value) for name, call in calls() for keyword in call.keywords if keyword.arg == "trust_remote_code"]
    assert said
    assert all(isinstance(value, ast.Constant) and value.value is False for _, value in said)
    for name, call in calls():
        loader = ast.unparse(call.func)
        if re.search(r"Auto(Model|Config)\w*\.from_pretrained$", loader):
            words = {keyword.arg for keyword in call.keywords}
            assert words & {"trust_remote_code", "gguf_file"}, f"{name}: {ast.unparse(call)}"


def test_a_model_that_brings_code_is_told_of_and_its_code_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pause_ray.models.sources import check_model_folder

    folder = make_tokenizer_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    for _ in range(2):
        check_model_folder(folder, weights=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} brings code of its own (AutoModelForCausalLM), which is never run here"
    ]


@pytest.mark.torch
def test_a_model_whose_kind_only_its_own_code_knows_is_refused(tmp_path: Path) -> None:
    from pause_ray.models.weights import empty_base, load_base

    ran = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')")
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_its_own", "auto_map": own}))
    for load in (functools.partial(load_base, device="cpu"), empty_base):
        with pytest.raises(ModelError, match="a model's own is never run here"):
            load(tmp_path, dtype="float32", marker=None)
    assert not ran.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../elsewhere"},
        {"name": "a/b"},
        {"arm": "../arm"},
        {"trial.eval.name": "../suite"},
        {"trial.model.revision": "../../main"},
        {"trial.model.revision": "/etc"},
        {"trial.train.zero": {"stage": 2, "offload_optimizer": "nvme", "nvme_path": "../disk"}},
        {"trial.train.zero": {"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/mnt/../etc"}},
        {"trial.model.trust_remote_code": True},
    ],
    ids=str,
)
def test_no_name_in_a_spec_leads_out_of_the_storage_root(change: dict[str, object]) -> None:
    quickstart = ROOT / "sweeps" / "quickstart.yaml"
    expand(read_sweep(quickstart, {}))
    with pytest.raises(SpecError, match=next(iter(change)).rpartition(".")[2]):
        expand(read_sweep(quickstart, change))


@pytest.mark.parametrize("source", ["pypi:../x==1#a.txt", "pypi:x==../1#a.txt", "pypi:x==1#../a.txt", "pypi:x==1#/etc/passwd"])
def test_no_package_leads_out_of_its_folder(source: str) -> None:
    with pytest.raises(SourceError):
        parse_package_source(source)


def test_only_weights_and_texts_are_fetched_from_a_hub() -> None:
    from pause_ray.models import sources

    assert sources._HUB_FILES
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pkl", "*")) for pattern in sources._HUB_FILES)


def test_nothing_of_other_peoples_is_unpickled() -> None:
    """Where pickles are read, the same process group has written them a moment ago."""
    readers = {
        name for name, call in calls() if re.fullmatch(r"(pickle|cloudpickle)\.loads?|torch\.load|joblib\.load", ast.unparse(call.func))
    }
    assert readers <= {"runner.py", "pipeline.py", "trainable.py"}


def test_a_ray_of_its_own_has_no_dashboard() -> None:
    starts = [call for name, call in calls() if ast.unparse(call.func) == "ray.init" and name == "ray_cluster.py"]
    local = [call for call in starts if any(isinstance(word.value, ast.Constant) and word.value.value == "local" for word in call.keywords)]
    assert local
    for call in local:
        assert any(word.arg == "include_dashboard" and ast.unparse(word.value) == "False" for word in call.keywords)
