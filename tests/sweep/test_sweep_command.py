"""``pause-ray sweep`` and its options: what they refuse, what a dry run prints, and how a budget ends and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pause_ray.cli.main import app
from pause_ray.core.errors import SpecError
from tests.sweep.stubs import write_stub_sweep
from tests.sweep.test_robust_sweep import ledgers, run_to_its_end, whole_lines

QUICKSTART = "sweeps/quickstart.yaml"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sweep", *arguments])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dry-run", "--max-trials", "1"], r"--dry-run starts nothing, so --max-trials has no effect"),
        (["--gpus", "2"], r"--gpus 2: needs the kind of GPU; name it with --gpu"),
        (["--gpu", "H100"], r"--gpu H100: has an effect with --dry-run or --max-cost only"),
        (["--gpu", "H1000", "--dry-run"], r"--gpu H1000: not in the table of GPUs, which has"),
        (["--max-cost", "5"], r"--max-cost: nothing has a price; name the GPUs with --gpu and --gpus, or give engine\.prices"),
        (["--max-hours", "0"], r"--max-hours 0: must be above zero"),
        (["--max-hours", "nan"], r"--max-hours nan: must be above zero"),
        (["--max-trials", "-1"], r"--max-trials -1: must be above zero"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(options: list[str], told: str) -> None:
    refused = run(QUICKSTART, *options).exception
    assert isinstance(refused, SpecError)
    with pytest.raises(SpecError, match=told):
        raise refused


def test_prices_in_two_currencies_do_not_add_up() -> None:
    prices = "{input_per_million: 1, output_per_million: 2, currency: EUR}"
    engine = f"{{kind: endpoint, url: 'http://127.0.0.1:1/v1', model: m, load_adapters: true, prices: {prices}}}"
    changes = ["--set", f"trial.engine={engine}", "--set", "trial.pauses.token=text"]
    refused = run(QUICKSTART, *changes, "--max-cost", "5", "--gpu", "H100").exception
    assert isinstance(refused, SpecError)
    assert "prices are in EUR and USD, which do not add up" in str(refused)


def test_prices_of_a_search_that_learns_are_seen_before_its_points_are_known() -> None:
    prices = "{input_per_million: 1, output_per_million: 2, currency: EUR}"
    engine = f"{{kind: endpoint, url: 'http://127.0.0.1:1/v1', model: m, load_adapters: true, prices: {prices}}}"
    tpe = ["--set", "algorithm={kind: tpe, points: 3, random_points: 2}", "--set", "arms={}", "--set", "compare_to=null"]
    changes = ["--set", f"trial.engine={engine}", "--set", "trial.pauses.token=text", "--set", "control=null", *tpe]
    refused = run(QUICKSTART, *changes, "--max-cost", "5", "--gpu", "H100").exception
    assert isinstance(refused, SpecError)
    assert "prices are in EUR and USD" in str(refused)


def test_a_marker_in_square_brackets_is_shown_as_it_is() -> None:
    search = 'search={"pauses.marker": {"grid": ["[/pause]", "[pause]"]}}'
    checked = CliRunner().invoke(app, ["check", QUICKSTART, "--set", search])
    assert checked.exit_code == 0, checked.output
    assert "pause_tuned marker=[/pause] #0\npause_tuned marker=[pause] #0\n" in checked.output


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four trials."""
    return write_stub_sweep(tmp_path_factory.mktemp("texts"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_budget_ends_cleanly_and_the_same_command_goes_on(stubbed: Path, tmp_path: Path) -> None:
    code, output = run_to_its_end(stubbed, tmp_path, "--max-trials", "1")
    assert code == 0, output
    words = " ".join(output.split())
    assert "--max-trials 1 is reached: 3 trials were not started; the same command goes on with them" in words
    assert "1 of 4 trials are finished" in words
    [first] = ledgers(tmp_path)
    answered = whole_lines(tmp_path)
    looked = run(str(stubbed), "--dry-run", "--json", "--storage", str(tmp_path))
    assert looked.exit_code == 0, looked.output
    trials = json.loads(looked.stdout)["trials"]
    assert sorted(trial["state"] for trial in trials) == ["finished", "not begun", "not begun", "not begun"]
    assert [trial["digest"] for trial in trials if trial["state"] == "finished"] == [first.parent.name]
    code, output = run_to_its_end(stubbed, tmp_path)
    assert code == 0, output
    assert len(ledgers(tmp_path)) == 4
    assert answered < whole_lines(tmp_path)
    looked = run(str(stubbed), "--dry-run", "--storage", str(tmp_path))
    assert "4 of 4 trials are finished" in looked.output
    assert "left in all" in looked.output
