"""Whether a cluster file offers what trials take: every node type that Ray could give them is held against the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pause_ray.cli.main import app
from pause_ray.engines.cost import ModelShape
from pause_ray.engines.published import PUBLISHED
from pause_ray.errors import SpecError
from pause_ray.offers import Offer, misfits, read_offers
from pause_ray.plan import Grid, Plan, Rows, Site, grid_of, make_plan, read_gpus
from pause_ray.spec import JsonObject, with_overrides
from pause_ray.trial.spec import TrialSpec
from tests.sweep.stubs import write_stub_sweep
from tests.sweep.test_spec import SWEEP
from tests.test_plan import TINY

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
LARGE = ModelShape.from_config(list(PUBLISHED.values())[-1])
TABLE = {gpu.name: gpu for gpu in read_gpus(CLUSTER / "gpus.yaml").gpus}
SIXTEEN: JsonObject = {
    "train.batch_size": 1,
    "train.accumulation": 16,
    "train.zero.stage": "auto",
    "train.gradient_checkpointing": True,
    "train.precision": "bfloat16",
    "model.dtype": "bfloat16",
    "resources.train_workers": 16,
    "resources.train_gpus_per_worker": 1,
    "resources.scoring_actors": {"min": 0, "max": 4},
    "resources.scoring_gpus_per_actor": 4,
}
"""Seventy billion parameters, trained and scored in turns."""


def trial(**changes: Any) -> TrialSpec:
    return TrialSpec.parse(with_overrides(SWEEP["trial"], {**SIXTEEN, **changes}), origin="test")


def plan_of(spec: TrialSpec, offer: Offer) -> Plan:
    assert offer.gpu is not None
    site = Site(
        gpu=TABLE[offer.gpu], gpus=spec.resources.worker_bounds[0], gpus_per_node=int(offer.gpus), utilization=0.4, network_gb_per_second=50
    )
    grid: Grid = grid_of(spec.eval, shape=LARGE, site=site, dtype="bfloat16")
    rows = Rows(longest_tokens=4096, mean_tokens=2048, learned_tokens=64)
    return make_plan("70B", shape=LARGE, train=spec.train, rows=rows, grid=grid, site=site)


def told(spec: TrialSpec, *offers: Offer) -> list[str]:
    plans = {offer.name: plan_of(spec, offer) for offer in offers if offer.gpu in TABLE}
    memory = {name: gpu.memory_gb for name, gpu in TABLE.items()}
    return misfits(spec, plans, offers=offers, memory_gb=memory, origin=Path("aws.yaml"))


def offer(gpu: str | None, *, gpus: float = 8, most: int = 2) -> Offer:
    return Offer(name=f"{gpu}x{gpus:g}", cpus=64, gpus=gpus, gpu=gpu, most=most)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_the_shipped_files_offer_what_the_largest_shipped_model_takes(name: str) -> None:
    offers = read_offers(CLUSTER / name)
    assert len({each.name for each in offers if each.gpus}) >= 3
    assert any(each.cpus and not each.gpus for each in offers)
    assert told(trial(), *offers) == []


def test_a_gpu_that_is_too_small_is_named_even_where_another_would_do() -> None:
    """Ray does not know what a training needs, and may give the small one."""
    on_four = trial(**{"resources.train_workers": 4})
    assert told(on_four, offer("H100")) == []
    found = told(on_four, offer("H100"), offer("RTX 4090"))
    assert found[0].startswith("aws.yaml: RTX 4090x8: its RTX 4090s have 24 GB, and the training does not fit; ")
    assert "for one copy of the model; set resources.scoring_gpus_per_actor to " in found[1]
    assert all(line.endswith("or take the node type out") for line in found)
    assert len(found) == 2


def test_a_node_type_that_nothing_of_the_trial_fits_on_may_be_as_small_as_it_likes() -> None:
    whole = trial(**{"resources.train_gpus_per_worker": 4, "resources.train_workers": 4})
    assert told(whole, offer("H100"), offer("RTX 4090", gpus=1)) == []


def test_a_piece_that_no_node_has_and_more_than_all_have_are_told() -> None:
    [alone] = told(trial(**{"resources.train_workers": 1, "resources.scoring_gpus_per_actor": 16}), offer("H200", most=4))[:1]
    assert alone.startswith("aws.yaml: a scoring actor takes 1 CPUs and 16 GPUs on one node, which no node type has")
    [together] = told(trial(), offer("H100", most=1))
    assert "a trial holds 16 GPUs at a time, and all nodes together have 8" in together


@pytest.mark.parametrize(
    ("gpu", "why"), [("RTX 9999", "its GPU RTX 9999 is in no table"), (None, "it has no label ray.io/accelerator-type")]
)
def test_a_gpu_whose_memory_nobody_knows_is_not_taken_for_large_enough(gpu: str | None, why: str) -> None:
    [found] = told(trial(), offer("H100"), offer(gpu))
    assert why in found


def offers_of(folder: Path, types: JsonObject, **content: Any) -> tuple[Offer, ...]:
    file = folder / "ray.yaml"
    file.write_text(yaml.safe_dump({"head_node_type": "head", "available_node_types": types, **content}, sort_keys=False))
    return read_offers(file)


def test_limits_are_those_that_ray_takes_where_the_file_has_none(tmp_path: Path) -> None:
    """Ray gives a type without ``max_workers`` that of the file, the head's 0, and the file 2."""
    types = {"head": {"resources": {}}, "free": {"resources": {"CPU": 4}}, "few": {"resources": {"CPU": 4}, "max_workers": 3}}
    assert [(its.name, its.most) for its in offers_of(tmp_path, types, max_workers=7)] == [("free", 7), ("few", 3)]
    assert [(its.name, its.most) for its in offers_of(tmp_path, types)] == [("free", 2), ("few", 2)]


def test_node_types_together_give_no_more_than_the_file_allows(tmp_path: Path) -> None:
    types = {
        name: {"resources": {"CPU": 64, "GPU": gpus}, "labels": {"ray.io/accelerator-type": "H100"}, "max_workers": 2}
        for name, gpus in (("four", 4), ("eight", 8))
    }
    assert told(trial(), *offers_of(tmp_path, types, max_workers=2)) == []
    [together] = told(trial(**{"resources.train_workers": 24, "train.accumulation": 24}), *offers_of(tmp_path, types, max_workers=3))
    assert "a trial holds 24 GPUs at a time, and all nodes together have 20" in together


@pytest.mark.parametrize("resources", [{}, None, {"GPU": 8}, {"CPU": "many"}])
def test_a_type_without_numbers_is_not_taken_for_one_without_cpus(tmp_path: Path, resources: JsonObject | None) -> None:
    """Ray fills them in from the kind of machine."""
    with pytest.raises(SpecError, match="node type big: resources has no number for CPU"):
        offers_of(tmp_path, {"big": {"resources": resources, "node_config": {"InstanceType": "p5.48xlarge"}}})


def test_answers_of_a_server_need_no_gpu() -> None:
    asked = {"kind": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "m", "api": "chat"}
    spec = TrialSpec.parse(with_overrides(SWEEP["trial"], {"train": None, "pauses": None, "engine": asked}), origin="test")
    assert misfits(spec, {}, offers=[Offer(name="cpu", cpus=4, gpus=0, gpu=None, most=1)], memory_gb={}, origin=Path("x")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x"}, "has neither available_node_types"),
        ({"spec": {"workerGroupSpecs": [{"groupName": "a", "maxReplicas": 1}]}}, "worker group a: 'template' is missing"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: JsonObject, message: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=message):
        read_offers(file)


def test_the_command_holds_a_sweep_against_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "sweep").mkdir()
    sweep = write_stub_sweep(tmp_path / "sweep")
    config = tmp_path / "sweep" / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **TINY}))
    file = tmp_path / "cluster.yaml"

    def check(resources: JsonObject) -> Result:
        kind = {"resources": resources, "labels": {"ray.io/accelerator-type": "RTX 4090"}, "max_workers": 1}
        file.write_text(yaml.safe_dump({"available_node_types": {"only": kind}}))
        return CliRunner().invoke(app, ["check", str(sweep), "--cluster-file", str(file), "--storage", str(tmp_path / "runs")])

    assert check({"CPU": 8, "GPU": 2}).exit_code == 0
    refused = check({"CPU": 8}).exception
    assert isinstance(refused, SpecError)
    assert "a scoring actor takes 1 CPUs and 1 GPUs on one node, which no node type has" in str(refused)
    assert not (tmp_path / "runs").exists()
