"""Everything a user can get wrong about a trial is said before a process is started for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pause_ray.core.errors import UserError
from pause_ray.core.spec import JsonObject, read_yaml, with_overrides
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER, TRAINING_LOG, seal
from pause_ray.text.prompts import PromptSpec
from pause_ray.text.tokenizer import ModelTokenizer
from pause_ray.trial.spec import TrialSpec
from tests.sweep.tiny_sweep import write_model, write_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> JsonObject:
    folder = tmp_path_factory.mktemp("trial")
    sparse: JsonObject = read_yaml(write_sweep(folder, write_model(folder / "model")))["trial"]
    places = {"corpus.sources": [{"path": str(folder / "training")}], "eval.haystack": [{"path": str(folder / "haystack")}]}
    return with_overrides(sparse, places)


def digest_of(trial: JsonObject, cache: Path, **changes: object) -> str:
    from pause_ray.trial.prepare import prepare

    changed = with_overrides(trial, {path.replace("__", "."): value for path, value in changes.items()})
    return prepare(TrialSpec.parse(changed, origin="test"), cache=cache).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__context_tokens": [320, 2000]}, r"2000.*1024"),
        ({"eval__context_tokens": [40, 320]}, r"context_tokens|at least"),
        ({"eval__context_tokens": [1020]}, r"1024"),
        ({"corpus__sequence_len": 2048}, r"corpus\.sequence_len 2048.*1024"),
        ({"train__lora__rank": 5000}, r"train\.lora\.rank 5000.*hidden size"),
        ({"pauses__token": "reserved"}, r"reserved"),
        ({"model__source": "no/such/folder/here"}, r"no/such/folder/here"),
        ({"train": None, "adapter": "nowhere"}, r"nowhere"),
        ({"eval__haystack": [{"path": "/nonexistent/*.txt"}]}, r"/nonexistent"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(trial: JsonObject, tmp_path: Path, changes: JsonObject, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        digest_of(trial, tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_training_asks_as_the_evaluation_does_unless_it_says_otherwise(trial: JsonObject, tmp_path: Path) -> None:
    from pause_ray.trial.prepare import prepare

    def training_prompt(**changes: object) -> PromptSpec:
        shards = prepare(TrialSpec.parse(with_overrides(trial, changes), origin="test"), cache=tmp_path).shards
        assert shards is not None
        return shards.prompt

    assert training_prompt() == PromptSpec(system=None)
    own = {"system": "Be brief."}
    assert training_prompt(**{"corpus.prompt": own}) == PromptSpec(system="Be brief.")


def test_a_model_folder_without_a_tokenizer_is_told_how_to_get_one(trial: JsonObject, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(trial["model"]["source"]).iterdir():
        if not file.name.startswith("tokenizer"):
            (model / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.json.*save_pretrained"):
        digest_of(trial, tmp_path, model__source=str(model))


def test_an_adapter_that_was_trained_on_documents_of_the_haystack_is_refused(trial: JsonObject, tmp_path: Path) -> None:
    from pause_ray.evaluation.haystack import load_haystack
    from pause_ray.models.sources import model_digest

    model_dir = Path(trial["model"]["source"])
    suite = TrialSpec.parse(trial, origin="test").eval
    held = load_haystack(suite, cache=tmp_path, seed=0, replicate=0).document_digests

    def digest_with(name: str, documents: frozenset[str]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER):
            (folder / file).write_text("{}")
        (folder / TRAINING_LOG).write_text('{"step": 1, "loss": 1.0}\n')
        base_digest = model_digest(model_dir, cache=tmp_path)
        tokenizer_digest = ModelTokenizer.load(model_dir).digest
        seal(folder, base_digest=base_digest, tokenizer_digest=tokenizer_digest, marker=None, spec={}, document_digests=documents)
        return digest_of(trial, tmp_path, train=None, pauses=None, adapter=str(folder))

    assert digest_with("others", frozenset({"f" * 16}))
    with pytest.raises(UserError, match=rf"trained on 2 of the {len(held)} documents"):
        digest_with("same", frozenset({*held[:2], "f" * 16}))


def test_the_identity_changes_with_what_changes_the_result_and_with_nothing_else(trial: JsonObject, tmp_path: Path) -> None:
    same = digest_of(trial, tmp_path)
    assert digest_of(trial, tmp_path, resources__scoring_actors=3) == same
    changes: list[JsonObject] = [
        {"pauses__every": 2},
        {"pauses__marker": "<REST>"},
        {"train__lora__rank": 3},
        {"seed": 1},
        {"replicate": 1},
        {"eval__max_new_tokens": 5},
        {"corpus__num_sequences": 13},
    ]
    assert len({same, *(digest_of(trial, tmp_path, **change) for change in changes)}) == len(changes) + 1


def test_the_identity_follows_task_and_noise(trial: JsonObject, tmp_path: Path) -> None:
    changes: list[JsonObject] = [
        {},
        {"eval__task": {"kind": "uuid"}},
        {"eval__task": {"kind": "key_value"}, "eval__haystack": []},
        {"eval__noise": "The rain fell. The clock ticked.", "eval__haystack": []},
        {"eval__noise": "The rain fell. The clock stood.", "eval__haystack": []},
    ]
    assert len({digest_of(trial, tmp_path, eval__context_tokens=[900], **change) for change in changes}) == len(changes)


def test_training_is_held_apart_from_what_is_hidden_whichever_task_hides_it(trial: JsonObject, tmp_path: Path) -> None:
    from pause_ray.trial.prepare import prepare

    changes = {"eval.task": {"kind": "uuid"}, "eval.depth_percent": [], "eval.samples": 4, "seed": 3, "replicate": 2}
    prepared = prepare(TrialSpec.parse(with_overrides(trial, changes), origin="test"), cache=tmp_path)
    assert prepared.shards is not None
    evaluation = prepared.shards.evaluation
    assert set(evaluation.needles) == {fact.text for cell in prepared.cells for fact in cell.facts}
    assert set(evaluation.keywords) == {reference for cell in prepared.cells for reference in cell.references}
    assert len(evaluation.needles) == 4


def test_every_question_must_have_room_at_the_shortest_length(trial: JsonObject, tmp_path: Path) -> None:
    asked = {"eval__task": {"kind": "uuid"}, "eval__depth_percent": [], "train": None}

    def least(samples: int) -> int:
        with pytest.raises(UserError, match="ask for at least") as caught:
            digest_of(trial, tmp_path, **asked, eval__samples=samples, eval__context_tokens=[40])
        return int(re.findall(r"at least (\d+)", str(caught.value))[0])

    assert digest_of(trial, tmp_path, **asked, eval__samples=1, eval__context_tokens=[least(1)])
    with pytest.raises(UserError, match=f"context_tokens {least(1)} is too short"):
        digest_of(trial, tmp_path, **asked, eval__samples=20, eval__context_tokens=[least(1), 900])


def test_the_identity_does_not_depend_on_how_a_path_is_spelt(trial: JsonObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(trial, tmp_path)
    monkeypatch.chdir(Path(trial["model"]["source"]).parent)
    relative = {"model__source": "model", "eval__haystack": [{"path": "haystack/*.txt"}], "corpus__sources": [{"path": "training"}]}
    assert digest_of(trial, tmp_path, **relative) == before


def test_the_identity_follows_the_content_of_named_files(trial: JsonObject, tmp_path: Path) -> None:
    haystack = tmp_path / "haystack"
    haystack.mkdir()
    for file in Path(trial["eval"]["haystack"][0]["path"]).iterdir():
        (haystack / file.name).write_bytes(file.read_bytes())
    before = digest_of(trial, tmp_path, eval__haystack=[{"path": str(haystack)}])
    (haystack / "00.txt").write_text((haystack / "00.txt").read_text() + " One more sentence.")
    assert digest_of(trial, tmp_path, eval__haystack=[{"path": str(haystack)}]) != before


def test_the_identity_follows_the_weights_behind_a_path(trial: JsonObject, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    before = digest_of(trial, tmp_path, model__source=str(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert digest_of(trial, tmp_path, model__source=str(model)) != before
