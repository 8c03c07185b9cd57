"""A sweep that trains nothing runs in the caller's process: without Ray, with the same interrupt, failures and resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pause_ray.cli.run import _needs_ray
from pause_ray.core.errors import ModelError
from pause_ray.core.storage import Storage
from pause_ray.evaluation.ledger import Ledger
from pause_ray.inference.engine import Completion, EngineError, PromptStep
from pause_ray.inference.scripted import ScriptedEngine
from pause_ray.sweep.in_process import run_in_process
from pause_ray.sweep.spec import SweepSpec
from pause_ray.sweep.status import LiveStatus, SweepOutcome
from tests.evaluation.tiny import STOCK, make_haystack_folder, make_suite
from tests.inference.endpoint_server import EndpointServer, completion
from tests.sweep.stubs import write_model

ROOT = Path(__file__).resolve().parents[2]
FACTS = {STOCK.question: STOCK.needle}
EVAL_WITHOUT_EXTRAS = """
import sys
for library in ("ray", "torch", "mlflow", "deepspeed"):
    sys.modules[library] = None
from pause_ray.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder and a suite's file."""
    folder = tmp_path_factory.mktemp("eval")
    write_model(folder / "model")
    make_haystack_folder(folder / "essays", num_documents=3)
    suite = make_suite(folder / "essays", context_tokens=[256, 384], prompt={"system": None})
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite.resolved()))
    return folder


def sweep_of(folder: Path, *, replicates: int = 2) -> SweepSpec:
    trial = {"model": {"source": str(folder / "model")}, "eval": yaml.safe_load((folder / "suite.yaml").read_text())}
    return SweepSpec.parse({"name": "here", "trial": trial, "arm": "model", "replicates": replicates}, origin="test")


def run(folder: Path, storage: Storage, engine: ScriptedEngine, **changes: int) -> SweepOutcome:
    console = Console(quiet=True)
    return run_in_process(
        sweep_of(folder, **changes), storage=storage, console=console, command="", after_trial=lambda _: None, engine=engine
    )


def ids(storage: Storage) -> list[str]:
    return [row.cell_id for path in sorted(storage.trials.glob("*/cells.jsonl")) for row in Ledger(path).rows()]


def test_eval_on_an_endpoint_needs_no_ray_no_torch_and_no_mlflow(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVAL_WITHOUT_EXTRAS, "eval", str(folder / "suite.yaml")]
    command += ["--model", str(folder / "model"), "--json", "--storage", str(tmp_path / "runs")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with EndpointServer(lambda _: completion(STOCK.needle)) as server:
        command += ["--set", f"engine={{kind: endpoint, url: '{server.url}', model: tiny}}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["finished"], found["planned"]) == (1, 1)
    assert Path(found["report"]).is_file()
    assert len(ids(Storage.open(str(tmp_path / "runs")))) == 6
    assert "pip install 'pause-ray[mlflow]'" in " ".join(done.stderr.split())
    live = LiveStatus.read(Path(found["folder"]))
    assert live is not None
    assert live.ended is not None


@dataclass(kw_only=True)
class InterruptedEngine(ScriptedEngine):
    """Sends its process a SIGINT while it answers the third cell."""

    answered: int = 0

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        for place, outcome in super().answer(steps):
            self.answered += 1
            if self.answered == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield place, outcome


def test_an_interrupt_lets_the_current_cell_be_answered_and_the_same_call_goes_on(folder: Path, tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    outcome = run(folder, storage, InterruptedEngine(facts=FACTS))
    assert outcome.interrupted
    assert (outcome.finished, outcome.planned, outcome.failures) == (0, 2, {})
    assert outcome.ended_by == "it was interrupted"
    assert len(ids(storage)) == 3
    again = run(folder, storage, ScriptedEngine(facts=FACTS))
    assert again.is_complete
    assert again.folder == outcome.folder
    assert len(ids(storage)) == len(set(ids(storage))) == 12


@dataclass(kw_only=True)
class FailingEngine(ScriptedEngine):
    """Cannot be asked."""

    because: Exception

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        raise self.because


@pytest.mark.parametrize(
    ("because", "message", "has_trace"),
    [(ModelError("too long"), "too long", False), (RuntimeError("a bug"), "RuntimeError: a bug", True)],
)
def test_a_failure_is_kept_and_an_arm_whose_trials_all_fail_is_given_up(
    folder: Path, tmp_path: Path, because: Exception, message: str, has_trace: bool
) -> None:
    outcome = run(folder, Storage.open(str(tmp_path)), FailingEngine(facts=FACTS, because=because), replicates=5)
    assert [failure.message for failure in outcome.failures.values()] == [message] * 3
    assert all((failure.trace is not None) == has_trace for failure in outcome.failures.values())
    assert outcome.given_up
    assert not outcome.is_complete


def test_ray_is_for_a_cluster_or_several_actors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sweep = sweep_of(folder)
    assert not _needs_ray(sweep)
    several = {**sweep.resolved(), "trial": {**sweep.resolved()["trial"], "resources": {"scoring_actors": 2}}}
    assert _needs_ray(SweepSpec.parse(several, origin="test"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert _needs_ray(sweep)
