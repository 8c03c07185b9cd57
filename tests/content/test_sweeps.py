"""The shipped sweeps: what each varies, that every trial of it can be asked, and that it can be planned before a GPU is rented."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pause_ray.cli.main import app
from pause_ray.core.spec import JsonObject, parse_assignments, read_yaml
from pause_ray.models.shape import PUBLISHED
from pause_ray.sweep.spec import PlannedTrial, SweepSpec, expand, read_sweep
from pause_ray.trial.spec import TrialSpec
from tests.content.stand_in import write_stand_in

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
ON_GPUS = ("frequency_by_rank", "marker", "paper", "placement", "rope", "scale_70b")
QWEN = {  # as in the config.json on the hub
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
}
CONFIGS = {**PUBLISHED, "Qwen/Qwen2.5-3B": QWEN}


def sweep(name: str, overrides: JsonObject | None = None) -> SweepSpec:
    return read_sweep(ROOT / "sweeps" / f"{name}.yaml", overrides or {})


def arms(name: str) -> dict[str, list[TrialSpec]]:
    found: dict[str, list[TrialSpec]] = {}
    for trial in expand(sweep(name)):
        found.setdefault(trial.arm, []).append(trial.spec)
    return found


def only(specs: list[TrialSpec]) -> TrialSpec:
    """The first replicate of an arm that the search does not vary."""
    [found] = [spec for spec in specs if spec.replicate == 0]
    return found


# ---- what they ask


def test_every_sweep_that_was_promised_is_there() -> None:
    assert set(NAMES) == {"quickstart", "laptop", *ON_GPUS}


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_has_a_baseline_and_a_control_and_says_what_it_is_for(name: str) -> None:
    found = sweep(name)
    assert (found.compare_to, found.control) == ("baseline", "tuned_without_pauses")
    assert (found.replicates >= 3) == (name != "quickstart")
    baseline = {spec.replicate: spec for spec in arms(name)["baseline"]}
    assert all(spec.train is None and spec.pauses is None for spec in baseline.values())
    assert len((ROOT / "sweeps" / f"{name}.yaml").read_text().split("name:")[0].splitlines()) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_arms_differ_from_the_unchanged_trial_in_what_they_are_named_for_alone(name: str) -> None:
    """Same model, suite, corpus, training and seed: whatever differs is set by the arm, or searched."""
    found = sweep(name)
    searched = {path.split(".")[0] for path in found.search}
    for trial in expand(found):
        changed = {path.split(".")[0] for path in found.arms.get(trial.arm, {})} | searched | {"replicate"}
        plain = TrialSpec.parse(found.trial, origin=name).resolved()
        for field, value in trial.spec.resolved().items():
            assert field in changed or value == plain[field], (trial.label, field)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_read_different_halves_of_the_essays(name: str) -> None:
    for trial in expand(sweep(name)):
        if trial.spec.train is not None and trial.spec.corpus is not None:
            assert {source.to_percent for source in trial.spec.corpus.sources} == {50}
            assert {source.from_percent for source in trial.spec.eval.haystack} == {50}
            assert not trial.spec.corpus.allow_evaluation_overlap


def test_the_main_question_is_asked_at_every_frequency_and_rank() -> None:
    found = arms("frequency_by_rank")
    points = {(spec.pauses.every, spec.train.lora.rank) for spec in found["pause_tuned"] if spec.pauses and spec.train}
    assert points == set(itertools.product((1, 2, 4, 8, 16), (4, 16, 64)))
    assert all(spec.train.lora.alpha == spec.train.lora.rank for spec in found["pause_tuned"] if spec.train), "one scale at every rank"
    assert Counter(len(specs) for specs in found.values()) == Counter([45, 3, 15, 9])
    scheduler = sweep("frequency_by_rank").scheduler
    assert scheduler is not None
    assert scheduler.steps(60) == (8, 16, 32)


def test_placements_have_about_as_many_pauses_but_for_those_that_cannot() -> None:
    found = {name: only(specs).pauses for name, specs in arms("placement").items()}
    paused = {name: policy for name, policy in found.items() if policy is not None}
    assert {(policy.placement, policy.unit, policy.paragraph_rule) for policy in paused.values()} == {
        ("every", "paragraph", "auto"),
        ("every", "paragraph", "blank_line"),
        ("every", "paragraph", "newline"),
        ("every", "sentence", "auto"),
        ("every", "tokens", "auto"),
        ("random", "paragraph", "auto"),
        ("pattern", "paragraph", "auto"),
    }
    assert {(policy.marker, policy.token, policy.count) for policy in paused.values()} == {("<PAUSE>", "text", 1)}


@pytest.mark.real
def test_placements_that_are_compared_have_the_same_rate_on_the_essays(model_dir: Path, cache: Path) -> None:
    from pause_ray.evaluation.haystack import load_haystack
    from pause_ray.text.pauses import pause_offsets
    from pause_ray.text.tokenizer import ModelTokenizer

    found = {name: only(specs) for name, specs in arms("placement").items()} | {"laptop": only(arms("laptop")["random_placement"])}
    essays = load_haystack(found["paragraphs"].eval, cache=cache, seed=0, replicate=0)
    starts = [int(start) for start in ModelTokenizer.load(model_dir).encode(essays.text).starts]
    rates = {
        name: 1000 * len(pause_offsets(essays.text, spec.pauses, token_starts=starts, rules=essays.rules)) / len(starts)
        for name, spec in found.items()
        if spec.pauses is not None
    }
    for name in ("paragraphs", "sentences", "tokens", "random_words", "laptop"):
        assert 10 <= rates[name] <= 12, name
    assert rates["blank_lines"] < 1 < rates["footnotes"] < 2 < 60 < rates["line_ends"]


def test_markers_are_of_every_kind() -> None:
    found = {name: only(specs) for name, specs in arms("marker").items()}
    kinds = {name: (spec.pauses.token, spec.pauses.count, bool(spec.pauses.instruction)) for name, spec in found.items() if spec.pauses}
    assert set(kinds.values()) == {
        ("text", 1, False),
        ("added", 1, False),
        ("reserved", 1, False),
        ("text", 4, False),
        ("added", 4, False),
        ("text", 1, True),
    }
    assert not any(spec.train is None and spec.pauses and spec.pauses.token == "added" for spec in found.values()), "a row nobody trained"


def test_scaled_positions_answer_the_questions_that_plain_ones_do() -> None:
    found = {name: only(specs) for name, specs in arms("rope").items()}
    kinds = {name: spec.model.rope.kind for name, spec in found.items() if spec.model.rope}
    assert kinds.keys() == found.keys()
    assert set(kinds.values()) == {"plain", "linear", "dynamic", "yarn"}
    assert {spec.model.rope.factor for spec in found.values() if spec.model.rope} == {2}
    window = int(CONFIGS["Qwen/Qwen2.5-3B"]["max_position_embeddings"])
    lengths = found["baseline"].eval.context_tokens
    assert [length < window for length in lengths] == [True] * 4 + [False] * 4
    assert max(lengths) + 1000 < 2 * window, "room for pauses"


def test_the_laptops_sweep_has_the_arms_that_tell_pauses_from_tuning() -> None:
    found = arms("laptop")
    assert set(found) == {"pause_tuned", "baseline", "pauses_untuned", "tuned_without_pauses", "random_placement"}
    assert len({spec.pauses.every for spec in found["pause_tuned"] if spec.pauses}) == 2
    assert max(only(found["baseline"]).eval.context_tokens) <= 7200
    random = only(found["random_placement"])
    assert random.train is not None
    assert random.pauses is not None
    assert random.pauses.rate is not None
    multi = sweep("laptop", {"trial.eval": "eval/suites/laptop_multi.yaml", "name": "laptop-multi"})
    assert {trial.spec.eval.name for trial in expand(multi)} == {"laptop_multi"}
    assert [trial.label for trial in expand(multi)] == [trial.label for trial in expand(sweep("laptop"))]


def test_seventy_billion_parameters_are_trained_and_scored_in_turns_on_two_machines() -> None:
    resources = only(arms("scale_70b")["tuned_without_pauses"]).resources
    assert resources.worker_bounds == (16, 16)
    assert resources.train_gpus_per_worker == 1
    assert resources.scoring_bounds == (0, 4)
    assert resources.scoring_gpus_per_actor == 4
    fewer = {"trial.resources.train_workers": 4, "trial.train.quantize": "nf4", "trial.resources.scoring_actors.max": 1}
    assert {trial.spec.resources.scoring_bounds for trial in expand(sweep("scale_70b", fewer))} == {(0, 1)}


# ---- planned


@pytest.fixture(scope="module")
def folders(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = tmp_path_factory.mktemp("models")
    return {name: write_stand_in(models / name.rpartition("/")[2], config, model_dir=model_dir) for name, config in CONFIGS.items()}


def sources(name: str) -> list[str]:
    data = read_yaml(ROOT / "sweeps" / f"{name}.yaml")
    return data.get("search", {}).get("model.source", {}).get("grid") or [data["trial"]["model"]["source"]]


@pytest.mark.real
@pytest.mark.parametrize("name", ON_GPUS)
def test_a_sweep_can_be_planned(name: str, folders: dict[str, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training and scoring fits the GPUs that the file names; a small share of the grid will do for the prompts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PAUSE_RAY_CACHE", str(cache))
    gpus, gpu = (16, "H100") if name == "scale_70b" else (1, "H100" if name == "paper" else "RTX A6000")
    for source in sources(name):
        folder = folders[source.removesuffix("-Instruct")]
        sets = {"trial.model.source": str(folder), "replicates": "1", "trial.eval.context_tokens": "[7000, 28000]"}
        if "model.source" in sweep(name).search:
            sets["search"] = "{}"
        given = [f"--set={path}={value}" for path, value in sets.items()]
        done = CliRunner().invoke(
            app, ["plan", f"sweeps/{name}.yaml", "--gpus", str(gpus), "--gpu", gpu, "--json", "--storage", str(tmp_path), *given]
        )
        assert done.exit_code == 0, done.output
        plans = json.loads(done.stdout)["plans"]
        assert len(plans) == len(planned(name, sets))
        for plan in plans:
            assert plan["remedy"] is None, (plan["label"], plan["remedy"])
            assert plan["evaluation"] is not None
            assert (plan["training"] is None) == (plan["memory"] is None)


def planned(name: str, sets: dict[str, str]) -> list[PlannedTrial]:
    return expand(sweep(name, parse_assignments([f"{path}={value}" for path, value in sets.items()])))
