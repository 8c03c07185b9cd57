"""What a sweep costs beyond its trainings and answers: a thousand trials with a stub of a training and an engine that answers by a rule.

Every size runs in a process of its own, with its own Ray, storage and MLflow store. A trial's overhead is read off a sweep whose trials
ask one cell; a cell's off the difference to sweeps with more. What reading the haystack and building prompts costs is measured beside
it, in one process without Ray, and is no overhead.

    python bench/sweep.py --json sweep.json
    python bench/sweep.py --sizes 100x1 100x120 300x120
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tables import as_table

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SIZES = ("100x1", "100x120", "1000x120")
LENGTHS = (160, 192, 224, 256, 288, 320)
MEMORY_SAMPLES = 10
WIDTH = 150
"""Of a table that goes into a file."""


@dataclass(kw_only=True)
class Row:
    """One sweep."""

    trials: int
    cells: int
    """Of each trial."""
    prepare_seconds: float = 0.0
    """Until the first trial began: specs, texts, lengths, Ray, shards, pool."""
    run_seconds: float = 0.0
    """From the first trial's beginning to the last one's end."""
    close_seconds: float = 0.0
    """What was left to write when the last trial had ended: MLflow and the pool's end."""
    report_seconds: float = 0.0
    answer_seconds_per_cell: float = 0.0
    """Reading and answering alone, without Ray and ledger."""
    mlflow_seconds: float = 0.0
    """Spent in sending to MLflow, beside the trials or after them."""
    driver_mib: list[int] = field(default_factory=list)
    """Of the driver's process, at even shares of the trials."""
    driver_peak_mib: int = 0

    @property
    def seconds_per_trial(self) -> float:
        return self.run_seconds / self.trials


@contextmanager
def timed(add: Callable[[float], None]) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        add(time.perf_counter() - started)


def resident_mib() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def run_one(*, trials: int, cells: int, folder: Path, with_mlflow: bool) -> Row:
    """One sweep in this process."""
    from pause_ray.cli.terminal import warn
    from pause_ray.core.storage import Storage
    from pause_ray.report.html import write_report
    from pause_ray.report.results import read_results
    from pause_ray.sweep.runner import run_sweep
    from pause_ray.sweep.spec import read_sweep
    from pause_ray.tracking.live import Tracker
    from tests.sweep.stub_processes import stub_every_process
    from tests.sweep.stubs import write_stub_sweep

    lengths = LENGTHS if cells % len(LENGTHS) == 0 else LENGTHS[:1]
    per_length = cells // len(lengths)
    depths = [round(100 * place / max(1, per_length - 1), 4) for place in range(per_length)]
    changes = {
        "search": {"train.learning_rate": {"grid": [round(1e-5 * (1 + number), 8) for number in range(trials - 1)]}},
        "arms": {"baseline": {"pauses": None, "train": None}},
        "trial.eval.context_tokens": list(lengths),
        "trial.eval.depth_percent": depths,
        "trial.train.max_steps": 2,
    }
    sweep = read_sweep(write_stub_sweep(folder, **changes), {})
    storage = Storage.open(folder / "storage")
    stub_every_process()
    row = Row(trials=trials, cells=cells, answer_seconds_per_cell=answering_alone(sweep, storage))
    began, ended, seen = [0.0], [0.0], [0]

    class Sampling:
        """A tracker that also notes when trials end, and how much memory the driver has then."""

        def step_of_trial(self, sweep_folder: Path, trial: str, step: dict[str, Any]) -> None:
            if with_mlflow:
                tracker.step_of_trial(sweep_folder, trial, step)

        def trial_ended(self, sweep_folder: Path) -> None:
            ended[0] = time.perf_counter()
            seen[0] += 1
            if seen[0] * MEMORY_SAMPLES // trials > len(row.driver_mib):
                row.driver_mib.append(resident_mib())
            if with_mlflow:
                tracker.trial_ended(sweep_folder)

        def send(self) -> None:
            tracker.send()

    started = time.perf_counter()
    with Tracker(storage, warn=warn) as tracker:
        sent = tracker._tried
        tracker._tried = lambda send: _timed_send(sent, send, row)
        began[0] = started
        outcome = run_sweep(
            sweep,
            storage=storage,
            console=Console(file=(folder / "console.txt").open("w")),
            command="bench",
            tracker=Sampling(),
        )
        with timed(lambda seconds: setattr(row, "report_seconds", seconds)):
            results = read_results(outcome.folder, storage)
            write_report(results)
        if with_mlflow:
            tracker.log(results)
    first = min(path.stat().st_mtime for path in (storage.root / "trials").glob("*/spec.json"))
    row.prepare_seconds = first - (time.time() - (time.perf_counter() - started))
    row.run_seconds = ended[0] - started - row.prepare_seconds
    row.close_seconds = time.perf_counter() - ended[0] - row.report_seconds
    row.driver_peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    if outcome.finished != trials:
        raise SystemExit(f"{outcome.finished} of {trials} trials finished: {outcome}")
    return row


def _timed_send(sent: Callable[[Callable[[], None]], bool], send: Callable[[], None], row: Row) -> bool:
    started = time.perf_counter()
    try:
        return sent(send)
    finally:
        row.mlflow_seconds += time.perf_counter() - started


def answering_alone(sweep: object, storage: object) -> float:
    """Seconds per cell of reading the text, building prompts and answering by the rule, in this process."""
    from pause_ray.core.storage import Storage
    from pause_ray.evaluation.answer import CellRunner, Provenance, answer_cells, plan_cells
    from pause_ray.evaluation.haystack import load_haystack, prompt_builder
    from pause_ray.inference.engine import LoadedAs
    from pause_ray.sweep.spec import SweepSpec, expand
    from pause_ray.text.tokenizer import ModelTokenizer
    from pause_ray.trial.prepare import prepare
    from tests.sweep.stubs import make_stub_engine

    assert isinstance(sweep, SweepSpec)
    assert isinstance(storage, Storage)
    trial = prepare(expand(sweep)[0].spec, cache=storage.cache)
    spec, engine = trial.spec, make_stub_engine(cell_seconds=0.0)
    cells = trial.cells
    started = time.perf_counter()
    tokenizer = ModelTokenizer.load(trial.model_dir)
    haystack = load_haystack(spec.eval, cache=storage.cache, seed=spec.seed, replicate=0)
    builder = prompt_builder(haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=trial.marker, seed=0)
    runner = CellRunner(builder=builder, tokenizer=tokenizer, policy=spec.pauses, marker=trial.marker, max_new_tokens=8)
    engine.use(LoadedAs(model_dir=trial.model_dir, dtype="float32"))
    provenance = Provenance(arm="", model="", adapter=None, pauses="none")
    asked = plan_cells(cells, runner=runner, prefix_block_size=1)
    for _ in answer_cells(asked, engine=engine, runner=runner, provenance=provenance):
        pass
    return (time.perf_counter() - started) / len(cells)


def in_its_own_process(size: str, *, with_mlflow: bool) -> Row:
    trials, cells = map(int, size.split("x"))
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as folder:
        command = [sys.executable, __file__, "--one", size, "--folder", folder, *([] if with_mlflow else ["--without-mlflow"])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{trials} trials of {cells} cells: the sweep ended with {done.returncode}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


COLUMNS: dict[str, Callable[[Row], str]] = {
    "trials": lambda row: f"{row.trials}",
    "cells": lambda row: f"{row.cells}",
    "prepare s": lambda row: f"{row.prepare_seconds:.1f}",
    "run s": lambda row: f"{row.run_seconds:.1f}",
    "s/trial": lambda row: f"{row.seconds_per_trial:.3f}",
    "answering ms/cell": lambda row: f"{1000 * row.answer_seconds_per_cell:.2f}",
    "close s": lambda row: f"{row.close_seconds:.1f}",
    "report s": lambda row: f"{row.report_seconds:.1f}",
    "MLflow s": lambda row: f"{row.mlflow_seconds:.1f}",
    "driver MiB, first tenth … last": lambda row: f"{row.driver_mib[0]} … {row.driver_mib[-1]}",
}
TITLE = "sweeps of stubs"


def summary(rows: list[Row]) -> dict[str, float]:
    """Overhead per trial and per cell, and the growth of the time per trial with the number of trials."""
    found: dict[str, float] = {}
    small = {row.trials: row for row in rows if row.cells == 1}
    large = sorted((row for row in rows if row.cells > 1), key=lambda row: row.trials)
    for row in large:
        if row.trials in small:
            one = small[row.trials]
            per_cell = (row.seconds_per_trial - one.seconds_per_trial) / (row.cells - 1)
            found["seconds_per_cell"] = per_cell
            found["overhead_seconds_per_cell"] = per_cell - row.answer_seconds_per_cell
            found["overhead_seconds_per_trial"] = one.seconds_per_trial - per_cell
    if len(large) > 1 and large[0].cells == large[-1].cells:
        found["seconds_per_trial_ratio"] = large[-1].seconds_per_trial / large[0].seconds_per_trial
        found["driver_growth_mib_per_trial"] = (large[-1].driver_mib[-1] - large[0].driver_mib[-1]) / (large[-1].trials - large[0].trials)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=DEFAULT_SIZES, metavar="TRIALSxCELLS", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the rows and the summary to this file")
    parser.add_argument("--without-mlflow", action="store_true", help="log nothing")
    parser.add_argument("--one", metavar="TRIALSxCELLS", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        trials, cells = map(int, arguments.one.split("x"))
        print(json.dumps(asdict(run_one(trials=trials, cells=cells, folder=arguments.folder, with_mlflow=not arguments.without_mlflow))))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows = []
    for size in arguments.sizes:
        rows.append(in_its_own_process(size, with_mlflow=not arguments.without_mlflow))
        console.print(as_table(rows[-1:], COLUMNS, title=TITLE))
    console.print(as_table(rows, COLUMNS, title=TITLE), summary(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "summary": summary(rows)}, indent=2))


if __name__ == "__main__":
    main()
