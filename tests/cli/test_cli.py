"""The command line as a user meets it: one line and exit code 2 for a mistake, help that teaches, JSON for machines."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pause_ray.cli.main import app, main
from pause_ray.core.storage import Storage
from tests.stored_sweep import rows, store_sweep, store_trial

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "sweeps/quickstart.yaml"
SUITE = "eval/suites/single.yaml"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def pause_ray(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Return a function that runs the command line in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["pause-ray", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Done(int(end.value.code or 0), *capfd.readouterr())

    return run


def test_check_lists_the_trials_quickly() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "pause_ray", "check", QUICKSTART]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    computed = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert computed < 5, "half a second, unless torch or Ray is imported"
    assert done.returncode == 0
    assert "7 trials, 63 cells, no mistakes found" in done.stdout


def test_check_prints_json_that_holds_every_resolved_trial(pause_ray: Callable[..., Done]) -> None:
    done = pause_ray("check", QUICKSTART, "--json", "--set", "replicates=2")
    trials = json.loads(done.stdout)["trials"]
    assert len(trials) == 14
    assert {trial["spec"]["replicate"] for trial in trials} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("check", QUICKSTART, "--set", "trial.train.stps=3"), "did you mean train.max_steps?"),
        (("check", QUICKSTART, "--set", "trial.train.max_steps=many"), 'train.max_steps = "many"'),
        (("check", QUICKSTART, "--set", "nonsense"), "expected dotted.path=value"),
        (("check", QUICKSTART, "--set", "trial.eval.depth_percent=[120]"), "depth_percent 120 is outside 0 to 100"),
        (("report", "nowhere", "--storage", "/proc/nowhere"), "choose another with --storage"),
        (("check", "eval/needles/multi.yaml"), "describes no sweep (no trial in it), no trial (no model) and no suite (no task)"),
        (("check", SUITE, "--set", "contxt_tokens=[100]"), "did you mean context_tokens?"),
        (("check", SUITE, "--set", "depth_percent=[120]"), "depth_percent 120 is outside 0 to 100"),
        (("check", SUITE, "--resolve"), "a suite names no model"),
        (("check", QUICKSTART, "--set", "trial.engine={kind: vllm}"), "engine.kind: 'vllm' is none of 'hf', 'endpoint'"),
        (("eval", QUICKSTART, "--model", "some/model"), f"{QUICKSTART}: contains a sweep, but a suite is needed"),
        (("sweep", SUITE), f"{SUITE}: contains a suite, but a sweep is needed"),
        (("train", SUITE), f"{SUITE}: contains a suite, but a trial or sweep is needed"),
        (("train", SUITE, "--storage", "s3://bucket/runs"), f"{SUITE}: contains a suite, but a trial or sweep is needed"),
        (("eval", "nowhere.yaml", "--model", "some/model", "--dry-run"), "nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(pause_ray: Callable[..., Done], arguments: tuple[str, ...], message: str) -> None:
    done = pause_ray(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_check_takes_a_suite_and_counts_its_cells(pause_ray: Callable[..., Done]) -> None:
    done = pause_ray("check", "eval/suites/lattice.yaml", "--set", "context_tokens=[512, 1024]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["512 tokens: 2 cells", "1,024 tokens: 3 cells"], "every 512 tokens, and the end"
    assert "suite lattice, 5 cells per replicate, no mistakes found" in done.stdout
    found = json.loads(pause_ray("check", SUITE, "--json").stdout)
    assert found["suite"]["task"]["needles"]["needles"]
    assert set(found["cells"].values()) == {len(found["suite"]["depth_percent"])}


def test_an_unknown_sweep_name_lists_those_that_exist(pause_ray: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "first-0123").mkdir(parents=True)
    (tmp_path / "sweeps" / "first-0123" / "sweep.json").write_text("{}")
    done = pause_ray("report", "second", "--storage", str(tmp_path))
    assert done.returncode == 2
    assert "there are: first-0123" in done.stderr


@pytest.mark.seconds
def test_a_report_is_written_again_and_says_where(pause_ray: Callable[..., Done], tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    store_trial(storage, "b", rows({(1024, 10): 1.0}, trial="b"))
    folder = store_sweep(storage, [("b", "baseline", {}, 0)])
    done = pause_ray("report", "demo", "--json", "--storage", str(tmp_path))
    told = {"folder": str(folder), "report": str(folder / "report.html"), "best": str(folder / "best")}
    assert json.loads(done.stdout) == told
    assert "baseline" in (folder / "report.html").read_text()
    assert "1 of 1 trials finished" in pause_ray("report", "demo", "--storage", str(tmp_path)).stdout


@pytest.mark.parametrize("verb", ["check", "corpus", "train", "eval", "sweep", "report"])
def test_the_help_of_every_verb_has_an_example_of_that_verb(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"pause-ray {verb} " in shown.output.split("Options")[0].split("Usage")[1].split("\n", 1)[1]


def test_the_example_in_the_help_of_check_runs(pause_ray: Callable[..., Done]) -> None:
    done = pause_ray("check", QUICKSTART, "--set", "search.pauses.every.grid=[1, 2]", "--json")
    points = [trial["point"] for trial in json.loads(done.stdout)["trials"]]
    assert {point["pauses.every"] for point in points if "pauses.every" in point} == {1, 2}


def test_the_version_is_that_of_the_package(pause_ray: Callable[..., Done]) -> None:
    from pause_ray import __version__

    assert __version__ in pause_ray("--version").stdout


@pytest.mark.parametrize(
    ("library", "arguments", "extra"),
    [
        ("ray", ("sweep", QUICKSTART), "eval,train"),
        ("deepspeed", ("sweep", QUICKSTART), "eval,train"),
        ("ray", ("train", QUICKSTART), "eval,train"),
        ("ray", ("corpus", QUICKSTART), "eval,train"),
        ("torch", ("eval", SUITE, "--model", "org/model"), "eval"),
        ("mlflow", ("report", "demo", "--log"), "mlflow"),
    ],
)
def test_a_verb_that_lacks_a_library_names_the_extra(
    pause_ray: Callable[..., Done], library: str, arguments: tuple[str, ...], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage.open(str(tmp_path))
    store_trial(storage, "b", rows({(1024, 10): 1.0}, trial="b"))
    store_sweep(storage, [("b", "baseline", {}, 0)])
    monkeypatch.setitem(sys.modules, library, None)
    done = pause_ray(*arguments, "--storage", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {library} is not installed, and this needs it; pip install 'pause-ray[{extra}]'\n"
    assert not (tmp_path / "cache").exists(), "nothing is fetched before"
