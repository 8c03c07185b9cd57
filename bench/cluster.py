"""What a cluster costs beyond its answers and its rows: the pool and the shard writers on 1 to 8 nodes of one CPU each.

The nodes are true raylets, all on this machine. Three kinds of work are measured on each size of the cluster:

scripted  an engine that answers by a rule and waits ``--cell-seconds`` for each answer, as a trial waits for a GPU: a waiting actor needs
          no core, so nodes are what limits it, not the cores of this machine, until those are busy with passing cells on
model     SmolLM2-135M on one thread an actor: computes, so it cannot go faster than this machine's cores
shards    training rows by Ray Data tasks: computes as well

    python bench/cluster.py --json cluster.json
    python bench/cluster.py --kinds scripted --nodes 1 2 4 8 16 --cell-seconds 0.5      # more nodes where there are more cores

Efficiency is the rate per node against that of the smallest cluster. ``caller`` is the process that orders answers and appends them to a
ledger (a trial's in a sweep), ``controller`` the one that hands cells out, ``Ray`` the GCS and all raylets. ``cores busy`` is of the whole
machine: work that keeps all of its cores busy has no use for further nodes. Bytes of the object store are those that were created in it, in
all nodes together; messages are the pickled sizes of what passes the controller. Below the table stands what these costs would mean for a
thousand GPUs: arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.cluster_utils
from rich.console import Console
from tables import as_table

from pause_ray.core.spec import read_yaml
from pause_ray.core.storage import Storage
from pause_ray.evaluation.answer import Provenance
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.scoring_pool import ScoringJob, ScoringPool
from pause_ray.evaluation.suite import Cell, cells
from pause_ray.inference.engine import Completion, EngineError, HfEngineSpec, LoadedAs, PromptStep
from pause_ray.inference.scripted import ScriptedEngine
from pause_ray.models.sources import resolve_model
from pause_ray.models.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("scripted", "model", "shards")
LENGTHS = (512, 700, 900)
WARM_CELLS = 4
"""Per node, before the clock starts: each actor reads the haystack and makes its prompts once."""
STORE_BYTES = 100 * 1024**2
START_SECONDS = 300
WIDTH = 150
"""Of a table that goes into a file."""
GPUS = 1000
GPU_CELL_SECONDS = (0.5, 2.0, 6.5)
"""Of one cell on one GPU; 6.5 is the mean of an 8B model's 15 × 15 grid up to 128K tokens, 0.58 EFLOP, at 40 % of an H100's 989 TFLOP/s."""


@dataclass(kw_only=True)
class WaitingEngine(ScriptedEngine):
    """Takes its time for each answer, as a GPU does: without a core of this machine."""

    cell_seconds: float

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, outcome in super().answer(steps):
            time.sleep(self.cell_seconds)
            yield place, outcome


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of processors so far, by who spent them, and bytes created in the object store."""

    caller: float
    controller: float
    actors: float
    ray: float
    machine: float
    """By all of its processes."""
    store_bytes: int

    def __sub__(self, earlier: Spent) -> Spent:
        names = [field.name for field in dataclasses.fields(self)]
        return Spent(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of work on one size of the cluster; an item is a cell or a training row."""

    kind: str
    nodes: int
    items: int
    seconds: float
    per_second: float
    efficiency: float
    """Of the rate per node, against the smallest cluster's."""
    wait_seconds: float
    """Of each item, in which its node was not computing."""
    caller_cpu_seconds: float
    """Per item, as the next three."""
    controller_cpu_seconds: float
    actor_cpu_seconds: float
    ray_cpu_seconds: float
    cores_busy: float
    """Of the machine, in the mean."""
    store_bytes: float
    """Per item."""
    message_bytes: float
    """Per item, through the controller, in and out."""
    append_seconds: float
    """Of writing an answer to the ledger and to the disk."""


class Bench:
    """A cluster that grows, and what its processes have spent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        )
        ray.init(address=self.cluster.address, log_to_driver=False)
        self.nodes = 0

    def grow(self, nodes: int) -> None:
        for _ in range(nodes - self.nodes):
            self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        self.nodes = nodes

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()

    def spent(self, *, controller: int | None = None, actors: Sequence[int] = ()) -> Spent:
        from ray._private.internal_api import get_memory_info_reply
        from ray._private.state import state

        started = [its.process.pid for node in self.cluster.list_all_nodes() for its in _processes(node, "raylet", "gcs_server")]
        whole = psutil.cpu_times()
        return Spent(
            caller=time.process_time(),
            controller=busy([controller] if controller else []),
            actors=busy(actors),
            ray=busy(started),
            machine=whole.user + whole.nice + whole.system,
            store_bytes=int(get_memory_info_reply(state).store_stats.cumulative_created_bytes),
        )


def _processes(node: Any, *kinds: str) -> list[Any]:
    return [its for kind in kinds for its in node.all_processes.get(kind, [])]


def busy(pids: Sequence[int]) -> float:
    """Seconds of processors that these processes have used since they began."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(its.user + its.system for its in times)


def score(bench: Bench, job: ScoringJob, asked: Sequence[Cell], *, engine: ScriptedEngine | None, kind: str) -> Row:
    """Answer the cells with an actor on every node, warmed before."""
    pool = ScoringPool.start(num_actors=bench.nodes, cpus=1, threads=1, engine=engine)
    until = time.monotonic() + START_SECONDS
    while len(pool.state().pids) < bench.nodes:
        if time.monotonic() > until:
            raise SystemExit(f"{kind}: {pool.state()} after {START_SECONDS} s on {bench.nodes} nodes")
        time.sleep(0.1)
    pool.score(job, list(asked[: WARM_CELLS * bench.nodes]), on_result=lambda result: None)
    results: list[CellResult] = []
    ledger, appending = Ledger(bench.folder / f"{kind}-{bench.nodes}.jsonl"), 0.0

    def keep(result: CellResult) -> None:
        nonlocal appending
        started = time.perf_counter()
        ledger.append(result)
        appending += time.perf_counter() - started
        results.append(result)

    processes = {"controller": ray.get(pool.controller.__ray_call__.remote(lambda self: os.getpid())), "actors": pool.state().pids}
    before, started = bench.spent(**processes), time.perf_counter()
    pool.score(job, asked, on_result=keep)
    seconds, spent = time.perf_counter() - started, bench.spent(**processes) - before
    pool.stop()
    if {row.cell_id for row in results} != {cell.id for cell in asked}:
        raise SystemExit(f"{kind}: {len(results)} answers for {len(asked)} cells")
    passed = ray.cloudpickle.dumps((job, list(asked))), ray.cloudpickle.dumps(results)
    return row_of(
        kind,
        bench.nodes,
        len(asked),
        seconds,
        spent,
        wait_seconds=getattr(engine, "cell_seconds", 0.0),
        message_bytes=2 * sum(map(len, passed)) / len(asked),
        append_seconds=appending / len(asked),
    )


def row_of(kind: str, nodes: int, items: int, seconds: float, spent: Spent, **more: float) -> Row:
    return Row(
        kind=kind,
        nodes=nodes,
        items=items,
        seconds=seconds,
        per_second=items / seconds,
        efficiency=1.0,
        caller_cpu_seconds=spent.caller / items,
        controller_cpu_seconds=spent.controller / items,
        actor_cpu_seconds=spent.actors / items,
        ray_cpu_seconds=spent.ray / items,
        cores_busy=spent.machine / seconds,
        store_bytes=spent.store_bytes / items,
        **{"wait_seconds": 0.0, "message_bytes": 0.0, "append_seconds": 0.0} | more,
    )


def scoring_job(folder: Path, *, model_dir: Path, num_cells: int) -> tuple[ScoringJob, list[Cell]]:
    """The stock needle at even depths of three lengths."""
    from tests.evaluation.tiny import make_suite

    count = max(2, num_cells // len(LENGTHS))
    suite = make_suite(
        folder / "essays",
        context_tokens=list(LENGTHS),
        depth_percent={"from": 0, "to": 100, "count": count},
        max_new_tokens=16,
    )
    job = ScoringJob(
        suite=suite,
        policy=None,
        replicate=0,
        seed=0,
        data_seed=0,
        engine=HfEngineSpec(),
        loaded=LoadedAs(model_dir=model_dir, dtype="float32"),
        provenance=Provenance(arm="bench", model=model_dir.name, adapter=None, pauses="none"),
        cache=folder / "cache",
    )
    return job, cells(suite, identity="bench", replicate=0, seed=0)


def write_shards(bench: Bench, *, model_dir: Path, rows: int) -> Row:
    """Rows of ``needle_sft`` at 512 tokens, by tasks of Ray Data on the nodes; a small set before starts the tasks' processes."""
    from pause_ray.data.pipeline import build_shards
    from pause_ray.data.spec import CorpusSpec, ShardJob
    from pause_ray.text.pauses import PausePolicy
    from pause_ray.text.prompts import PromptSpec
    from pause_ray.text.tokenizer import ModelTokenizer

    slots = {"place": ["Oslo", "Lima", "Cairo", "Quito"], "colour": ["red", "green", "blue", "white"]}
    facts = {"needle": "The gate of {place} is {colour}.", "question": "Which colour has the gate of {place}?", "slots": slots}
    sources = {"sources": [{"path": str(bench.folder / "essays" / "*.txt")}], "facts": {"facts": [facts]}}

    def build(number: int, *, seed: int) -> None:
        spec = CorpusSpec.parse({**sources, "sequence_len": 512, "min_context_tokens": 256, "num_sequences": number}, origin="bench")
        job = ShardJob(
            spec=spec,
            prompt=PromptSpec(system=None),
            policy=PausePolicy(),
            model_dir=model_dir,
            tokenizer_digest=ModelTokenizer.load(model_dir).digest,
            seed=seed,
        )
        with tempfile.TemporaryDirectory(dir=bench.folder) as root:
            made = build_shards(job, storage=Storage.open(root), progress=lambda done, total: None)
            if made.num_rows != number:
                raise SystemExit(f"shards: {made.num_rows} rows, not {number}")

    build(64 * bench.nodes, seed=1)
    before, started = bench.spent(), time.perf_counter()
    build(rows, seed=2)
    seconds = time.perf_counter() - started
    return row_of("shards", bench.nodes, rows, seconds, bench.spent() - before)


def measure(bench: Bench, arguments: argparse.Namespace, *, model_dir: Path | None, say: Callable[[Row], None]) -> list[Row]:
    """Every kind of work on every size of the cluster, from the smallest."""
    from tests.evaluation.tiny import STOCK, make_haystack_folder, make_tokenizer_folder

    make_haystack_folder(bench.folder / "essays")
    tiny = make_tokenizer_folder(bench.folder / "tokenizer")
    scripted = WaitingEngine(facts={STOCK.question: STOCK.needle}, cell_seconds=arguments.cell_seconds)
    rows: list[Row] = []
    for nodes in sorted(set(arguments.nodes)):
        bench.grow(nodes)
        made: list[Row] = []
        if "scripted" in arguments.kinds:
            job, asked = scoring_job(bench.folder, model_dir=tiny, num_cells=arguments.cells)
            made.append(score(bench, job, asked, engine=scripted, kind="scripted"))
        if model_dir is not None and nodes <= (arguments.model_nodes or max(arguments.nodes)):
            job, asked = scoring_job(bench.folder, model_dir=model_dir, num_cells=arguments.model_cells)
            made.append(score(bench, job, asked, engine=None, kind="model"))
        if "shards" in arguments.kinds:
            made.append(write_shards(bench, model_dir=model_dir or tiny, rows=arguments.rows))
        for row in made:
            first = next((its for its in rows if its.kind == row.kind), row)
            compared = row.per_second / row.nodes / (first.per_second / first.nodes)
            rows.append(dataclasses.replace(row, efficiency=compared))
            say(rows[-1])
    return rows


def milliseconds(cost: str) -> Callable[[Row], str]:
    return lambda row: f"{1000 * getattr(row, cost):.2f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "work": lambda row: row.kind,
    "nodes": lambda row: str(row.nodes),
    "items": lambda row: str(row.items),
    "per s": lambda row: f"{row.per_second:.2f}",
    "efficiency": lambda row: f"{row.efficiency:.0%}",
    "caller ms": milliseconds("caller_cpu_seconds"),
    "controller ms": milliseconds("controller_cpu_seconds"),
    "actor ms": milliseconds("actor_cpu_seconds"),
    "Ray ms": milliseconds("ray_cpu_seconds"),
    "cores busy": lambda row: f"{row.cores_busy:.2f}",
    "append ms": milliseconds("append_seconds"),
    "store B": lambda row: f"{row.store_bytes:,.0f}",
    "sent B": lambda row: f"{row.message_bytes:,.0f}",
}
TITLE = f"nodes of one CPU on a machine of {os.cpu_count()} cores; milliseconds and bytes are per cell or row"


def at_a_thousand(rows: Sequence[Row], cell_seconds: Sequence[float] = GPU_CELL_SECONDS) -> list[dict[str, float]]:
    """What the costs per cell of the largest scripted cluster mean for 1,000 GPUs of an actor each, by seconds per cell.

    The controller is one process on one thread, so its share of a core is what ends first; where it is above 1, so many GPUs wait.
    """
    largest = max((row for row in rows if row.kind == "scripted"), key=lambda row: row.nodes, default=None)
    if largest is None:
        return []
    found = []
    for seconds in cell_seconds:
        rate = GPUS / seconds
        found.append(
            {
                "seconds_per_cell": seconds,
                "cells_per_second": rate,
                "controller_cores": rate * largest.controller_cpu_seconds,
                "gpus_that_a_controller_feeds": seconds / largest.controller_cpu_seconds,
                "caller_cores": rate * largest.caller_cpu_seconds,
                "trials_that_append": rate * largest.append_seconds,
                "ray_cores": rate * largest.ray_cpu_seconds,
                "megabytes_per_second": rate * largest.message_bytes / 1e6,
                "efficiency": seconds / (seconds + largest.actor_cpu_seconds),
            }
        )
    return found


def figure(name: str, words: str) -> Callable[[dict[str, float]], str]:
    return lambda row: words.format(row[name])


THOUSAND: dict[str, Callable[[dict[str, float]], str]] = {
    "s per cell": figure("seconds_per_cell", "{:g}"),
    "cells/s": figure("cells_per_second", "{:,.0f}"),
    "controller, cores": figure("controller_cores", "{:.2f}"),
    "GPUs it can feed": figure("gpus_that_a_controller_feeds", "{:,.0f}"),
    "callers, cores": figure("caller_cores", "{:.2f}"),
    "trials that append": figure("trials_that_append", "{:.2f}"),
    "Ray, cores": figure("ray_cores", "{:.2f}"),
    "MB/s at the controller": figure("megabytes_per_second", "{:.1f}"),
    "of the GPUs' time": figure("efficiency", "{:.1%}"),
}
THOUSAND_TITLE = f"{GPUS:,} GPUs with an actor each, by arithmetic from the largest scripted row"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all three")
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 4, 8], help="sizes of the cluster; default: %(default)s")
    parser.add_argument("--cells", type=int, default=300, help="of the scripted engine, at every size")
    parser.add_argument("--cell-seconds", type=float, default=0.2, help="that the scripted engine waits for an answer")
    parser.add_argument("--model", type=Path, help="folder of a model; default: the quickstart's")
    parser.add_argument("--model-nodes", type=int, help="largest cluster for the model; default: the largest")
    parser.add_argument("--model-cells", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8192, help="of the shards")
    parser.add_argument("--json", type=Path, help="also write rows and arithmetic there")
    parser.add_argument("--storage", default="runs", help="where the quickstart's model is kept")
    return parser.parse_args()


def main() -> None:
    """Measure and print the table, and what follows for a thousand GPUs."""
    arguments, console = parse(), Console(width=None if sys.stdout.isatty() else WIDTH)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a note on a kernel of a CPU
    model_dir = None
    if "model" in arguments.kinds:
        quickstart = ModelSpec.parse(read_yaml(ROOT / "sweeps" / "quickstart.yaml")["trial"]["model"], origin="quickstart")
        model_dir = arguments.model or resolve_model(quickstart, cache=Storage.open(arguments.storage).cache)
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder:
        bench = Bench(Path(folder))
        try:
            rows = measure(bench, arguments, model_dir=model_dir, say=lambda row: console.print(as_table([row], COLUMNS, title=TITLE)))
        finally:
            bench.close()
    found = at_a_thousand(rows)
    console.print(as_table(rows, COLUMNS, title=TITLE))
    if found:
        console.print(as_table(found, THOUSAND, title=THOUSAND_TITLE))
    if arguments.json:
        written = {"cores": os.cpu_count(), "rows": [dataclasses.asdict(row) for row in rows], "at_a_thousand": found}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
