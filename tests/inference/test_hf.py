"""The transformers engine: the same answers with reuse and without, before and after every swap."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import CheckpointError, ModelError
from pause_ray.inference.engine import Completion, EngineError, HfEngineSpec, LoadedAs, PromptStep
from pause_ray.text.tokenizer import MarkerToken, ModelTokenizer, resolve_marker
from tests.inference.prompt_steps import step_of, walk_of
from tests.inference.tiny_model import KINDS, added_marker, make_adapter, make_checkpoint, make_model

torch = pytest.importorskip("torch")
hf = pytest.importorskip("pause_ray.inference.hf")
weights = pytest.importorskip("pause_ray.models.weights")
pytestmark = pytest.mark.torch
CHUNK = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


def engine_for(model_dir: Path, *, dtype: str = "float32", marker: MarkerToken | None = None, **spec: Any) -> hf.HfEngine:
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=CHUNK, **spec), device="cpu", threads=1)
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


def ask(engine: hf.HfEngine, steps: list[PromptStep]) -> list[Completion]:
    answers: dict[int, Completion] = {}
    for index, outcome in engine.answer(steps):
        assert isinstance(outcome, Completion), outcome
        assert index not in answers
        answers[index] = outcome
    return [answers[index] for index in range(len(steps))]


def ask_all(engine: hf.HfEngine, asked: list[list[int]], **options: Any) -> list[Completion]:
    return ask(engine, walk_of(asked, grain=engine.prefix_block_size, **options))


@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("float32", "nf4"), ("bfloat16", "nf4")])
def test_answers_with_reuse_are_those_without(tmp_path: Path, dtype: str, quantize: str | None) -> None:
    tiny = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)  # bitsandbytes wants multiples of 64
    asked = prompts(12)
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=CHUNK), device="cpu", threads=1)
    engine.use(LoadedAs(model_dir=tiny, dtype=dtype, quantize=quantize))
    assert engine.prefix_block_size == (1 if (dtype, quantize) == ("float32", None) else CHUNK)
    without = ask(engine, [step_of(ids) for ids in asked])
    drafts = [answer.ids[:5] for answer in without]
    drafted = ask(engine, [step_of(ids, draft=draft) for ids, draft in zip(asked, drafts, strict=True)])
    steps = walk_of(asked, grain=engine.prefix_block_size, drafts=drafts)
    with_reuse = ask(engine, steps)
    assert [answer.ids for answer in with_reuse] == [answer.ids for answer in drafted]
    assert [answer.prefilled_tokens for answer in without] == [len(prompt) for prompt in asked]
    assert [answer.prefilled_tokens for answer in with_reuse] == [len(step.prompt.ids) - step.keep_tokens for step in steps]
    assert sum(step.keep_tokens for step in steps) > 0.3 * sum(map(len, asked))
    assert len({answer.ids for answer in without}) > 6, "a model that always says the same would prove nothing"
    if engine.prefix_block_size == 1:
        assert [answer.ids for answer in with_reuse] == [answer.ids for answer in without]
        assert [answer.margin for answer in with_reuse] == pytest.approx([answer.margin for answer in without], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_what_transformers_generates(tmp_path: Path, kind: str) -> None:
    import transformers

    folder = make_model(tmp_path / "model", kind=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = prompts(4, seed=1)
    for prompt, answer in zip(asked, ask_all(engine_for(folder), asked, drafts=[[9, 9]] * len(asked)), strict=True):
        generated = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False)
        expected = [token for token in generated[0, len(prompt) :].tolist() if token != 0]
        assert list(answer.ids) == expected
        assert answer.text == ModelTokenizer.load(folder).decode(expected)


def test_answers_in_other_shapes_are_the_same_in_float32_and_count_as_whole(tiny: Path) -> None:
    engine = engine_for(tiny)
    asked = prompts(4)
    for step, answer in zip(walk_of(asked), ask_all(engine, asked), strict=True):
        other = engine.answer_with_other_shapes(step)
        assert other.ids == answer.ids
        assert other.prefilled_tokens == len(step.prompt.ids)
        assert other.forwards >= other.decoded_tokens - 1


def test_drafts_are_left_alone_where_the_spec_says_so(tiny: Path) -> None:
    asked = prompts(3)
    plain = ask_all(engine_for(tiny), asked)
    drafts = [answer.ids for answer in plain]
    drafted, left = (ask_all(engine_for(tiny, drafts=wanted), asked, drafts=drafts) for wanted in (True, False))
    assert [answer.ids for answer in drafted] == [answer.ids for answer in left] == drafts
    assert sum(answer.forwards for answer in drafted) == 0
    assert [answer.forwards for answer in left] == [answer.forwards for answer in plain]


def test_keys_in_host_memory_change_no_answer(tiny: Path) -> None:
    asked = prompts(6, seed=8)
    assert [answer.ids for answer in ask_all(engine_for(tiny, kv="host"), asked)] == [
        answer.ids for answer in ask_all(engine_for(tiny), asked)
    ]


def test_a_model_whose_cache_cannot_be_truncated_is_computed_whole_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    folder = make_model(tmp_path / "model", kind="lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3, block_ff_dim=64)
    engine = engine_for(folder)
    asked = prompts(5)
    answers = ask(engine, walk_of(asked, grain=engine.prefix_block_size, drafts=[[9, 9]] * len(asked)))
    answers += ask(engine, walk_of(asked))
    assert [answer.prefilled_tokens for answer in answers] == 2 * [len(prompt) for prompt in asked]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, answer in zip(2 * asked, answers, strict=True):
        generated = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False)
        assert list(answer.ids) == [token for token in generated[0, len(prompt) :].tolist() if token != 0]
    assert [record.getMessage() for record in caplog.records if "cannot be truncated" in record.getMessage()] == [
        "lfm2 models keep states that cannot be truncated: every prompt is computed whole, and drafts are not verified"
    ]


def test_no_memory_for_one_prompt_is_an_engine_error_and_the_others_are_answered(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", limit_tokens=10**14)
    asked = prompts(3)
    expected = [answer.ids for answer in ask_all(engine_for(folder), asked)]
    engine = engine_for(folder)  # holds nothing yet, so already the first prompt finds no room for the longest
    steps = walk_of(asked)
    endless = step_of(asked[0], keep=5, most=10**13)
    outcomes = [outcome for _, outcome in engine.answer([steps[0], endless, *steps[1:]])]
    assert isinstance(outcomes[1], EngineError)
    assert str(outcomes[1]) == f"out of memory on a prompt of {len(asked[0])} tokens"
    assert [outcome.ids for outcome in (outcomes[0], *outcomes[2:])] == expected
    assert outcomes[2].prefilled_tokens == len(asked[1]), "what was held is lost"
    assert outcomes[3].prefilled_tokens == len(asked[2]) - steps[2].keep_tokens


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    prompt = prompts(1)[0]
    [free] = ask_all(engine_for(folder), [prompt])
    end = next(token for token in free.ids if token != free.ids[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    for draft in ((), free.ids, free.ids[:2]):
        [ended] = ask_all(engine_for(folder), [prompt], drafts=[draft])
        assert ended.ids == free.ids[: free.ids.index(end)]
        assert ended.decoded_tokens == len(ended.ids)


def test_answers_end_at_the_models_limit_and_longer_prompts_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", limit_tokens=64)
    engine = engine_for(folder)
    prompt = prompts(1)[0]
    [free] = ask_all(engine_for(make_model(tmp_path / "free")), [prompt[:60]])
    assert len(free.ids) > 4
    for draft in ((), free.ids):
        [cut] = ask_all(engine, [prompt[:60]], drafts=[draft])
        assert cut.ids == free.ids[:4]
    with pytest.raises(ModelError, match=r"64 tokens .* limit is 64"):
        ask_all(engine, [prompt[:10], prompt[:64]])


@pytest.mark.parametrize("place", [10, 199], ids=["kept", "last"])
def test_logits_that_are_not_numbers_are_an_engine_error_and_the_next_prompt_is_answered(tmp_path: Path, place: int) -> None:
    engine = engine_for(make_model(tmp_path / "model", tied=False))
    poisoned = 391
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[poisoned] = torch.nan
    asked = prompts(1)[0]
    expected = ask_all(engine, [asked])[0].ids
    outcomes = [outcome for _, outcome in engine.answer(walk_of([asked, [*asked[:place], poisoned, *asked[place + 1 :]], asked]))]
    assert isinstance(outcomes[1], EngineError)
    assert "not numbers" in str(outcomes[1])
    assert outcomes[0].ids == outcomes[2].ids == expected
    assert outcomes[2].prefilled_tokens == len(asked)


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
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=CHUNK), device="cpu", threads=1)
    fresh = {}
    for name, loaded in wanted.items():
        alone = hf.HfEngine(HfEngineSpec(chunk_tokens=CHUNK), device="cpu", threads=1)
        alone.use(loaded)
        fresh[name] = [answer.ids for answer in ask_all(alone, asked[name])]
    assert len({str(ids) for ids in fresh.values()}) == len(fresh), "each must answer differently, or a wrong swap would pass"
    base = None
    for name in [*wanted, *reversed(wanted), "marker adapter", "base", "plain adapter", "marker adapter", "marker"]:
        engine.use(wanted[name])
        base = base or engine._base.model
        assert engine._base.model is base
        assert [answer.ids for answer in ask_all(engine, asked[name])] == fresh[name], name
    engine.use(wanted["base"])
    untouched = weights.load_base(model_dir, dtype="float32", marker=None, device="cpu").state_dict()
    assert engine._base.model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in engine._base.model.state_dict().items())


def test_four_bit_weights_take_a_marker_and_an_adapter_and_give_them_back(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    marker = added_marker(model_dir)
    adapter = make_adapter(tmp_path / "adapter", model_dir, seed=1, marker=marker)
    plain = prompts(3, longest=60)
    asked = [[*prompt[:5], marker.token_id, *prompt[5:]] for prompt in plain]
    base = LoadedAs(model_dir=model_dir, dtype="bfloat16", quantize="nf4")
    marked = LoadedAs(model_dir=model_dir, dtype="bfloat16", quantize="nf4", marker=marker)
    tuned = LoadedAs(model_dir=model_dir, dtype="bfloat16", quantize="nf4", marker=marker, adapter_dir=adapter)
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=CHUNK), device="cpu", threads=1)
    said: list[list[tuple[int, ...]]] = []
    for loaded, given in 2 * ((base, plain), (marked, asked), (tuned, asked)):
        engine.use(loaded)
        said.append([answer.ids for answer in ask_all(engine, given)])
    assert said[:3] == said[3:]
    assert said[1] != said[2]
    engine.use(LoadedAs(model_dir=model_dir, dtype="bfloat16"))
    assert [answer.ids for answer in ask_all(engine, plain)] != said[0], "the precision of the weights is part of what is loaded"


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
    plain = weights.load_base(folder, dtype="float32", marker=None, device="cpu")
    model = weights.load_base(folder, dtype="float32", marker=marker, device="cpu")
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
    plain, marked = (weights.load_base(tiny, dtype="float32", marker=chosen, device="cpu") for chosen in (None, marker))
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in marked.state_dict().items())


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_base_is_refused_and_the_base_still_answers(tiny: Path, tmp_path: Path, change: dict[str, int]) -> None:
    other = make_model(tmp_path / "other", **change)
    adapter = make_adapter(tmp_path / "adapter", other, seed=1)
    engine = engine_for(tiny)
    asked = prompts(1)[0]
    expected = ask_all(engine, [asked])[0].ids
    with pytest.raises(CheckpointError, match=r"adapter .*adapter.* another base model"):
        engine.use(LoadedAs(model_dir=tiny, dtype="float32", adapter_dir=adapter))
    engine.use(LoadedAs(model_dir=tiny, dtype="float32"))
    assert ask_all(engine, [asked])[0].ids == expected


def test_folders_that_hold_no_adapter_or_no_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    engine = engine_for(tiny)
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.use(LoadedAs(model_dir=tiny, dtype="float32", adapter_dir=tmp_path))
    truncated = make_adapter(tmp_path / "adapter", tiny, seed=1)
    cut = truncated / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.use(LoadedAs(model_dir=tiny, dtype="float32", adapter_dir=truncated))
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:2000]), lambda path: path.unlink()):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tiny, broken)
        damage(broken / "model.safetensors")
        with pytest.raises(ModelError, match=r"broken: transformers cannot load it"):
            weights.load_base(broken, dtype="float32", marker=None, device="cpu")


@pytest.mark.real
def test_the_real_model_answers_a_needle_alike_with_reuse_and_without(model_dir: Path) -> None:
    from pause_ray.text.pauses import PausePolicy
    from pause_ray.text.prompts import HiddenText, PromptBuilder, PromptSpec
    from tests.evaluation.tiny import STOCK, make_text

    tokenizer = ModelTokenizer.load(model_dir)
    policy = PausePolicy(token="added")
    marker = resolve_marker(tokenizer, policy)
    builder = PromptBuilder(
        make_text(300, seed=0), rules=None, prompt=PromptSpec(), tokenizer=tokenizer, policy=policy, marker=marker, seed=0
    )
    asked = [
        builder.build([HiddenText(text=STOCK.needle, depth_percent=depth)], question=STOCK.question, context_tokens=640).ids.tolist()
        for depth in (80, 40)
    ]
    draft = tokenizer.encode(STOCK.needle).ids.tolist()
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=128), device="cpu", threads=1)
    engine.use(LoadedAs(model_dir=model_dir, dtype="float32", marker=marker.token))
    none = ask(engine, [step_of(ids, most=32) for ids in asked])
    full = ask(engine, walk_of(asked, drafts=[draft, draft], most=32))
    assert [answer.text for answer in full] == [answer.text for answer in none]
    assert engine.answer_with_other_shapes(step_of(asked[1], most=32)).text == none[1].text
    assert all("eat a sandwich" in answer.text for answer in full)
    assert full[1].prefilled_tokens < 0.8 * len(asked[1])
    assert sum(answer.forwards for answer in full) < sum(answer.forwards for answer in none) / 2
    assert all(answer.margin == pytest.approx(alone.margin, abs=1e-3) for answer, alone in zip(full, none, strict=True))
