"""What all verbs share: the application, two consoles, common options, a progress bar. Knows no verb."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pause_ray.spec import JsonObject

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Find out whether, where and at what price pause-tuning helps a long-context model.",
)
out = Console()
"""Results."""
err = Console(stderr=True)
"""Progress, warnings and errors: one console for all three, so that a message does not tear a progress bar."""

DEFAULT_STORAGE = "runs"

SpecFile = Annotated[Path, typer.Argument(help="YAML file of a sweep, or of a single trial", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value, for example `--set train.steps=20`. May be repeated."),
]
StorageRoot = Annotated[str, typer.Option("--storage", help="Folder for all results; every node must see it.", envvar="PAUSE_RAY_STORAGE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]


def print_json(data: JsonObject) -> None:
    """For ``--json``: one object on standard output."""
    typer.echo(json.dumps(data, ensure_ascii=False))


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar with an ETA per stage, on standard error."""
    times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times, console=err) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        yield show


def program(name: str) -> str:
    """How to call a program of this environment: by its name if the shell finds it, else by its path."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
