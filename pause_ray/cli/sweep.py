"""The verb sweep: runs a sweep and reports it, or forecasts what it would take."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from pause_ray.cli.terminal import (
    DEFAULT_STORAGE,
    AsJson,
    Sets,
    SpecFile,
    StorageRoot,
    app,
    err,
    expect,
    out,
    print_json,
    program,
    require,
    warn,
)
from pause_ray.core.errors import SpecError
from pause_ray.core.format import format_count, format_duration, format_money
from pause_ray.core.spec import parse_assignments, read_yaml
from pause_ray.core.storage import Storage
from pause_ray.inference.engine import EndpointSpec
from pause_ray.sweep.spec import SweepSpec, listed_trials, read_sweep
from pause_ray.tracking.live import Tracker

if TYPE_CHECKING:
    from pause_ray.planning.forecast import Effort, SweepForecast, TrialOutlook
    from pause_ray.sweep.queue import Budget
    from pause_ray.sweep.status import SweepOutcome
    from pause_ray.tracking.runs import LoggedSweep
    from pause_ray.trial.needs import Hardware

Columns = list[tuple[str, Callable[["Effort"], str]]]
"""Headings of columns, each with the format of its amount of an effort."""
GPU_TABLE = "cluster/gpus.yaml"
GPUS_PER_NODE = 8
ASSUMED_MFU = 0.4
ASSUMED_NETWORK_GB = 50.0
"""Assumed network bandwidth of each machine, in GB/s; the verb plan has options for these assumptions."""


@app.command()
def sweep(
    spec: SpecFile,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list every trial and step, and what is left to do; start nothing.")
    ] = False,
    max_trials: Annotated[int | None, typer.Option(help="Start at most this many trials; the same command later starts the rest.")] = None,
    max_hours: Annotated[float | None, typer.Option(help="Start no trial after this many hours.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Start no trial after this cost, by the prices of --gpu and engine.prices.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help=f"Name of a GPU in {GPU_TABLE}, for the times of --dry-run and the price of --max-cost.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of these GPUs in all; default: 1.")] = None,
    set_: Sets = None,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Run every trial of a sweep, then compare and report them. Running it again resumes it.

    Examples: `pause-ray sweep sweeps/quickstart.yaml --set trial.train.max_steps=30`;
    a forecast: `pause-ray sweep sweeps/quickstart.yaml --dry-run --gpu H100 --gpus 8`;
    with a time limit: `pause-ray sweep sweeps/quickstart.yaml --max-hours 8`

    On a cluster: `ray job submit --working-dir . -- python -m pause_ray sweep sweeps/quickstart.yaml --storage /mnt/shared/runs`

    Next: `pause-ray status` shows the progress from another terminal; the last lines of the output name the report and further commands.
    """
    from pause_ray.sweep.queue import Budget

    expect(spec, "sweep")
    read = read_sweep(spec, parse_assignments(set_ or []))
    limits = {"--max-trials": max_trials, "--max-hours": max_hours, "--max-cost": max_cost}
    _refuse_without_effect(limits, dry_run=dry_run, gpu=gpu, gpus=gpus)
    hardware = _hardware(gpu, gpus) if gpu else None
    if dry_run:
        _forecast(read, hardware=hardware, storage=storage, as_json=as_json)
        return
    price = _price_per_hour(read, hardware) if max_cost is not None else 0.0
    budget = Budget(max_trials=max_trials, max_hours=max_hours, max_cost=max_cost, price_per_hour=price)
    run_and_report(read, storage=storage, as_json=as_json, budget=budget)


def _refuse_without_effect(limits: dict[str, float | None], *, dry_run: bool, gpu: str | None, gpus: int | None) -> None:
    given = [option for option, limit in limits.items() if limit is not None]
    if dry_run and given:
        raise SpecError(f"--dry-run starts nothing, so {given[0]} has no effect; leave one of them out")
    if gpus is not None and gpu is None:
        raise SpecError(f"--gpus {gpus}: needs the kind of GPU; name it with --gpu, as in {GPU_TABLE}")
    if gpu is not None and not dry_run and "--max-cost" not in given:
        raise SpecError(f"--gpu {gpu}: has an effect with --dry-run or --max-cost only; trials take the GPUs that the cluster has")


def _hardware(gpu: str, gpus: int | None) -> Hardware:
    from pause_ray.trial.needs import GpuTable, Hardware

    table = Path(GPU_TABLE)
    if not table.is_file():
        raise SpecError(f"--gpu {gpu}: no {GPU_TABLE} from {Path.cwd()}; run where the project's cluster folder is")
    return Hardware(
        gpu=GpuTable.parse(read_yaml(table), origin=GPU_TABLE).choose(name=gpu, memory_gb=None),
        gpus=gpus or 1,
        gpus_per_node=GPUS_PER_NODE,
        utilization=ASSUMED_MFU,
        network_gb_per_second=ASSUMED_NETWORK_GB,
    )


def _price_per_hour(spec: SweepSpec, hardware: Hardware | None) -> float:
    """Return the price of the GPUs per hour; 0 if only an endpoint's answers have a price.

    Raises:
        SpecError: Nothing has a price, or prices are in different currencies.
    """
    engines = (trial.spec.engine for trial in listed_trials(spec))
    prices = [engine.prices for engine in engines if isinstance(engine, EndpointSpec) and engine.prices is not None]
    currencies = {its.currency for its in prices} | ({hardware.gpu.currency} if hardware else set())
    if not currencies:
        raise SpecError("--max-cost: nothing has a price; name the GPUs with --gpu and --gpus, or give engine.prices")
    if len(currencies) > 1:
        raise SpecError(f"--max-cost: prices are in {' and '.join(sorted(currencies))}, which do not add up; give all in one currency")
    return hardware.cost(3600) if hardware else 0.0


def run_and_report(spec: SweepSpec, *, storage: str, as_json: bool, budget: Budget | None = None, in_process: bool = False) -> None:
    """Run a sweep on Ray or in this process, write its report, send it to MLflow, and print failures and further commands."""
    from pause_ray.report.html import table, write_report
    from pause_ray.report.ranking import export_best
    from pause_ray.report.results import read_results

    require(*_libraries(spec, in_process=in_process))
    root = Storage.open(storage)
    command = shlex.join(["pause-ray", *sys.argv[1:]])
    with Tracker(root, warn=warn) as tracker:
        if in_process:
            from pause_ray.sweep.in_process import run_in_process

            outcome = run_in_process(spec, storage=root, console=err, command=command, after_trial=tracker.trial_ended)
        else:
            from pause_ray.sweep.runner import run_sweep

            outcome = run_sweep(
                spec,
                storage=root,
                console=err,
                command=command,
                tracker=tracker,
                budget=budget,
            )
        tracker.interrupted = outcome.interrupted
        results = read_results(outcome.folder, root)
        export_best(results, root)
        path = write_report(results)
        tracker.log(results)
    if as_json:
        counts = {"finished": outcome.finished, "planned": outcome.planned, "stopped": outcome.left_out, "ended_by": outcome.ended_by}
        print_json({"folder": str(outcome.folder), "report": str(path), **counts})
    else:
        out.print(table(results))
        _print_next_commands(outcome.folder, path, root, tracker.logged)
    _print_failures(outcome)


def _libraries(spec: SweepSpec, *, in_process: bool) -> list[str]:
    """Return the libraries of the extras that a sweep needs."""
    trials = [trial.spec for trial in listed_trials(spec)]
    trains = any(trial.train for trial in trials)
    needed = {"ray": not in_process, "torch": trains or any(trial.engine.kind == "hf" for trial in trials), "deepspeed": trains}
    return [library for library, is_needed in needed.items() if is_needed]


def _print_failures(outcome: SweepOutcome) -> None:
    """Print failures and the reason of an early end, and exit with their code; a budget that was reached is no failure."""
    for label, failure in outcome.failures.items():
        err.print(f"[red]{escape(label)} failed:[/] {escape(failure.message)}", highlight=False)
        if failure.trace:
            err.print(failure.trace, highlight=False, markup=False)
    for reason in (*outcome.given_up, *([outcome.ended_by] if outcome.ended_by else [])):
        err.print(reason, highlight=False, markup=False, soft_wrap=True)
    if outcome.is_complete:
        return
    err.print(f"{outcome.finished} of {outcome.planned} trials are finished; run the same command again to resume", highlight=False)
    if outcome.interrupted:
        raise typer.Exit(130)
    if outcome.failures or not outcome.ended_by:
        raise typer.Exit(1 if any(failure.trace for failure in outcome.failures.values()) else 2)


def _print_next_commands(folder: Path, path: Path, storage: Storage, logged: LoggedSweep | None) -> None:
    from pause_ray.tracking.store import tracking_uri, without_secrets

    pause_ray = program("pause-ray")
    # By inode, not by path: the copied working directory of a job may have been removed, and with it an absolute path.
    is_default = Path(DEFAULT_STORAGE).exists() and Path(DEFAULT_STORAGE).samefile(storage.root)
    where = "" if is_default else f" --storage {shlex.quote(str(storage.root))}"
    lines = [f"\nreport      {path}"]
    if logged is None:
        lines.append(f"to MLflow   {pause_ray} report {folder.name} --log{where}   (sends from storage what MLflow does not have)")
    else:
        uri = without_secrets(tracking_uri(storage))
        page = f"#/experiments/{logged.experiment_id}/runs?workflowType=machine_learning"
        local = [f"trials      {program('mlflow')} ui --backend-store-uri {uri}", f"            then open http://127.0.0.1:5000/{page}"]
        lines += [f"trials      {uri}/{page}"] if uri.startswith("http") else local
    changed = "--set trial.model.source=FOLDER_OR_HUB_ID --set trial.model.sha256=null"
    lines.append(f"your model  {pause_ray} sweep sweeps/quickstart.yaml {changed}{where}")
    lines.append(f"any model   {pause_ray} eval eval/suites/single.yaml --model FOLDER_OR_HUB_ID{where}")
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _forecast(spec: SweepSpec, *, hardware: Hardware | None, storage: str, as_json: bool) -> None:
    from pause_ray.planning.forecast import forecast_sweep

    root = Storage.open(storage)
    with err.status("checking models, texts and lengths") as status:
        found = forecast_sweep(
            spec,
            storage=root,
            hardware=hardware,
            progress=lambda done, of: status.update(f"looking at trials: {done} of {of}"),
        )
    if as_json:
        print_json(found.as_json())
        return
    currency = hardware.gpu.currency if hardware else "cost"
    out.print(_table(found, currency=currency))
    for line in _remarks(found, spec):
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _table(found: SweepForecast, *, currency: str) -> Table:
    """Return a table with a line for each trial and, under it, for each step that is not done."""
    table = Table(show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [*found.trials, *found.example]
    columns: Columns = [
        ("tokens", lambda effort: _or_dash(effort.tokens, format_count)),
        ("PFLOP", lambda effort: _or_dash(effort.flops, lambda flops: f"{flops / 1e15:,.3g}")),
        ("time", lambda effort: _or_dash(effort.seconds, format_duration)),
    ]
    if any(trial.left.cost is not None for trial in shown):
        columns.append((currency, lambda effort: _or_dash(effort.cost, format_money)))
    table.add_column("trial", footer="left in all", overflow="fold")
    table.add_column("done")
    for heading, words in columns:
        table.add_column(heading, justify="right", footer=words(found.left))
    for trial in found.trials:
        _add_trial(table, trial, columns, times="")
    for trial in found.example:
        _add_trial(table, trial, columns, times=f"{found.points_to_come} × a trial like ")
    return table


def _add_trial(table: Table, trial: TrialOutlook, columns: Columns, *, times: str) -> None:
    over = trial.state in ("finished", "stopped")
    table.add_row(f"{times}{escape(trial.label)}", trial.state, *("" if over else words(trial.left) for _, words in columns))
    for step in trial.steps:
        if step.done < step.total and not over:
            figures = ["" if step.made_by or step.name == "data" else words(step.left) for _, words in columns]
            unit = {"data": "rows", "training": "steps", "scoring": "cells"}[step.name]
            done = "shared" if step.made_by else f"{format_count(step.done)} of {format_count(step.total)} {unit}"
            table.add_row(f"  {step.name}", done, *figures, style="dim")


def _or_dash(value: float | None, format_value: Callable[[float], str]) -> str:
    return "–" if value is None else format_value(value)


def _remarks(found: SweepForecast, spec: SweepSpec) -> list[str]:
    """Return sentences that explain the figures."""
    states = [trial.state for trial in found.trials]
    lines = [f"{states.count('finished')} of {len(states)} trials are finished, {states.count('begun')} begun."]
    if any(step.made_by for trial in found.trials for step in trial.steps):
        lines.append("Shared: a trial above does this step for this one too.")
    lines.append(f"Times: {found.throughput}; one trial after another, without starting and loading.")
    if found.points_to_come:
        lines.append(f"{found.points_to_come} points will be chosen by earlier results; each is assumed to take as much as the example.")
    if spec.scheduler is not None:
        lines.append(
            f"The scheduler {spec.scheduler.kind} will stop some trainings early; the figures assume that all run to the end, without "
            "the proxy's scores at rungs."
        )
    if any(trial.digest is None for trial in found.trials):
        lines.append("The model's weights are not on this machine yet, so results on storage were not searched.")
    return [*lines, *found.too_large]
