"""Attention by document is what transformers computes with masks, for windows and bounded scores too; no neighbour is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import transformers

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 9},
}
LENGTHS = (23, 1, 9, 40)


def tiny(kind: str) -> transformers.PreTrainedModel:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from pause_ray.training import attention

    monkeypatch.setattr(attention, "BLOCK", 4)


def documents() -> tuple[list[Any], tuple[tuple[int, int], ...]]:
    import torch

    torch.manual_seed(1)
    ends = np.cumsum(LENGTHS).tolist()
    return [torch.randint(1, 120, (1, length)) for length in LENGTHS], tuple(zip([0, *ends], ends, strict=False))


def together(model: transformers.PreTrainedModel, texts: list[Any], spans: tuple[tuple[int, int], ...], *, spare: int = 0) -> Any:
    """Logits of documents that lie end to end, with ``spare`` tokens behind them."""
    import torch

    from pause_ray.training.attention import Layout

    ids = torch.nn.functional.pad(torch.cat(texts, dim=1), (0, spare))
    positions = torch.cat([torch.arange(end - begin) for begin, end in spans] + [torch.zeros(spare, dtype=torch.long)])
    return model(input_ids=ids, position_ids=positions[None], use_cache=False, layout=Layout(spans)).logits


def test_documents_end_to_end_are_what_each_is_alone_in_transformers(kind: str) -> None:
    import torch

    from pause_ray.training.attention import use_document_attention

    model, (texts, spans) = tiny(kind), documents()
    with torch.no_grad():
        alone = [model(input_ids=text, use_cache=False).logits for text in texts]
        use_document_attention(model)
        packed = together(model, texts, spans, spare=3)
    assert torch.isfinite(packed).all()
    for (begin, end), logits in zip(spans, alone, strict=True):
        assert torch.allclose(packed[:, begin:end], logits, atol=2e-5)


def test_the_gradients_are_those_of_transformers(kind: str) -> None:
    import torch

    from pause_ray.training.attention import use_document_attention

    model, (texts, spans) = tiny(kind), documents()
    torch.stack([model(input_ids=text, use_cache=False).logits.square().sum() for text in texts]).sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    use_document_attention(model)
    together(model, texts, spans).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max())), name


def test_nothing_of_a_neighbour_is_seen(kind: str) -> None:
    """Bit for bit: changing one document changes no logit of another, before it or behind it."""
    import torch

    from pause_ray.training.attention import use_document_attention

    model, (texts, spans) = tiny(kind), documents()
    use_document_attention(model)
    with torch.no_grad():
        before = together(model, texts, spans)
        texts[2] = (texts[2] + 17) % 119 + 1
        after = together(model, texts, spans)
    for number, (begin, end) in enumerate(spans):
        assert torch.equal(before[:, begin:end], after[:, begin:end]) == (number != 2)


def test_what_is_kept_for_the_backward_pass_grows_with_the_document_not_with_its_square() -> None:
    import torch

    from pause_ray.training.attention import Layout, _attend

    def kept_bytes(tokens: int, **rule: Any) -> int:
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        query, key, value = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            seen, _ = _attend(torch.nn.Module(), query, key, value, None, layout=Layout(((0, tokens),)), **rule)
        assert seen.requires_grad
        return sum(kept.values())

    for rule in ({}, {"sliding_window": 16}, {"softcap": 2.0}, {"softcap": 2.0, "sliding_window": 16}):
        assert kept_bytes(512, **rule) < 2.2 * kept_bytes(256, **rule), rule


@pytest.mark.parametrize(
    ("heads", "groups", "workers", "most_groups"), [(4, 2, 2, 1), (9, 3, 2, 2), (8, 2, 4, 1), (9, 3, 4, 3), (6, 1, 3, 1), (5, 5, 3, 2)]
)
def test_heads_are_shared_equally_with_the_keys_of_their_queries(heads: int, groups: int, workers: int, most_groups: int) -> None:
    import torch

    from pause_ray.training.attention import even_heads

    query = torch.arange(heads).reshape(1, 1, heads, 1) + 1.0
    key = torch.arange(groups).reshape(1, 1, groups, 1) + 1.0
    shared_query, shared_key, shared_value = even_heads(query, key, key, workers=workers)
    assert shared_query.shape[2] % workers == shared_key.shape[2] % workers == shared_query.shape[2] % shared_key.shape[2] == 0
    assert shared_key.shape[2] // workers == most_groups
    assert torch.equal(shared_key, shared_value)
    each = shared_query.shape[2] // shared_key.shape[2]
    pairs = [(int(number), int(shared_key[0, 0, place // each])) for place, number in enumerate(shared_query.flatten()) if number]
    assert pairs == [(head + 1, head // (heads // groups) + 1) for head in range(heads)]


def test_layers_of_an_unknown_type_are_refused() -> None:
    from pause_ray.core.errors import ModelError
    from pause_ray.training.attention import use_document_attention

    model = tiny("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelError, match="llama has layers of type chunked_attention"):
        use_document_attention(model)
