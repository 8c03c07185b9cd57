"""The verb status: the progress of sweeps, on any machine that sees the storage root."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pause_ray.cli.terminal import DEFAULT_STORAGE, AsJson, Sets, StorageRoot, app, err, out, print_json
from pause_ray.core.errors import UserError
from pause_ray.core.format import format_count, format_duration, format_percent
from pause_ray.core.spec import parse_assignments
from pause_ray.core.storage import Storage

if TYPE_CHECKING:
    from pause_ray.report.overview import SweepLine, SweepStatus
    from pause_ray.sweep.status import LiveStatus

MOST_SHOWN = 30
"""Largest number of running and of failed trials that are shown; --json has all."""


@app.command()
def status(
    sweep: Annotated[
        str | None, typer.Argument(help="File, folder or name of a sweep; default: all sweeps on the storage root", show_default=False)
    ] = None,
    set_: Sets = None,
    as_json: AsJson = False,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Show the progress and speed of a sweep, whether it runs, and what failed. Reads the storage root only, so it works on any machine.

    Examples: `pause-ray status quickstart`; `watch -n 5 pause-ray status quickstart --storage /mnt/shared/runs`

    Next: `pause-ray report NAME` writes the results so far; `pause-ray sweep FILE` resumes a sweep that does not run.
    """
    from pause_ray.report.overview import overview, sweep_status

    root = Storage(Path(storage).expanduser().absolute())  # not opened: the verb writes nothing
    if sweep is None:
        if set_:
            raise UserError("--set changes a sweep's file, and none is named; leave it out")
        lines = overview(root)
        if as_json:
            print_json({"sweeps": [dataclasses.asdict(line) for line in lines]})
        else:
            _show_lines(lines, root)
        return
    folder = _folder(sweep, root, sets=set_ or [])
    with err.status("reading ledgers"):
        found = sweep_status(folder, root)
    if as_json:
        print_json(found.as_json())
    else:
        _show(found)


def _folder(sweep: str, storage: Storage, *, sets: Sequence[str]) -> Path:
    """Return the folder of a sweep, which is given by its name, folder or file.

    Raises:
        UserError: There is no such sweep, or several.
    """
    from pause_ray.report.comparison import find_sweep
    from pause_ray.report.overview import folder_of, sweep_folders
    from pause_ray.sweep.spec import read_sweep

    path = Path(sweep).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return folder_of(read_sweep(path, parse_assignments(list(sets))).resolved(), storage)
    if sets:
        raise UserError(f"--set changes a sweep's file, and {sweep} is none; name the file, or leave --set out")
    if not (path / "sweep.json").is_file():
        sweep_folders(storage)
    return find_sweep(sweep, storage)


def _show_lines(lines: Sequence[SweepLine], storage: Storage) -> None:
    table = Table(title=f"sweeps under {storage.root}", title_justify="left")
    for heading in ("sweep", "finished", "left out", "last sign", "driver"):
        table.add_column(heading, no_wrap=heading == "sweep")
    for line in lines:
        done = f"{line.finished} of {line.planned}"
        driver, _, _ = (line.driver or "none").partition(",")
        table.add_row(line.name, done, str(line.left_out or ""), f"{format_duration(line.age)} ago", escape(driver))
    out.print(table)


def _show(found: SweepStatus) -> None:
    data = found.as_json()
    tokens = {name: number for name, number in data["tokens"].items() if number}
    rows = {
        "trials": ", ".join(f"{number} {state}" for state, number in found.by_state.items()),
        "cells": _of(data["cells_done"], data["cells"]) + (f", {data['cells_unscored']} not scored" if data["cells_unscored"] else ""),
        "steps": _of(data["steps_done"], data["steps"]) if data["steps"] != 0 else "",
        "tokens": ", ".join(f"{format_count(number)} {name}" for name, number in tokens.items()),
        "last": f"{data['last']['trial']}, {format_duration(data['last']['age'])} ago" if data["last"] else "nothing yet",
        "driver": _format_driver(found),
    }
    out.print(found.folder.name, style="bold", highlight=False)
    _lines({name: words for name, words in rows.items() if words})
    if found.live is not None and found.is_of_driver:
        _show_live(found.live, age=found.live.age_seconds(found.now), is_current=found.is_live)
    for label, reason in list(found.failures.items())[:MOST_SHOWN]:
        out.print(f"[red]{escape(label)} failed:[/] {escape(reason)}", highlight=False, soft_wrap=True)
    _print_rest(len(found.failures), "failed")
    for arm, reason in (found.live.given_up if found.live else {}).items():
        out.print(f"[red]arm {escape(arm)} given up:[/] {escape(reason)}", highlight=False, soft_wrap=True)


def _format_driver(found: SweepStatus) -> str:
    live = found.live
    if found.driver is not None:
        return f"runs: {found.driver}" + (
            "" if found.is_of_driver else "; it is starting and has written no status yet, or cannot write here"
        )
    if live is None:
        return "none runs"
    if live.ended is None:
        silent = format_duration(live.age_seconds(found.now))
        return f"none runs; the last one ({live.driver}) was lost: it wrote its last status {silent} ago; the same command resumes it"
    return f"none runs; the last one ended {format_duration(found.now - live.ended)} ago" + (f": {live.ended_by}" if live.ended_by else "")


def _show_live(live: LiveStatus, *, age: float, is_current: bool) -> None:
    """Print the last status of the driver."""
    actors, speed = live.actors, live.speed
    speeds = {f"{speed.cells:.3g} cells/s": speed.cells, f"{format_count(speed.scored_tokens)} tokens/s scored": speed.scored_tokens}
    speeds |= {f"{format_count(speed.trained_tokens)} tokens/s trained": speed.trained_tokens}
    rows = {
        "speed": ", ".join(words for words, value in speeds.items() if value),
        "left": format_duration(live.seconds_left) if live.seconds_left is not None else "",
        "actors": f"{actors.busy} busy, {actors.idle} idle, {actors.coming} coming" if actors else "",
        "GPUs": f"{live.gpus:g}, {format_percent(live.gpu_idle_share)} idle" if live.gpus else "",
    }
    old = "" if is_current else "; this is old: the driver hangs, or cannot write here"
    out.print(f"status of {format_duration(age)} ago{old}:", highlight=False, style=None if is_current else "yellow")
    _lines({name: words for name, words in rows.items() if words})
    for trial in live.running[:MOST_SHOWN]:
        words = f"{trial.label}: {trial.stage} {trial.done}/{trial.total}, for {format_duration(trial.seconds)}"
        out.print(f"  {words}", highlight=False, markup=False)
    _print_rest(len(live.running), "running")


def _print_rest(number: int, what: str) -> None:
    if number > MOST_SHOWN:
        out.print(f"  and {number - MOST_SHOWN} more {what}", highlight=False)


def _lines(rows: dict[str, str]) -> None:
    for name, words in rows.items():
        out.print(f"  {name:<8}{words}", highlight=False, markup=False, soft_wrap=True)


def _of(done: int, whole: int | None) -> str:
    return format_count(done) if whole is None else f"{format_count(done)} of {format_count(whole)}"
