"""What Ray's autoscaler makes of the cluster files: which machines come for which work, and which go."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.cluster_files.autoscaler import ACCELERATOR, CLUSTER, ON_DEMAND, SPOT, VM_FILES, decide, gpu_names, read

pytestmark = pytest.mark.ray

EIGHT_TOGETHER = [({"CPU": 1, "GPU": 1}, {})] * 8
SOURCES = (*VM_FILES, "kuberay/raycluster.yaml")


@pytest.fixture(params=SOURCES)
def prepared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The configuration that the autoscaler works with."""
    if "kuberay" in request.param:
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

        cluster = next(yaml.safe_load_all((CLUSTER / request.param).read_text()))
        return _derive_autoscaling_config_from_ray_cr(cluster)
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(request.param))
    validate_config(config)
    return config


def test_nothing_is_started_for_nothing(prepared: dict[str, Any]) -> None:
    assert decide(prepared) == ({}, set(), 0)


def test_shards_and_trials_come_onto_a_machine_without_gpus_that_stays(prepared: dict[str, Any]) -> None:
    launched, _, impossible = decide(prepared, tasks=[({"CPU": 1}, {})] * 4)
    assert launched == {"cpu": 1}
    assert impossible == 0
    assert decide(prepared, tasks=[({"CPU": 1}, ON_DEMAND)])[0] == {"cpu": 1}


def test_one_gpu_comes_as_a_machine_with_one(prepared: dict[str, Any]) -> None:
    (launched, number), *more = decide(prepared, tasks=[({"CPU": 1, "GPU": 1}, {})])[0].items()
    assert (number, more) == (1, [])
    assert prepared["available_node_types"][launched]["resources"]["GPU"] == 1


def test_eight_gpus_together_come_as_one_machine_and_the_cheapest_that_has_them(prepared: dict[str, Any]) -> None:
    together = [({"CPU": 8, "GPU": 8}, {})]
    (launched, number), *more = decide(prepared, together=together)[0].items()
    types = prepared["available_node_types"]
    assert (number, more) == (1, [])
    price = {name: gpu["price_per_hour"] for name, gpu in gpu_names().items()}
    with_eight = [kind for kind in types.values() if kind["resources"].get("GPU") == 8]
    assert price[types[launched]["labels"][ACCELERATOR]] == min(price[kind["labels"][ACCELERATOR]] for kind in with_eight)


def test_gpus_are_asked_for_by_name_and_come_from_the_spot_market(prepared: dict[str, Any]) -> None:
    offered = {kind["labels"][ACCELERATOR] for kind in prepared["available_node_types"].values() if kind["resources"].get("GPU")}
    assert len(offered) > 1
    for name in offered:
        launched, _, _ = decide(prepared, tasks=[({"GPU": 1}, {ACCELERATOR: name, **SPOT})])
        assert [prepared["available_node_types"][kind]["labels"][ACCELERATOR] for kind in launched] == [name]
    assert decide(prepared, tasks=[({"GPU": 1}, {ACCELERATOR: "RTX 4090"})]) == ({}, set(), 1)
    assert decide(prepared, tasks=[({"GPU": 1}, ON_DEMAND)]) == ({}, set(), 1)


def test_no_more_machines_come_than_the_file_says(prepared: dict[str, Any]) -> None:
    launched, _, _ = decide(prepared, tasks=[({"CPU": 1, "GPU": 1}, {})] * 1000)
    assert sum(launched.values()) <= prepared["max_workers"]
    assert all(number <= prepared["available_node_types"][kind]["max_workers"] for kind, number in launched.items())


def test_idle_workers_go_and_the_head_never_does(prepared: dict[str, Any]) -> None:
    """The head has been idle for a day in both cases."""
    seconds = prepared["idle_timeout_minutes"] * 60
    workers = [kind for kind in prepared["available_node_types"] if kind != prepared["head_node_type"]]
    assert decide(prepared, idle=dict.fromkeys(workers, seconds - 1))[1] == set()
    assert decide(prepared, idle=dict.fromkeys(workers, seconds + 1))[1] == set(workers)


def test_no_work_comes_onto_the_head(prepared: dict[str, Any]) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0)) == (0, 0)
    assert head["max_workers"] == 0
    assert head["labels"] == ON_DEMAND


def test_every_gpu_on_offer_has_a_price(prepared: dict[str, Any]) -> None:
    for name, kind in prepared["available_node_types"].items():
        has_gpus = bool(kind["resources"].get("GPU"))
        assert (kind["labels"].get(ACCELERATOR) in gpu_names()) == has_gpus, name
        assert kind["labels"]["ray.io/market-type"] == ("spot" if has_gpus else "on-demand")
        assert kind["min_workers"] == 0
