"""``pause-ray plan`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pause_ray.cli.main import app
from pause_ray.cli.plan import parse_memory
from pause_ray.core.errors import SpecError, UserError
from pause_ray.core.spec import JsonObject
from tests.evaluation.tiny import make_haystack_folder, make_suite, make_tokenizer_folder
from tests.trial.test_needs import TINY

FACTS = {"facts": [{"needle": "The {a} is {b}.", "question": "What is the {a}?", "slots": {"a": ["x"], "b": ["y", "z"]}}]}


def plan(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": str(columns), "TERM": "dumb"})


def planned(*arguments: str) -> JsonObject:
    done = plan(*arguments, "--json")
    assert done.exit_code == 0, done.output
    data: JsonObject = json.loads(done.stdout)
    return data


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning")
    model = make_tokenizer_folder(folder / "model", limit_tokens=5000)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | TINY))
    essays = make_haystack_folder(folder / "essays")
    trial = {
        "model": {"source": str(model)},
        "pauses": {"unit": "sentence"},
        "corpus": {"sources": [{"path": str(essays / "*.txt")}], "facts": FACTS, "sequence_len": 1000, "min_context_tokens": 200},
        "train": {"max_steps": 10, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "lora": {"rank": 2}},
        "eval": make_suite(essays, context_tokens=[512, 1024]).resolved(),
    }
    arms: dict[str, Any] = {"baseline": {"pauses": None, "train": None}, "without_pauses": {"pauses": None, "train.lora.rank": 2}}
    data = {"name": "tiny", "trial": trial, "search": {"train.lora.rank": {"grid": [2, 4]}}, "arms": arms}
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments", [("--gpus", "16", "--gpu-memory", "80GB"), ("--model", "8B", "--gpus", "1"), ("SWEEP", "--gpus", "2")]
)
def test_a_plan_fits_the_terminal_and_names_what_it_assumes(arguments: tuple[str, ...], columns: int, sweep: Path) -> None:
    done = plan(*(str(sweep) if argument == "SWEEP" else argument for argument in arguments), columns=columns)
    assert done.exit_code == 0, done.output
    assert max(len(line) for line in done.stdout.splitlines()) <= columns
    assert "…" not in done.stdout
    for named in ("--mfu", "--network", "40%", "USD per hour", "https://"):
        assert named in " ".join(done.stdout.split())


def test_three_sizes_are_planned_where_none_is_named() -> None:
    data = planned("--gpus", "16", "--gpu-memory", "80GB")
    assert [found["label"] for found in data["plans"]] == ["Llama-3.2-3B", "Llama-3.1-8B", "Llama-3.1-70B"]
    assert [found["parameters"] // 10**9 for found in data["plans"]] == [3, 8, 70]
    assert [found["remedy"] for found in data["plans"]] == [None] * 3
    assert data["plans"][2]["memory"]["stage"] == 3
    assert data["assumed"]["gpu"]["memory_gb"] == 80
    for found in data["plans"]:
        assert found["evaluation"]["tokens"] > 0
        assert found["training"]["cost"] > 0


def test_assumptions_can_be_changed() -> None:
    slow, fast = (planned("--model", "8B", "--mfu", mfu)["plans"][0]["training"]["seconds"] for mfu in ("0.2", "0.4"))
    assert slow == pytest.approx(2 * fast)
    high = planned("--model", "8B", "--set", "train.lora.rank=64", "--row-tokens", "4096")["plans"][0]
    assert high["trained_parameters"] == 4 * planned("--model", "8B")["plans"][0]["trained_parameters"]
    assert high["training"]["tokens"] == 60 * 8 * 4096


def test_a_config_file_is_enough(sweep: Path) -> None:
    config = sweep.parent / "model" / "config.json"
    by_file, by_folder = (
        planned("--model", str(path), "--row-tokens", "2048", "--suite", "eval/suites/quickstart.yaml", "--set", "train.lora.rank=4")[
            "plans"
        ]
        for path in (config, config.parent)
    )
    assert by_file[0]["parameters"] == by_folder[0]["parameters"] > 0


def test_a_sweep_is_planned_trial_by_trial(sweep: Path) -> None:
    plans = {found["label"]: found for found in planned(str(sweep), "--gpus", "2")["plans"]}
    assert len(plans) == 4
    baseline = next(found for label, found in plans.items() if label.startswith("baseline"))
    assert baseline["memory"] is None
    assert baseline["training"] is None
    assert baseline["evaluation"]["tokens"] > 0
    tuned = [found for label, found in plans.items() if label.startswith("pause_tuned")]
    assert tuned[1]["trained_parameters"] == 2 * tuned[0]["trained_parameters"]
    without = next(found for label, found in plans.items() if label.startswith("without_pauses"))
    assert without["training"]["tokens"] == 10 * 2 * 600
    assert tuned[0]["training"]["tokens"] > without["training"]["tokens"], "pauses come on top"
    assert tuned[0]["evaluation"]["tokens"] > baseline["evaluation"]["tokens"]
    assert plan(str(sweep), "--gpus", "2", "--set", "trial.train.max_steps=20").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "TPU"), r"--gpu TPU: not in the table of GPUs"),
        (("--gpu-memory", "big"), r"expected a size such as 80GB"),
        (("--gpu-table", "nowhere.yaml"), r"--gpu-table nowhere\.yaml: no such file from .*; run where"),
        (("--suite", "nowhere.yaml"), r"--suite nowhere\.yaml: no such file"),
        (("nowhere.yaml",), r"nowhere\.yaml: cannot be read"),
        (("SWEEP", "--model", "8B"), r"--set trial\.model\.source=8B"),
        (("TRIAL", "--model", "8B"), r"--set model\.source=8B"),
        (("SWEEP", "--suite", "s.yaml"), r"--set trial\.eval=s\.yaml"),
        (("SWEEP", "--gpus", "3"), r"cannot be shared by 3 workers"),
        (("SWEEP", "--row-tokens", "99999"), r"--row-tokens 99999: .* --set trial\.corpus\.sequence_len=99999"),
        (("SWEEP", "--set", "trial.corpus.sequence_len=6000"), r"a row of 6000 tokens, but the model takes 5000"),
        (("--model", ""), r'--model: source = "": String should have'),
        (("--set", "train.rank=3"), r"unknown path train\.rank"),
        (("--set", "pauses.every=3"), r"unknown path pauses"),
        (("--model", "8B", "--row-tokens", "200000"), r"--row-tokens 200000 exceeds the 131072 tokens that 8B can read"),
        (("--model", "8B", "--set", "train.lora.rank=5000"), r"above the model's hidden size 4096"),
        (("--model", "no such model"), r"no such folder; give a folder"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], message: str, sweep: Path) -> None:
    files = {"SWEEP": sweep, "TRIAL": sweep.with_name("trial.yaml")}
    files["TRIAL"].write_text(json.dumps(json.loads(sweep.read_text())["trial"]))
    done = plan(*(str(files.get(argument, argument)) for argument in arguments))
    assert isinstance(done.exception, UserError)
    assert "\n" not in str(done.exception)
    with pytest.raises(UserError, match=message):
        raise done.exception


def test_what_does_not_fit_is_said_with_what_would() -> None:
    done = plan("--model", "70B", "--gpus", "8", "--set", "train.zero.stage=2", columns=200)
    assert done.exit_code == 0
    assert "70B: the training does not fit; what would fit: train.zero.stage: auto" in done.stdout


def test_a_model_that_the_gpus_cannot_score_is_said_with_what_it_needs() -> None:
    done = plan("--model", "8B", "--gpus", "1", "--gpu-memory", "24GB", "--set", "train.quantize=nf4", columns=200)
    assert done.exit_code == 0
    remedy = "8B: scoring needs 2 GPUs of this size for one copy of the model, and there are 1; give more (--gpus)"
    assert remedy in " ".join(done.stdout.split())


def test_what_is_true_of_several_plans_is_said_once(sweep: Path) -> None:
    done = plan(str(sweep), "--gpus", "2", "--gpu", "H100", "--gpu-memory", "0.5GB", columns=400)
    paused, plain = (line for line in done.stdout.splitlines() if "the training does not fit" in line)
    assert paused.startswith("pause_tuned rank=2 #0, pause_tuned rank=4 #0: "), "their rows are as long"
    assert plain.startswith("without_pauses #0: ")


@pytest.mark.parametrize(("gpus", "rows"), [(1, 8), (3, 9), (8, 8), (7, 14), (16, 16)])
def test_where_no_file_says_it_a_step_has_rows_for_every_gpu(gpus: int, rows: int) -> None:
    (found,) = planned("--model", "3B", "--gpus", str(gpus))["plans"]
    assert found["train"]["rows_per_step"] == rows
    shown = " ".join(plan("--model", "3B", "--gpus", str(gpus)).stdout.split())
    for said in (f"steps × rows │ 60 × {rows}", "longest row, tokens │ 8,192", "activations │ recomputed"):
        assert said in shown


def test_the_help_has_examples() -> None:
    shown = plan("--help", columns=200)
    assert "pause-ray plan --model 70B --gpus 16 --gpu-memory 80GB" in shown.output


@pytest.mark.parametrize(("text", "gigabytes"), [("80GB", 80), ("80", 80), ("80 gb", 80), ("2.5GB", 2.5), ("40GiB", 42.949_672_96)])
def test_memory_is_read_with_its_unit(text: str, gigabytes: float) -> None:
    assert parse_memory(text) == pytest.approx(gigabytes)


@pytest.mark.parametrize("text", ["", "big", "0GB", "-80GB", "80TB", "80GB!"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected a size such as 80GB"):
        parse_memory(text)
