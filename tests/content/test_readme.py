"""What the README shows can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pause_ray.cli.main import app
from pause_ray.sweep.spec import expand, read_sweep

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_sweep_in_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    path = tmp_path / "sweep.yaml"
    path.write_text(block)
    monkeypatch.chdir(ROOT)
    arms = [trial.arm for trial in expand(read_sweep(path, {}))]
    assert {arm: arms.count(arm) // 3 for arm in arms} == {
        "pause_tuned": 12,
        "baseline": 1,
        "pauses_untuned": 4,
        "tuned_without_pauses": 3,
    }


def test_every_verb_of_the_readme_exists() -> None:
    verbs = set(re.findall(r"pause-ray ([a-z]+)", README))
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == known


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\b((?:sweeps|eval|docs)/[\w/.-]+\.(?:yaml|md|png))", README))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_help_lists_the_verbs() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert all(verb in shown.output for verb in ("check", "corpus", "train", "eval", "sweep", "report"))


def test_every_command_of_the_readme_can_be_typed() -> None:
    commands = re.findall(r"^    (pause-ray .*)$", README.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(commands) > 8
    verbs: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in commands:
        _, verb, *arguments = shlex.split(command, comments=True)
        verbs[verb].make_context(verb, arguments)
