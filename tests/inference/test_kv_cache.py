"""Keys and values in place hold what transformers' own layers hold, at every length and after every return."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
kv = pytest.importorskip("pause_ray.inference.kv_cache")
pytestmark = pytest.mark.torch


def states(tokens: int, *, seed: int = 0) -> Any:
    return torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_what_is_seen_is_what_transformers_layers_show(window: int | None, host: bool) -> None:
    draw = random.Random(0)
    layer = kv.PrefixLayer(window=window, host=host)
    stock = transformers.cache_utils.DynamicSlidingWindowLayer(window) if window else transformers.cache_utils.DynamicLayer()
    for number in range(40):
        new = draw.choice([1, 1, 2, 5, 9])
        keys, values = states(new, seed=number), states(new, seed=-1 - number)
        assert layer.get_mask_sizes(new) == stock.get_mask_sizes(new)
        seen, expected = layer.update(keys, values), stock.update(keys, values)
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
        assert layer.get_seq_length() == stock.get_seq_length()
        assert layer.is_sliding == stock.is_sliding


@pytest.mark.parametrize("window", [None, 5])
def test_after_truncation_the_dropped_tokens_leave_no_trace(window: int | None) -> None:
    keys, values = states(60), states(60, seed=1)
    straight, truncated = kv.PrefixLayer(window=window), kv.PrefixLayer(window=window)
    straight.update(keys[:, :, :20], values[:, :, :20])
    truncated.update(keys[:, :, :7], values[:, :, :7])
    truncated.update(*(states(30, seed=seed) for seed in (2, 3)))
    truncated.truncate(7)
    truncated.update(keys[:, :, 7:30], values[:, :, 7:30])
    truncated.truncate(20)
    truncated.truncate(25)
    assert straight.num_tokens == truncated.num_tokens == 20
    assert straight.get_mask_sizes(3) == truncated.get_mask_sizes(3)
    one, other = (layer.update(keys[:, :, 20:], values[:, :, 20:]) for layer in (straight, truncated))
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_writing_moves_nothing_that_is_held_where_room_was_reserved() -> None:
    layer = kv.PrefixLayer()
    layer.reserve(100)
    layer.update(states(3), states(3))
    place, size = layer.keys.data_ptr(), layer.num_bytes
    assert size == 2 * 2 * 100 * 4 * 4
    for _ in range(97):
        seen, _values = layer.update(states(1), states(1))
        assert seen.data_ptr() == place
    assert layer.num_bytes == size
    layer.update(states(1), states(1))
    assert layer.num_bytes > size


def test_growing_without_a_reservation_copies_less_than_twice_the_prefix() -> None:
    layer = kv.PrefixLayer()
    copied = 0
    for held in range(5000):
        before = layer.keys.data_ptr() if held else None
        layer.update(states(1), states(1))
        copied += held if layer.keys.data_ptr() != before else 0
    assert copied < 3 * 5000
    assert layer.keys.shape[2] < 1.5 * 5000


def test_models_with_recurrent_states_have_no_prefix_cache() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    attending = transformers.AutoConfig.for_model("llama", **sizes)
    recurrent = transformers.AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], **sizes)
    assert kv.prefix_cache(recurrent, host=False) is None
    cache = kv.prefix_cache(attending, host=False)
    assert len(cache.layers) == 2
    assert cache.num_bytes == 0
