"""Every command of docs/cluster/ can be typed: shells, files, verbs and flags exist, also where no test can run it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pause_ray.cli.main import app
from pause_ray.models.shape import PUBLISHED
from tests.cluster_files.autoscaler import ROOT
from tests.cluster_files.document import ELSEWHERE, FOLDER, PAGES, RUN_HERE, TEXT, Block, blocks
from tests.content.stand_in import write_stand_in

pytestmark = pytest.mark.slow

BLOCKS = blocks()
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOT_OF_THE_INTERFACE = {("ecr-public", "get-login-password")}
"""Commands of ``aws`` that Amazon's interface does not have."""


def words_of(block: Block, program: str) -> list[list[str]]:
    """Arguments of every call of a program, also of those that are handed to ``ray``."""
    found = []
    for words in block.commands():
        if words[0] == program:
            found.append(words[1:])
        if program == "pause-ray" and words[0] == "ray":
            if "--" in words:
                python, module, package, *arguments = words[words.index("--") + 1 :]
                assert (python, module, package) == ("python", "-m", "pause_ray")
                found.append(arguments)
            elif words[1] == "exec" and words[-1].startswith("pause-ray"):
                found.append(shlex.split(words[-1])[1:])
    return found


def test_every_block_says_where_it_can_run() -> None:
    assert {block.mark for block in BLOCKS} == {RUN_HERE, *ELSEWHERE}
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert {block.page for block in BLOCKS if block.mark == RUN_HERE} == {"local.md", "README.md"}
    assert {block.mark for block in BLOCKS if block.page == "local.md"} == {RUN_HERE}
    assert {block.section for block in BLOCKS if block.mark == RUN_HERE and block.page == "README.md"} == {"What it will take"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.text.splitlines()[0][:40])
def test_a_shell_can_read_it(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"\b(?:sweeps|cluster|eval|docs)/[\w./-]*\w", TEXT))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert {path.name for path in FOLDER.glob("*.md")} == set(PAGES)


def test_every_link_leads_to_a_page_and_a_section() -> None:
    links = set(re.findall(r"\]\(([\w./-]*)#?([\w-]*)\)", TEXT))
    assert len(links) > 5
    for name, anchor in links:
        page = FOLDER / name if name else FOLDER / "README.md"
        assert page.exists(), name
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}, anchor


def test_verbs_and_their_options_exist() -> None:
    asked = [arguments for block in BLOCKS for arguments in words_of(block, "pause-ray")]
    assert {arguments[0] for arguments in asked} >= {"check", "plan", "sweep", "submit", "status", "report"}
    for verb, *arguments in asked:
        VERBS[verb].make_context(verb, list(arguments))


def test_options_that_the_text_names_exist() -> None:
    for span in re.findall(r"`pause-ray ([^`]*)`", TEXT):
        verb, *words = shlex.split(span)
        known = {option for parameter in VERBS[verb].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, span


def test_what_is_said_to_be_printed_is_printed() -> None:
    """The first column of the last table, but for what the commands fill in."""
    source = "".join(path.read_text() for path in (ROOT / "pause_ray").rglob("*.py"))
    told = re.findall(r"^\| `([^`]*)`", TEXT[TEXT.index("## When something is wrong") :], flags=re.MULTILINE)
    assert len(told) > 4
    pieces = [piece.strip() for message in told for piece in message.split("…") if piece.strip()]
    assert [piece for piece in pieces if piece not in source] == []


@pytest.fixture
def at_hand(model_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options with which a command about the gated model can run here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PAUSE_RAY_CACHE", str(cache))
    folder = write_stand_in(tmp_path / "model", PUBLISHED["meta-llama/Llama-3.1-70B"], model_dir=model_dir)
    return ["--set", f"trial.model.source={folder}", "--storage", str(tmp_path / "runs")]


def documented(*options: str) -> list[str]:
    """The one command with these options."""
    [found] = [words for block in BLOCKS for words in words_of(block, "pause-ray") if set(options) <= set(words)]
    return found


@pytest.mark.real
def test_what_the_sweep_will_take_is_what_its_dry_run_says(at_hand: list[str]) -> None:
    [title, *rows] = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if re.match(r"\| (36 trials|hours,|USD,)", line)]
    hours, cost = ([float(figure) for figure in figures] for _, *figures in rows)
    command = documented("--dry-run", "--gpu", "--gpus")
    for number, column in enumerate(title[1:]):
        gpus, gpu = column.split(" × ")
        command[command.index("--gpus") + 1], command[command.index("--gpu") + 1] = gpus, gpu
        done = CliRunner().invoke(app, [*command, *at_hand, "--json"])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert round(found["left"]["seconds"] / 3600, 1) == hours[number]
        assert round(found["left"]["cost"]) == cost[number]
        steps = [{step["name"]: step["total"] for step in trial["steps"]} for trial in found["trials"]]
        [cells] = {its["scoring"] for its in steps}
        trained = sum("training" in its for its in steps)
        assert title[0] == f"{len(steps)} trials, {trained} of them trained, {cells} cells each"


def test_the_sweep_fits_the_nodes_of_the_file_that_it_is_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, documented("check", "--cluster-file"))
    assert done.exit_code == 0, done.output
    assert "36 trials, 1584 cells, no mistakes found" in done.output


@pytest.mark.ray
def test_rays_commands_and_their_options_exist() -> None:
    import click
    from ray.scripts.scripts import cli

    asked = [arguments for block in BLOCKS for arguments in words_of(block, "ray")]
    assert {arguments[0] for arguments in asked} >= {"start", "job", "up", "dashboard", "down", "exec", "get-auth-token"}
    for arguments in asked:
        command: click.Command = cli
        while isinstance(command, click.Group):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(str(command.name), list(arguments))


def test_amazons_interface_has_what_is_asked_of_it() -> None:
    session = pytest.importorskip("botocore.session").get_session()
    from botocore import xform_name

    asked = [arguments for block in BLOCKS for arguments in words_of(block, "aws")]
    checked = 0
    for service, operation, *arguments in asked:
        if (service, operation) in NOT_OF_THE_INTERFACE:
            continue
        model = session.get_service_model(service)
        name = next(name for name in model.operation_names if xform_name(name, "-") == operation)
        members = {f"--{xform_name(member, '-')}": member for member in model.operation_model(name).input_shape.members}
        given = [word for word in arguments if word.startswith("--") and word != "--region"]
        assert set(given) <= set(members), (service, operation)
        assert {members[word] for word in given} >= set(model.operation_model(name).input_shape.required_members) - {"CreationToken"}
        checked += 1
    assert checked > 5
