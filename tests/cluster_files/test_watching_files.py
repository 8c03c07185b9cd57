"""The dashboard shows every figure that a sweep gives out and no other; Prometheus finds the nodes, on machines and on Kubernetes."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from pause_ray.core.process import Stage
from pause_ray.evaluation.cell_scheduler import Purpose
from pause_ray.sweep.status import METRICS
from tests.cluster_files.autoscaler import CLUSTER, ROOT

DASHBOARD: dict[str, Any] = json.loads((CLUSTER / "grafana" / "pause_ray.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GRID_WIDTH = 24
WORDS = {"sum", "max", "min", "by", "rate", "asked", "state", "sweep", "label_values", "grid", "done", "failed"}
"""Of queries, besides names of metrics: functions, labels and their values."""


def expressions() -> Iterator[str]:
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    variables = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    named = set(re.findall(r"\bray_\w+", " ".join(expressions())))
    assert named == {metric.exported for metric in METRICS}
    assert set(re.findall(r"\bray_\w+", " ".join(variables))) <= named


@pytest.mark.parametrize("expr", sorted(set(expressions())))
def test_a_query_uses_only_what_there_is(expr: str) -> None:
    unknown = set(re.findall(r"[a-z_]{2,}", re.sub(r"\[[^]]*\]|\$\w+|ray_\w+", "", expr))) - WORDS
    assert unknown == set()
    assert expr.count("(") == expr.count(")")
    assert expr.count("{") == expr.count("}")
    for metric in METRICS:
        for selected in re.findall(rf"{metric.exported}\{{([^}}]*)\}}", expr):
            assert set(re.findall(r"(\w+)=", selected)) <= {"sweep", *metric.labels}
        if metric.counts and metric.exported in expr:
            assert f"rate({metric.exported}" in expr, "what only rises is shown by its rate"


def test_panels_are_whole_and_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert {json.dumps(one["datasource"]) for one in (panel, *panel["targets"])} == {'{"type": "prometheus", "uid": "${datasource}"}'}
        at = panel["gridPos"]
        place = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert place
        assert all(x < GRID_WIDTH for x, _ in place)
        assert taken.isdisjoint(place), panel["title"]
        taken |= place
    assert {one["name"] for one in DASHBOARD["templating"]["list"]} == {"datasource", "sweep"}
    assert DASHBOARD["uid"]
    assert "id" not in DASHBOARD, "Grafana gives it"


def test_a_label_of_a_legend_is_one_that_the_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \({label}\)", target["expr"]), panel["title"]


def test_the_document_names_every_metric_label_and_state() -> None:
    text = (ROOT / "docs" / "watching.md").read_text()
    table = text[text.index("| metric | is |") : text.index("Compute speeds in Prometheus")]
    named = {name: tuple(filter(None, labels.split(","))) for name, labels in re.findall(r"`(ray_pause_ray_\w+)(?:\{(\w+)\})?`", table)}
    assert named == {metric.exported: metric.labels for metric in METRICS}
    [trials] = [line for line in table.splitlines() if "ray_pause_ray_trials" in line]
    assert set(re.findall(r"`([a-z_]+)`", trials)) == set(Stage)
    assert set(re.findall(r"`(grid|proxy|numerics_check)`", table)) == set(typing.get_args(Purpose))


def test_prometheus_asks_the_head_and_reads_the_token_from_a_file() -> None:
    [job] = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())["scrape_configs"]
    [discovery] = job["http_sd_configs"]
    assert discovery["url"].endswith("/api/prometheus/sd")
    assert set(discovery["authorization"]) == {"credentials_file"}


def test_on_kubernetes_prometheus_gets_the_port_that_every_ray_pod_serves_and_no_other() -> None:
    monitor, policy = yaml.safe_load_all((CLUSTER / "kuberay" / "podmonitor.yaml").read_text())
    cluster = yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    served = {
        port["containerPort"]
        for group in groups
        for port in group["template"]["spec"]["containers"][0]["ports"]
        if port["name"] == endpoint["port"]
    }
    [number] = served
    assert {group["rayStartParams"]["metrics-export-port"] for group in groups} == {str(number)}
    assert all(any(port["containerPort"] == number for port in group["template"]["spec"]["containers"][0]["ports"]) for group in groups)
    [rule] = policy["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [number]
    assert policy["spec"]["podSelector"] == monitor["spec"]["selector"]
    namespaces = {one["metadata"]["namespace"] for one in (monitor, policy, cluster)}
    assert namespaces == {"pause-ray"}
