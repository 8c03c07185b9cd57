"""The transformers engine: the same answers with reuse and without, before and after every swap."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pause_ray.engines.engine import Completion, EngineError, LoadedAs
from pause_ray.errors import CheckpointError, ModelError
from pause_ray.text.tokens import MarkerToken, ModelTokenizer, resolve_marker
from tests.engines.tiny_model import added_marker, make_adapter, make_checkpoint, make_model

torch = pytest.importorskip("torch")
hf = pytest.importorskip("pause_ray.engines.hf")
pytestmark = pytest.mark.torch
CHUNK = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


def engine_for(model_dir: Path, *, dtype: str = "float32", marker: MarkerToken | None = None, reuse: bool = True) -> hf.HfEngine:
    engine = hf.HfEngine(device="cpu", threads=1, chunk_tokens=CHUNK, reuse=reuse)
    engine.use(LoadedAs(model_dir=model_dir, dtype=dtype, marker=marker))
    return engine


def prompts(count: int, *, seed: int = 0, longest: int = 200, vocabulary: int = 390) -> list[list[int]]:
    """Prompts that share beginnings of all lengths with the one before, exact multiples of the chunk among them."""
    draw = random.Random(seed)
    made = [[draw.randrange(2, vocabulary) for _ in range(longest)]]
    for number in range(count - 1):
        shared = draw.randrange(0, len(made[-1]) + 1)
        length = draw.randrange(shared + 1, longest + 2)
        length += -length % CHUNK if number % 3 == 0 else 0
        made.append([*made[-1][:shared], *(draw.randrange(2, vocabulary) for _ in range(length - shared))])
    return [*made, made[-1], made[-1][: CHUNK + 1], made[-1][:CHUNK], made[-1][:1]]


def ask_all(engine: hf.HfEngine, asked: list[list[int]]) -> list[Completion]:
    return [engine.complete(prompt, max_new_tokens=12) for prompt in asked]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_with_reuse_are_those_without(tiny: Path, dtype: str) -> None:
    asked = prompts(12)
    with_reuse = ask_all(engine_for(tiny, dtype=dtype), asked)
    without = ask_all(engine_for(tiny, dtype=dtype, reuse=False), asked)
    assert [answer.ids for answer in with_reuse] == [answer.ids for answer in without]
    assert [answer.prefilled_tokens for answer in without] == [len(prompt) for prompt in asked]
    assert len({answer.ids for answer in without}) > 6, "a model that always says the same would prove nothing"
    for (before, prompt), answer in zip(pairwise(asked), with_reuse[1:], strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), min(len(before), len(prompt)))
        usable = min(shared, len(prompt) - 1, len(before))
        assert answer.prefilled_tokens == len(prompt) - usable // CHUNK * CHUNK


def test_the_last_logits_with_reuse_are_equal_bit_by_bit(tiny: Path) -> None:
    asked = prompts(8, seed=3)
    kept = {}
    for reuse in (True, False):
        engine = engine_for(tiny, dtype="bfloat16", reuse=reuse)
        ask_all(engine, asked[:-1])
        reader = engine._reader
        kept[reuse] = []
        plain = reader._forward
        reader._forward = lambda ids, plain=plain, seen=kept[reuse]: seen.append(plain(ids)) or seen[-1]
        engine.complete(asked[0], max_new_tokens=8)
    assert all(torch.equal(left, right) for left, right in zip(reversed(kept[True]), reversed(kept[False]), strict=False))


def test_the_answer_is_what_transformers_generates(tiny: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for prompt in prompts(6, seed=1):
        generated = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False)
        expected = [token for token in generated[0, len(prompt) :].tolist() if token != 0]
        answer = engine_for(tiny).complete(prompt, max_new_tokens=12)
        assert list(answer.ids) == expected
        assert answer.text == ModelTokenizer.load(tiny).decode(expected)


def test_layers_with_sliding_windows_are_computed_anew_and_rightly(tmp_path: Path) -> None:
    sliding = make_model(tmp_path / "model")
    config = json.loads((sliding / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24}
    (sliding / "config.json").write_text(json.dumps(config))
    asked = prompts(6)
    answers = ask_all(engine_for(sliding), asked)
    assert [answer.ids for answer in answers] == [answer.ids for answer in ask_all(engine_for(sliding, reuse=False), asked)]
    assert [answer.prefilled_tokens for answer in answers] == [len(prompt) for prompt in asked]


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    prompt = prompts(1)[0]
    free = engine_for(folder).complete(prompt, max_new_tokens=12)
    end = next(token for token in free.ids if token != free.ids[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    ended = engine_for(folder).complete(prompt, max_new_tokens=12)
    assert ended.ids == free.ids[: free.ids.index(end)]
    assert ended.decoded_tokens == len(ended.ids)


def test_answers_end_at_the_models_limit_and_longer_prompts_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", limit_tokens=64)
    engine = engine_for(folder)
    prompt = prompts(1)[0]
    assert len(engine.complete(prompt[:60], max_new_tokens=12).ids) <= 4
    with pytest.raises(ModelError, match=r"64 tokens .* limit is 64"):
        engine.complete(prompt[:64], max_new_tokens=1)


def test_logits_that_are_not_numbers_are_an_engine_error_and_the_next_prompt_is_answered(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    engine = engine_for(folder)
    asked = prompts(1)[0]
    expected = engine.complete(asked, max_new_tokens=4)
    poisoned = 391
    with torch.no_grad():
        engine._base.model.get_input_embeddings().weight[poisoned] = torch.nan
        engine._base.model.get_output_embeddings().weight[poisoned] = torch.nan
    with pytest.raises(EngineError, match="not numbers"):
        engine.complete([*asked, poisoned], max_new_tokens=4)
    with torch.no_grad():
        engine._base.model.get_input_embeddings().weight[poisoned] = 0
    assert engine.complete(asked, max_new_tokens=4).ids == expected.ids


@pytest.mark.parametrize("tied", [True, False])
def test_swapping_adapters_and_markers_gives_the_same_answers_and_keeps_the_base(tmp_path: Path, tied: bool) -> None:
    model_dir = make_model(tmp_path / "model", tied=tied)
    marker = added_marker(model_dir)
    other = added_marker(model_dir, "[wait]")
    with_marker = [[*prompt[:5], marker.token_id, *prompt[5:]] for prompt in prompts(3, longest=60)]
    plain = make_adapter(tmp_path / "plain", model_dir, seed=1)
    marked = make_adapter(tmp_path / "marked", model_dir, seed=2, marker=marker)
    wanted = {
        "base": LoadedAs(model_dir=model_dir, dtype="float32"),
        "marker": LoadedAs(model_dir=model_dir, dtype="float32", marker=marker),
        "other marker": LoadedAs(model_dir=model_dir, dtype="float32", marker=other),
        "plain adapter": LoadedAs(model_dir=model_dir, dtype="float32", adapter_dir=plain),
        "marker adapter": LoadedAs(model_dir=model_dir, dtype="float32", marker=marker, adapter_dir=marked),
    }
    asked = {name: with_marker if loaded.marker else prompts(3, longest=60) for name, loaded in wanted.items()}
    engine = hf.HfEngine(device="cpu", threads=1, chunk_tokens=CHUNK)
    fresh = {}
    for name, loaded in wanted.items():
        alone = hf.HfEngine(device="cpu", threads=1, chunk_tokens=CHUNK)
        alone.use(loaded)
        fresh[name] = [answer.ids for answer in ask_all(alone, asked[name])]
    assert len({str(ids) for ids in fresh.values()}) == len(fresh), "each must answer differently, or a wrong swap would pass"
    weights = None
    for name in [*wanted, *reversed(wanted), "marker adapter", "base", "plain adapter", "marker adapter", "marker"]:
        engine.use(wanted[name])
        weights = weights or engine._base.model
        assert engine._base.model is weights
        assert [answer.ids for answer in ask_all(engine, asked[name])] == fresh[name], name
    engine.use(wanted["base"])
    untouched = hf.load_base(model_dir, dtype="float32", marker=None, device="cpu").state_dict()
    assert engine._base.model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in engine._base.model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_with_an_added_marker_also_answers_prompts_without_pauses(tmp_path: Path, tied: bool) -> None:
    model_dir = make_model(tmp_path / "model", tied=tied)
    marker = added_marker(model_dir)
    folder = make_checkpoint(tmp_path / "checkpoint", model_dir, seed=1, marker=marker)
    asked = prompts(4, longest=60)
    answers = {}
    for named in (marker, None):
        engine = engine_for(model_dir)
        engine.use(LoadedAs(model_dir=model_dir, dtype="float32", marker=named, adapter_dir=folder))
        answers[named] = [answer.ids for answer in ask_all(engine, asked)]
    assert answers[None] == answers[marker]
    base = engine_for(model_dir)
    assert answers[None] != [answer.ids for answer in ask_all(base, asked)]
    engine.use(LoadedAs(model_dir=model_dir, dtype="float32"))
    assert [answer.ids for answer in ask_all(engine, asked)] == [answer.ids for answer in ask_all(base, asked)]


@pytest.mark.parametrize("tied", [True, False])
def test_an_added_marker_starts_as_the_mean_of_its_text_in_both_tables(tmp_path: Path, tied: bool) -> None:
    folder = make_model(tmp_path / "model", tied=tied)
    marker = added_marker(folder)
    plain = hf.load_base(folder, dtype="float32", marker=None, device="cpu")
    model = hf.load_base(folder, dtype="float32", marker=marker, device="cpu")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(plain, name)().weight, getattr(model, name)().weight
        assert new.shape[0] == old.shape[0] + 1
        assert torch.equal(new[:-1], old)
        assert torch.allclose(new[-1], old[list(marker.initial_ids)].mean(0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_spare_row_is_used_before_the_tables_grow_and_is_put_back(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", vocab_size=512)
    marker = added_marker(folder)
    engine = engine_for(folder)
    table = engine._base.model.get_input_embeddings().weight
    before = table.clone()
    engine.use(LoadedAs(model_dir=folder, dtype="float32", marker=marker))
    assert table.shape[0] == 512
    assert torch.allclose(table[marker.token_id], before[list(marker.initial_ids)].mean(0))
    engine.use(LoadedAs(model_dir=folder, dtype="float32"))
    assert torch.equal(table, before)


def test_a_reserved_markers_row_stays_as_the_model_has_it(tiny: Path) -> None:
    marker = MarkerToken(text="<|start|>", token_id=1, added=False, initial_ids=(50, 60))
    plain, marked = (hf.load_base(tiny, dtype="float32", marker=chosen, device="cpu") for chosen in (None, marker))
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in marked.state_dict().items())


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_base_is_refused_and_the_base_still_answers(tiny: Path, tmp_path: Path, change: dict[str, int]) -> None:
    other = make_model(tmp_path / "other", **change)
    adapter = make_adapter(tmp_path / "adapter", other, seed=1)
    engine = engine_for(tiny)
    asked = prompts(1)[0]
    expected = engine.complete(asked, max_new_tokens=6).ids
    with pytest.raises(CheckpointError, match=r"adapter .*adapter.* another base model"):
        engine.use(LoadedAs(model_dir=tiny, dtype="float32", adapter_dir=adapter))
    engine.use(LoadedAs(model_dir=tiny, dtype="float32"))
    assert engine.complete(asked, max_new_tokens=6).ids == expected


def test_folders_that_hold_no_adapter_or_no_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    engine = engine_for(tiny)
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.use(LoadedAs(model_dir=tiny, dtype="float32", adapter_dir=tmp_path))
    truncated = make_adapter(tmp_path / "adapter", tiny, seed=1)
    weights = truncated / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.use(LoadedAs(model_dir=tiny, dtype="float32", adapter_dir=truncated))
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:2000]), lambda path: path.unlink()):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tiny, broken)
        damage(broken / "model.safetensors")
        with pytest.raises(ModelError, match=r"broken: transformers cannot load it"):
            hf.load_base(broken, dtype="float32", marker=None, device="cpu")


@pytest.mark.real
def test_the_real_model_answers_a_needle_alike_with_reuse_and_without(model_dir: Path) -> None:
    from pause_ray.needle.task import NeedleSpec
    from pause_ray.text.prompts import PromptSpec, build_prompt
    from tests.needle.tiny import STOCK, make_text

    tokenizer = ModelTokenizer.load(model_dir)
    spec: NeedleSpec = STOCK

    def prompt_at(depth_percent: float) -> list[int]:
        built = build_prompt(
            haystack=make_text(300, seed=0),
            needle=spec.needle,
            question=spec.question,
            context_tokens=640,
            depth_percent=depth_percent,
            prompt=PromptSpec(),
            tokenizer=tokenizer,
            policy=None,
            marker=resolve_marker(tokenizer, None),
            seed=0,
        )
        return np.asarray(built.ids).tolist()

    texts = {}
    for reuse in (True, False):
        engine = hf.HfEngine(device="cpu", threads=1, chunk_tokens=128, reuse=reuse)
        engine.use(LoadedAs(model_dir=model_dir, dtype="float32"))
        answers = [engine.complete(prompt_at(depth), max_new_tokens=16) for depth in (80, 40)]
        texts[reuse] = [answer.text for answer in answers]
        assert (answers[1].prefilled_tokens < 640) == reuse
    assert texts[True] == texts[False]
    assert all("eat a sandwich" in text for text in texts[True])
