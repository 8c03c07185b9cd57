"""A forecast says what scoring computes, for one actor or several, and refuses what a run would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError, UserError
from pause_ray.core.spec import JsonObject, with_overrides
from pause_ray.evaluation.answer import CellRunner, plan_cells
from pause_ray.evaluation.haystack import load_haystack, prompt_builder
from pause_ray.evaluation.prefix_plan import split_for_actors
from pause_ray.evaluation.suite import cells
from pause_ray.inference.engine import Completion
from pause_ray.inference.scripted import ScriptedEngine
from pause_ray.planning.forecast import TrialForecast, forecast_trial
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from pause_ray.trial.spec import TrialSpec
from tests.evaluation.tiny import STOCK, base, make_haystack_folder, make_suite, make_tokenizer_folder

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


SERVER = {"kind": "endpoint", "url": "http://127.0.0.1:8000/v1", "model": "m"}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> JsonObject:
    folder = tmp_path_factory.mktemp("forecast")
    model = make_tokenizer_folder(folder / "model", limit_tokens=4000)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | SHAPE))
    suite = make_suite(make_haystack_folder(folder / "essays"), context_tokens=[512, 1024, 2048])
    return {"model": {"source": str(model)}, "eval": suite.resolved()}


def spec_of(trial: JsonObject, **changes: Any) -> TrialSpec:
    return TrialSpec.parse(with_overrides(trial, {path.replace("__", "."): value for path, value in changes.items()}), origin="test")


def computed(spec: TrialSpec, found: TrialForecast) -> int:
    """Prompt tokens that an engine really computes when the pool's runs are answered."""
    model_dir = Path(spec.model.source)
    tokenizer = ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, spec.pauses)
    haystack = load_haystack(spec.eval, cache=model_dir, seed=0, replicate=0)
    builder = prompt_builder(haystack, suite=spec.eval, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=0)
    runner = CellRunner(builder=builder, tokenizer=tokenizer, policy=spec.pauses, marker=marker, max_new_tokens=spec.eval.max_new_tokens)
    tokens = 0
    for run in split_for_actors(cells(spec.eval, identity="", replicate=0, seed=0), num_actors=spec.resources.scoring_actors):
        engine = ScriptedEngine(facts={STOCK.question: STOCK.needle})
        engine.use(base(model_dir))
        asked = plan_cells(run, runner=runner, prefix_block_size=1, reuse=found.reuse)
        for _, outcome in engine.answer([step for _, step in asked]):
            assert isinstance(outcome, Completion)
            tokens += outcome.prefilled_tokens
    return tokens


@pytest.mark.parametrize("num_actors", [1, 3])
@pytest.mark.parametrize("reuse", ["full", "depth", "none"])
def test_the_tokens_foretold_are_those_computed(trial: JsonObject, tmp_path: Path, reuse: str, num_actors: int) -> None:
    changes = {"engine__reuse": reuse, "resources__scoring_actors": num_actors, "pauses": {"unit": "sentence", "every": 2}}
    spec = spec_of(trial, **changes)
    found = forecast_trial(spec, cache=tmp_path)
    assert found.by_reuse[found.reuse].prefilled_tokens == computed(spec, found)
    assert found.num_pauses > 0


def test_several_actors_compute_a_shared_beginning_each(trial: JsonObject, tmp_path: Path) -> None:
    one, three = (forecast_trial(spec_of(trial, resources__scoring_actors=number), cache=tmp_path).by_reuse for number in (1, 3))
    assert three["full"].prefilled_tokens > one["full"].prefilled_tokens
    assert three["none"] == one["none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__context_tokens": [512, 3980]}, r"context_tokens 3980 and an answer of 48 are longer than the 4000 .* at most 3952"),
        ({"eval__context_tokens": [3900], "pauses": {"unit": "sentence"}}, r"context_tokens 3900: \d+ prompt tokens .* exceed the 4000"),
        ({"adapter": "nowhere"}, r"nowhere"),
    ],
)
def test_what_a_run_refuses_is_refused(trial: JsonObject, tmp_path: Path, changes: JsonObject, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        forecast_trial(spec_of(trial, **changes), cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_server_decides_its_precision_so_ours_is_no_part_of_the_trial(trial: JsonObject) -> None:

    def defining(engine: JsonObject) -> list[JsonObject]:
        return [spec_of(trial, engine=engine, model__dtype=dtype).defining() for dtype in ("float32", "bfloat16")]

    there, here = defining(SERVER), defining({})
    assert there[0] == there[1]
    assert here[0] != here[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantize": "nf4"}, r"model\.quantize nf4 has no effect"),
        ({"pauses": {"token": "added"}}, r"pauses\.token added.*text"),
        ({"adapter": "some/folder"}, r"engine\.load_adapters: must be true"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_the_spec(trial: JsonObject, changes: JsonObject, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(trial, engine=SERVER, **changes)
    assert spec_of(trial, **changes)
