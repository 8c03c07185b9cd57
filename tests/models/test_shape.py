"""Predicted operations and bytes are those that torch counts and holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import ModelError
from pause_ray.models.shape import ModelShape
from tests.inference.tiny_model import KINDS, WINDOW, make_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_operations_and_bytes_are_those_counted(tmp_path: Path, kind: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from pause_ray.inference import kv_cache
    from pause_ray.inference import prefix_attention as attention
    from pause_ray.models import weights

    folder = make_model(tmp_path / "model", kind=kind, tied=tied)
    shape = ModelShape.load(folder)
    model = weights.load_base(folder, dtype="float32", marker=None, device="cpu")
    attention.use_prefix_attention(model)
    cache = kv_cache.prefix_cache(model.config, host=False)
    past = 0
    for new, rows in ((30, 1), (1, 1), (16, 16), (40, 5), (3, 3), (1, 1)):
        with torch.inference_mode(), attention.flop_counter() as counter:
            model(input_ids=torch.full((1, new), 7), past_key_values=cache, use_cache=True, logits_to_keep=rows)
        assert counter.get_total_flops() == shape.forward_flops(new_tokens=new, past_tokens=past, logit_rows=rows)
        past += new
    cache = kv_cache.prefix_cache(model.config, host=False)
    cache.reserve(past)
    with torch.inference_mode():
        model(input_ids=torch.full((1, past), 7), past_key_values=cache, use_cache=True)
    assert cache.num_bytes == past * shape.kv_bytes_per_token(4)
    matrices = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters() if tensor.ndim == 2}
    assert shape.weight_bytes("float32") == sum(matrices.values()) == 2 * shape.weight_bytes("bfloat16")


@pytest.mark.torch
def test_operations_of_a_prompt_are_those_of_its_chunks_and_its_draft(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from pause_ray.inference import decoding
    from pause_ray.inference import prefix_attention as attention
    from pause_ray.models import weights
    from tests.inference.prompt_steps import step_of

    folder = make_model(tmp_path / "model", kind="mistral")
    model = weights.load_base(folder, dtype="float32", marker=None, device="cpu")
    attention.use_prefix_attention(model)
    decoder = decoding.GreedyDecoder(model, model.config, chunk_tokens=16, prefix_block_size=1)
    for ids, keep, draft in (([7] * 50, 0, []), ([7] * 40 + [8] * 24, 40, [9, 9, 9])):
        step = step_of(ids, keep=keep, draft=draft, most=1 + len(draft))
        answer = decoding.Answer(max_tokens=step.max_new_tokens, end_ids=frozenset(range(400)), reference=step.draft_ids)
        with torch.inference_mode(), attention.flop_counter() as counter:
            decoder.decode(step.prompt.ids, answer, keep_tokens=keep, drafts=True)
        assert answer.forwards == 0, "every token ends the answer"
        expected = ModelShape.load(folder).prompt_flops(prompt_tokens=len(ids), kept_tokens=keep, chunk_tokens=16, draft_tokens=len(draft))
        assert counter.get_total_flops() == expected


@pytest.mark.torch
def test_four_bit_weights_take_what_is_predicted(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    weights = pytest.importorskip("pause_ray.models.weights")
    folder = make_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    model = weights.load_base(folder, dtype="bfloat16", marker=None, device="cpu", quantize="nf4")
    held = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and (weight.ndim == 2 or hasattr(weight, "quant_state")):
            held += weight.nbytes
            if hasattr(weight, "quant_state"):
                held += weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
    table = model.get_output_embeddings().weight.nbytes  # seen twice: it is the input's too
    assert ModelShape.load(folder).weight_bytes("bfloat16", "nf4") == pytest.approx(held - table, rel=1e-3)


def test_a_window_costs_no_more_than_it_shows() -> None:
    whole, sliding = (ModelShape.from_config(LLAMA | {"sliding_window": window}) for window in (None, WINDOW))
    assert whole.windows == (None, None)
    assert sliding.windows == (WINDOW, WINDOW)
    for past in (0, WINDOW - 1):
        costs = {shape.forward_flops(new_tokens=5, past_tokens=past, logit_rows=1) for shape in (whole, sliding)}
        assert len(costs) == 1
    far = [shape.forward_flops(new_tokens=5, past_tokens=past, logit_rows=1) for shape in (sliding,) for past in (WINDOW - 1, 10_000)]
    assert far[0] == far[1] < whole.forward_flops(new_tokens=5, past_tokens=WINDOW, logit_rows=1)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "qwen2", "sliding_window": 9}, [None] * 4),
        ({"model_type": "qwen3", "sliding_window": 9, "use_sliding_window": False}, [None] * 4),
        ({"model_type": "qwen3", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 9]),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "phi3", "sliding_window": 9}, [9] * 4),
        ({"model_type": "gemma2", "sliding_window": 9}, [9, None, 9, None]),
        ({"model_type": "gemma3_text", "sliding_window": 9, "sliding_window_pattern": 2}, [9, None, 9, None]),
        ({"model_type": "gemma3_text", "sliding_window": 9}, [9] * 4),
        ({"model_type": "gemma2", "sliding_window": None}, [None] * 4),
        ({"model_type": "llama", "layer_types": ["full_attention"] * 4, "sliding_window": 9}, [None] * 4),
    ],
)
def test_windows_are_read_as_transformers_reads_them(config: dict[str, Any], windows: list[int | None]) -> None:
    found = ModelShape.from_config(LLAMA | {"num_hidden_layers": 4} | config).windows
    assert list(found) == windows


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text")),
        ("qwen3", {"use_sliding_window": True}),
    ],
)
def test_defaults_are_transformers_defaults(kind: str, more: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    given = {name: value for name, value in LLAMA.items() if name != "model_type"} | {"num_hidden_layers": 30} | more
    if kind.startswith("gemma"):
        given = {name: given[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    full = transformers.AutoConfig.for_model(kind, **given)
    expected = ModelShape.from_config(json.loads(full.to_json_string(use_diff=False)))
    assert ModelShape.from_config(given | {"model_type": kind}) == expected


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True}),
        ("phi3", {"pad_token_id": 0}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapters_are_counted_to_the_last_one(kind: str, config: dict[str, Any], tied: bool) -> None:
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    sizes = {name: value for name, value in LLAMA.items() if name != "model_type"} | {"head_dim": 24, "num_key_value_heads": 2}
    full = transformers.AutoConfig.for_model(kind, **(sizes | {"tie_word_embeddings": tied} | config))
    shape = ModelShape.from_config(json.loads(full.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(full)
    assert model.num_parameters() == shape.num_parameters
    assert shape.weight_bytes("float32") == 4 * sum(p.numel() for p in model.parameters() if p.ndim == 2)
    linear = {name.rpartition(".")[2]: layer for name, layer in model.named_modules() if ".layers.0." in name and "proj" in name}
    assert {name: (layer.in_features, layer.out_features) for name, layer in linear.items()} == shape.linear_layers
    for targets, dora in ((None, False), (["down_proj", "o_proj"], True)):
        lora = peft.LoraConfig(r=3, target_modules=targets or "all-linear", use_dora=dora, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(copy.deepcopy(model), lora, low_cpu_mem_usage=True)
        assert adapted.get_nb_trainable_parameters()[0] == shape.lora_parameters(3, targets=targets, dora=dora)


def test_the_text_part_of_a_model_for_images_counts() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    shape = ModelShape.from_config({"model_type": "gemma3", "text_config": text})
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.vocab_size, shape.tied) == (8, 4, 256, 262_208, True)
    assert shape.windows.count(None) == 34 // 6


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"layer_types": ["full_attention"]}, "layer_types .*: 2 of full_attention or sliding_attention are needed"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types .*linear_attention"),
        ({"layer_types": 5}, "layer_types 5 "),
        ({"layer_types": [["full_attention"], {}]}, "layer_types "),
        ({"text_config": "none"}, "text_config is 'none'"),
        ({"sliding_window": 9, "sliding_window_pattern": "2"}, "sliding_window_pattern is '2'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is None"),
    ],
)
def test_a_config_that_cannot_be_read_is_told_by_file_and_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ModelError, match=rf"config\.json: {field}"):
        ModelShape.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_config_that_is_no_object_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: (holds no JSON object|cannot be read as JSON)"):
        ModelShape.load(tmp_path)
