"""The command line: all verbs, and the exit codes.

Heavy modules (Ray, torch, MLflow) are imported by the verb that needs them, so that ``check`` and ``--help`` answer quickly.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler
from rich.markup import escape

from pause_ray import __version__
from pause_ray.cli import cluster, plan, results, run, status, sweep
from pause_ray.cli.terminal import app, err
from pause_ray.core.errors import UserError, missing_extra

__all__ = ["app", "cluster", "main", "plan", "results", "run", "status", "sweep"]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pause-ray {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    logging.getLogger("pause_ray").setLevel(logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the caller reports the result of its retries
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)])


def main() -> None:
    """Run a verb. A mistake of the user and a missing extra are one line and exit code 2; a bug keeps its traceback and exits with 1."""
    try:
        app()
    except (UserError, ModuleNotFoundError) as error:
        message = missing_extra(error) if isinstance(error, ModuleNotFoundError) else str(error)
        if message is None:
            raise
        err.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as end:
        # Typer turns Ctrl-C into an exit of its own.
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            err.print("stopped; run the same command again to resume")
        raise
