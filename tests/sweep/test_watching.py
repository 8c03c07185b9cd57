"""A sweep on a real cluster, watched: what storage tells from beside, what Prometheus gets of the nodes, and what their logs say."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pause_ray.core.storage import Storage, read_json_lines
from pause_ray.evaluation.ledger import Ledger
from pause_ray.report.overview import SweepStatus, sweep_status
from pause_ray.sweep.status import METRICS
from tests.cluster_files.autoscaler import CLUSTER
from tests.real_cluster import RealCluster, running_cluster
from tests.sweep.stubs import ROOT, write_stub_sweep

pytestmark = pytest.mark.ray

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name, our labels) → the value, of all nodes together."""
LABELS = ("asked", "state")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the raylets' workers: the stubs are no installed package
        with running_cluster(tmp_path_factory.mktemp("cluster"), workers=1) as found:
            yield found


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stub_sweep(tmp_path_factory.mktemp("stubbed"))


@contextlib.contextmanager
def driver(cluster: RealCluster, sweep: Path, storage: Path, *, cell_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """``pause-ray sweep`` with stubs, which joins the cluster as a job does."""
    command = [sys.executable, "-m", "tests.sweep.stubs", f"--cell-seconds={cell_seconds}", "--step-seconds=0.1", "--"]
    command += ["sweep", str(sweep), "--storage", str(storage)]
    mlflow = f"sqlite:///{storage}/mlflow.db"
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.gcs, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": mlflow}
    process = subprocess.Popen(
        command, cwd=sweep.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(look: Callable[[], Any], process: subprocess.Popen[str] | None = None, *, seconds: float = 240) -> Any:
    """The first thing that is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.2)
    return found


def status_of(storage: Path) -> SweepStatus | None:
    folders = [path.parent for path in storage.glob("sweeps/*/sweep.json")]
    return sweep_status(folders[0], Storage(storage)) if folders else None


def scraped(cluster: RealCluster, sweep: str) -> Samples:
    """What every node serves of a sweep, found in the way that ``cluster/prometheus.yml`` says; the figures without a token."""
    [job] = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())["scrape_configs"]
    path = job["http_sd_configs"][0]["url"].removeprefix("http://127.0.0.1:8265")
    authorized = {"Authorization": f"Bearer {cluster.token}"}
    groups = requests.get(f"{cluster.address}{path}", headers=authorized, timeout=120).json()
    found: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for target in {target for group in groups for target in group["targets"]}:
        with contextlib.suppress(requests.ConnectionError):  # the autoscaler's and the dashboard's own, where they are off
            for family in text_string_to_metric_families(requests.get(f"http://{target}/metrics", timeout=120).text):
                for sample in family.samples:
                    if sample.labels.get("sweep") == sweep:
                        labels = tuple((name, sample.labels[name]) for name in LABELS if name in sample.labels)
                        found[sample.name, labels] += sample.value
    return dict(found)


def expected_counts(storage: Path) -> Samples:
    """As ledgers and training logs have it."""
    rows = [row for path in storage.glob("trials/*/cells.jsonl") for row in Ledger(path).rows()]
    steps = [step for path in storage.glob("checkpoints/*/training.jsonl") for step in read_json_lines(path)]
    grid = (("asked", "grid"),)
    return {
        ("ray_pause_ray_cells_total", grid): len(rows),
        ("ray_pause_ray_prefilled_tokens_total", grid): sum(row.prefilled_tokens for row in rows),
        ("ray_pause_ray_decoded_tokens_total", grid): sum(row.decoded_tokens for row in rows),
        ("ray_pause_ray_trained_steps_total", ()): len(steps),
        ("ray_pause_ray_trained_tokens_total", ()): sum(step["tokens"] for step in steps),
    }


def test_what_is_watched_is_what_happens(cluster: RealCluster, sweep_file: Path, tmp_path: Path) -> None:
    with driver(cluster, sweep_file, tmp_path, cell_seconds=0.25) as process:

        def at_work() -> SweepStatus | None:
            found = status_of(tmp_path)
            busy = found and found.live and found.live.actors and found.live.actors.busy and found.live.speed.cells
            # The status is older than the ledgers: between two trials it may know of none that runs.
            running = busy and found.by_state.get("running")
            return found if running and 0 < sum(trial.cells_done for trial in found.trials) < 48 else None

        found = until(at_work, process)
        assert found.is_live
        assert f"process {process.pid} " in found.driver
        assert {trial.stage for trial in found.live.running} <= {"starting", "data", "training", "queued", "scoring"}
        until(lambda: status_of(tmp_path).by_state == {"finished": 4})
        expected = expected_counts(tmp_path)
        samples = told_at_last(cluster, found.folder.name, expected | LAST_WORDS)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    found = status_of(tmp_path)
    assert found is not None
    assert found.by_state == {"finished": 4}
    assert found.driver is None
    assert (found.live.running, found.live.ended_by) == ((), None)
    told = found.as_json()
    assert (told["cells_done"], told["cells"]) == (48, 48)
    assert told["tokens"] == {
        "prefilled": expected["ray_pause_ray_prefilled_tokens_total", (("asked", "grid"),)],
        "decoded": expected["ray_pause_ray_decoded_tokens_total", (("asked", "grid"),)],
        "trained": expected["ray_pause_ray_trained_tokens_total", ()],
    }
    assert {name for name, _ in samples} <= {metric.exported for metric in METRICS}
    assert ("ray_pause_ray_gpu_idle_share", ()) not in samples
    check_lines(cluster, [trial.digest for trial in found.trials])


LAST_WORDS: Samples = {
    ("ray_pause_ray_cells_left", ()): 0,
    ("ray_pause_ray_trials", (("state", "done"),)): 4,
    ("ray_pause_ray_trials", (("state", "to_come"),)): 0,
    ("ray_pause_ray_gpus", ()): 0,
    ("ray_pause_ray_scoring_actors", (("state", "busy"),)): 0,
}
"""Figures of a moment as they are at a sweep's end."""


def told_at_last(cluster: RealCluster, sweep: str, expected: Samples) -> Samples:
    """Each figure as it was seen last, when all are as expected. Those of a moment are forgotten some seconds after the sweep's end."""
    seen: Samples = {}
    deadline = time.monotonic() + 240
    while not expected.items() <= seen.items():
        assert time.monotonic() < deadline, seen
        seen |= scraped(cluster, sweep)
        time.sleep(0.2)
    return seen


def check_lines(cluster: RealCluster, trials: list[str]) -> None:
    """In the nodes' logs every trial begins and is done, and an actor is asked for it."""
    lines = [line for text in worker_logs(cluster) for line in text.splitlines() if " INFO trial " in line]
    for digest in trials:
        said = [line.partition(f"({digest[:8]}): ")[2] for line in lines if f"({digest[:8]}): " in line]
        assert {"begins", "answering 12 cells (grid)", "done"} <= set(said), lines


def worker_logs(cluster: RealCluster) -> Iterator[str]:
    """Standard error of every process that Ray started, as its dashboard gives it."""

    def get(path: str, **parameters: str) -> requests.Response:
        authorized = {"Authorization": f"Bearer {cluster.token}"}
        return requests.get(f"{cluster.address}/api/v0/{path}", params=parameters, headers=authorized, timeout=60)

    for node in get("nodes").json()["data"]["result"]["result"]:
        listed = get("logs", node_id=node["node_id"], glob="worker-*.err").json()["data"]["result"]
        for name in {name for names in listed.values() for name in names}:
            yield get("logs/file", node_id=node["node_id"], filename=name, lines="10000").text
