"""Parts that the verbs share: the application, two consoles, common options, a progress bar."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, read_yaml
from pause_ray.training.metrics import step_summary

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Measure whether pause-tuning helps a long-context model, where in its input, and at what cost.\n\n"
    "Start with `pause-ray sweep sweeps/quickstart.yaml`; `pause-ray VERB --help` has examples.",
)
out = Console()
"""The console for results."""
err = Console(stderr=True)
"""The console for progress, warnings and errors: one for all three, so that a message does not break a progress bar."""


def warn(message: str) -> None:
    """Print a warning to standard error."""
    err.print(message, style="yellow", highlight=False, markup=False)


def require(*libraries: str) -> None:
    """Check that libraries of the extras are installed, before a verb fetches or computes anything.

    Raises:
        ModuleNotFoundError: A library is not installed; ``main`` then names the extra.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(name=library)


DEFAULT_STORAGE = "runs"
RECENT_STEPS = 20
"""Number of latest training steps whose median time gives the time that remains."""
SECONDS_BETWEEN_LINES = 60.0

SpecFile = Annotated[Path, typer.Argument(help="YAML file of a sweep, or of a single trial", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value, for example `--set train.max_steps=20`. May be repeated."),
]
StorageRoot = Annotated[str, typer.Option("--storage", help="Folder for all results; every node must see it.", envvar="PAUSE_RAY_STORAGE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]


def print_json(data: JsonObject) -> None:
    """Print one JSON object to standard output, for ``--json``."""
    typer.echo(json.dumps(data, ensure_ascii=False))


class _Eta(ProgressColumn):
    """The time that remains: of a training by the seconds of its last steps, else by the bar's own speed.

    A resumed training reports all its earlier steps at once, from which a bar cannot compute a speed.
    """

    def render(self, task: Task) -> Text:
        recent: tuple[float, ...] = task.fields["step_seconds"]
        remaining = statistics.median(recent) * ((task.total or 0) - task.completed) if recent else task.time_remaining
        return Text("-:--:--" if remaining is None else str(timedelta(seconds=round(remaining))))


class StageProgress(Progress):
    """A progress bar with an ETA for each stage, on standard error; a line a minute if that is no terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
        super().__init__(*columns, TimeElapsedColumn(), TextColumn("eta"), _Eta(), console=err, disable=not err.is_terminal)
        self._bars: dict[str, TaskID] = {}
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_line, self._printed_at = "", -math.inf

    def __call__(self, stage: str, done: int, total: int, row: JsonObject | None = None) -> None:
        """Update the bar of a stage; see ``trial.run.TrialProgress``."""
        if stage not in self._bars:
            self._bars[stage] = self.add_task(stage, total=total, words="", step_seconds=())
        if row:
            self._step_seconds.append(row["seconds"])
        words = step_summary(row) if row else ""
        step_seconds = tuple(self._step_seconds) if row else ()
        self.update(self._bars[stage], completed=done, total=total, words=words, step_seconds=step_seconds)
        line = " ".join(filter(None, [f"{stage} {done}/{total}", words]))
        due = done == total or time.monotonic() - self._printed_at > SECONDS_BETWEEN_LINES
        if not err.is_terminal and due and line != self._last_line:
            self._last_line, self._printed_at = line, time.monotonic()
            err.print(line, highlight=False)


def program(name: str) -> str:
    """Return the name of a program of this environment if the shell finds it, else its path."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


Kind = Literal["sweep", "trial", "suite"]
_EXAMPLES: dict[Kind, str] = {"sweep": "sweeps/quickstart.yaml", "trial": "sweeps/quickstart.yaml", "suite": "eval/suites/single.yaml"}


def expect(path: Path, *kinds: Kind) -> None:
    """Check that a file describes one of these kinds.

    Raises:
        SpecError: The file describes something else.
    """
    kind = kind_of(path)
    if kind not in kinds:
        raise SpecError(f"{path}: contains a {kind}, but a {' or '.join(kinds)} is needed; give a file such as {_EXAMPLES[kinds[0]]}")


def kind_of(path: Path) -> Kind:
    """Return the kind of spec that a file contains.

    Raises:
        SpecError: The file contains none of them.
    """
    fields = read_yaml(path).keys()
    kinds: dict[str, Kind] = {"trial": "sweep", "model": "trial", "eval": "trial", "task": "suite"}
    for field, kind in kinds.items():
        if field in fields:
            return kind
    raise SpecError(
        f"{path}: describes no sweep (no trial in it), no trial (no model) and no suite (no task); its fields: {', '.join(fields)}"
    )
