"""An exported trial answers as it did in its sweep: the same prompt, the same adapter, also through plain PEFT and the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import CheckpointError, ModelError, TextError
from pause_ray.core.storage import write_json
from pause_ray.models.checkpoint import TRAINING_LOG, Checkpoint, copy_tokenizer, seal
from pause_ray.trial.ask import ADAPTER, MODEL_VARIABLE, TRIAL, Answerer
from pause_ray.trial.spec import TrialSpec
from tests.evaluation.tiny import make_text
from tests.inference.tiny_model import added_marker, make_adapter, make_model

pytestmark = pytest.mark.torch
CONTEXT, QUESTION = make_text(30, seed=3), "What is the best thing to do in San Francisco?"


def spec_of(model_dir: Path, **changes: Any) -> dict[str, Any]:
    needle = {"needle": "The captain hid the map under a drum.", "question": "Where did he hide it?", "keywords": ["drum"]}
    suite = {
        "name": "tiny",
        "noise": CONTEXT,
        "task": {"kind": "single", "needles": {"needles": [needle]}},
        "context_tokens": [256],
        "depth_percent": [0],
        "max_new_tokens": 6,
    }
    data = {"model": {"source": str(model_dir)}, "pauses": {"unit": "sentence", "token": "added", "every": 2}, "eval": suite}
    return TrialSpec.parse(data | changes, origin="test").resolved()


def export(folder: Path, model_dir: Path, **changes: Any) -> Path:
    """As ``export_best`` leaves a trial."""
    from pause_ray.models.sources import model_digest
    from pause_ray.text.tokenizer import ModelTokenizer

    adapter, marker = folder / ADAPTER, added_marker(model_dir)
    make_adapter(adapter, model_dir, seed=5, marker=marker)
    copy_tokenizer(model_dir, adapter, marker=marker)
    (adapter / TRAINING_LOG).write_text('{"step": 1, "loss": 1.0}\n')
    digests = {"base_digest": model_digest(model_dir, cache=folder), "tokenizer_digest": ModelTokenizer.load(model_dir).digest}
    seal(adapter, **digests, marker=marker, spec={}, document_digests=frozenset())
    write_json(folder / TRIAL, spec_of(model_dir, **changes))
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("answering") / "model", limit_tokens=2048)


@pytest.fixture(scope="module")
def folder(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported"), model_dir)


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return Answerer.open(folder)


def test_a_context_is_read_as_in_the_trial(answerer: Answerer, model_dir: Path) -> None:
    from pause_ray.text.prompts import HiddenText, PromptBuilder
    from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker

    spec = TrialSpec.parse(spec_of(model_dir), origin="test")
    tokenizer = ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, spec.pauses)
    builder = PromptBuilder(
        CONTEXT, rules=None, prompt=spec.eval.prompt, tokenizer=tokenizer, policy=spec.pauses, marker=marker, seed=spec.data_seed
    )
    cell = builder.build([HiddenText(text="A drum is here.", depth_percent=0)], question=QUESTION, context_tokens=256)
    inside = cell.ids[cell.prefix_tokens : len(cell.ids) - cell.suffix_tokens]
    asked = [int(token) for token in inside if token not in marker.group_ids]
    got = answerer.prompt(tokenizer.decode(asked), QUESTION).ids.tolist()
    end = len(got) - cell.suffix_tokens - 1
    assert marker.token is not None
    assert got.pop(end) == marker.token.token_id, "the grid's context is cut within a sentence; here that is a text's end, and paused"
    assert got == cell.ids.tolist()
    assert cell.num_pauses > 1


def test_the_answer_is_plain_pefts_on_the_same_prompt(answerer: Answerer, folder: Path, model_dir: Path) -> None:
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / ADAPTER)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(base, folder / ADAPTER)
    ids = torch.tensor([answerer.prompt(CONTEXT, QUESTION).ids.tolist()])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answerer.answer(CONTEXT, QUESTION) == expected
    assert answerer.answer(CONTEXT, QUESTION) == expected, "again"


def test_the_merged_model_of_the_export_answers_alike(answerer: Answerer, folder: Path, model_dir: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    from pause_ray.training.export import export_model

    merged = tmp_path / "merged"
    checkpoint = Checkpoint.open(folder / ADAPTER)
    export_model(checkpoint, model_dir=model_dir, folder=merged, dtype=None, progress=lambda done, total: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = torch.tensor([answerer.prompt(CONTEXT, QUESTION).ids.tolist()])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answerer.answer(CONTEXT, QUESTION)


def test_the_base_model_may_be_elsewhere_now(folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "export"
    shutil.copytree(folder, moved)
    write_json(moved / TRIAL, spec_of(tmp_path / "gone"))
    with pytest.raises(ModelError, match=f"no such folder.*{MODEL_VARIABLE} may name"):
        Answerer.open(moved)
    monkeypatch.setenv(MODEL_VARIABLE, str(model_dir))
    assert Answerer.open(moved).prompt(CONTEXT, QUESTION).num_pauses == 0


def test_another_base_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODEL_VARIABLE, str(make_model(tmp_path / "other", seed=1)))
    with pytest.raises(CheckpointError, match="adapter of base model"):
        Answerer.open(folder)


def test_what_cannot_be_read_is_refused(answerer: Answerer) -> None:
    with pytest.raises(ModelError, match="exceeds the 2048"):
        answerer.prompt(make_text(400, seed=1), QUESTION)
    with pytest.raises(TextError, match="PAUSE"):
        answerer.prompt("A text with a <PAUSE> in it.", QUESTION)


def test_mlflow_asks_by_rows(folder: Path, answerer: Answerer) -> None:
    from pause_ray.trial.ask import _load_pyfunc

    served = _load_pyfunc(str(folder))
    asked = {"context": [CONTEXT, "Rain fell."], "question": [QUESTION, "What fell?"]}
    assert served.predict(asked) == [answerer.answer(CONTEXT, QUESTION), answerer.answer("Rain fell.", "What fell?")]
    assert json.loads((folder / TRIAL).read_text())["pauses"]["every"] == 2
