"""Properties of the loss and its gradients, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pause_ray.data.shards import NO_LOSS, PackedRow
from pause_ray.training.batching import collate, num_loss_tokens
from pause_ray.training.spec import TrainSpec
from tests.training.tiny_llama import added_marker, make_model, make_rows

if TYPE_CHECKING:
    from pause_ray.text.tokenizer import MarkerToken
    from pause_ray.training.loss import LossModel

pytestmark = pytest.mark.torch


def loss_model(llama: Path, *, marker: MarkerToken | None = None, **train: Any) -> LossModel:
    """With an adapter that changes something: PEFT's second matrix begins at zero."""
    import torch

    from pause_ray.training.loss import LossModel
    from pause_ray.training.model import load_trainable

    spec = TrainSpec(precision="float32", **train)
    model = load_trainable(spec, model_dir=llama, marker=marker, seed=0, device="cpu", stage=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return LossModel(model)


def gradients(model: LossModel, rows: list[PackedRow]) -> dict[str, Any]:
    from pause_ray.training.loss import tensors

    model.zero_grad()
    model(**tensors(collate(rows), device="cpu")).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def packed(*documents: list[int], learned: set[int]) -> PackedRow:
    """One row of these documents, with loss in those of the given numbers only."""
    ids = np.concatenate([np.array(document, np.int32) for document in documents])
    number = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    labels = np.where(np.isin(number, sorted(learned)), ids, NO_LOSS).astype(np.int32)
    starts = np.flatnonzero(np.diff(number, prepend=-1)).astype(np.int32)
    return PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=len(documents), document_starts=starts)


def loss_of(model: LossModel, rows: list[PackedRow]) -> float:
    from pause_ray.training.loss import tensors

    return float(model(**tensors(collate(rows), device="cpu")).detach())


def test_the_loss_of_a_batch_is_the_sum_of_its_rows(llama: Path) -> None:
    model, rows = loss_model(llama), make_rows(6)
    assert loss_of(model, rows) == pytest.approx(sum(loss_of(model, [row]) for row in rows), rel=1e-5)


@pytest.mark.parametrize("learned", ["all", "some"])
def test_the_loss_is_the_one_of_transformers(llama: Path, learned: str) -> None:
    import torch
    import transformers

    ids = np.random.default_rng(3).integers(2, 290, size=30, dtype=np.int32)
    labels = ids.copy() if learned == "all" else np.where(np.arange(30) % 11 == 5, ids, NO_LOSS).astype(np.int32)
    row = PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama)
    mean = theirs(input_ids=torch.from_numpy(ids).long()[None], labels=torch.from_numpy(labels).long()[None]).loss.item()
    model = loss_model(llama)
    with model.model.disable_adapter():
        ours = loss_of(model, [row])
    assert ours == pytest.approx(mean * num_loss_tokens(row), rel=1e-5)


def test_a_changed_neighbour_changes_no_gradient_of_a_document(llama: Path) -> None:
    import torch

    model = loss_model(llama)
    own, left, right = list(range(20, 50)), list(range(60, 77)), list(range(100, 131))
    before = gradients(model, [packed(left, own, right, learned={1})])
    changed = [token + 50 for token in left], [token + 50 for token in right]
    after = gradients(model, [packed(changed[0], own, changed[1], learned={1})])
    alone = gradients(model, [packed(own, learned={0})])
    assert before.keys() == after.keys() == alone.keys()
    for name, gradient in before.items():
        assert gradient.any()
        assert torch.equal(gradient, after[name]), name
        assert torch.allclose(gradient, alone[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name
    seen = gradients(model, [packed(left + own, right, learned={0})])
    assert any(not torch.allclose(gradient, seen[name], rtol=1e-2) for name, gradient in before.items()), "one document would be seen"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_logits", [1, 300 * 7, 2**24])
def test_loss_and_gradients_are_those_of_whole_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, chunk_logits: int
) -> None:
    """The marker's row, which is an output row too where the tables are tied, learns from both."""
    import torch

    from pause_ray.training import loss

    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    llama = make_model(tmp_path / "model", tied=tied)
    marker = added_marker(llama)
    model, rows = loss_model(llama, marker=marker), make_rows(5, marker_id=marker.token_id)
    rows.append(packed([5, marker.token_id, 9, 11, marker.token_id], learned={0}))
    assert model.output is not None
    found = loss_of(model, rows), gradients(model, rows)
    model.output = None
    whole = loss_of(model, rows), gradients(model, rows)
    assert found[0] == pytest.approx(whole[0], rel=1e-5)
    assert found[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_slope_of_the_chunked_loss_is_the_derivative(softcap: float | None) -> None:
    import torch

    from pause_ray.training.loss import _SummedLoss, _Table

    torch.manual_seed(0)
    weight, targets = torch.randn(11, 5, dtype=torch.float64), torch.tensor([3, 0, 10, 3])
    hidden, rows, bias = torch.randn(4, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True), torch.randn(11)
    loss: torch.Tensor = _SummedLoss.apply(hidden, rows, targets, _Table(weight.float(), bias, [3, 7], softcap))  # type: ignore[no-untyped-call]
    torch.autograd.backward(2.5 * loss)
    own, own_rows = (states.detach().double().requires_grad_() for states in (hidden, rows))
    trained = torch.tensor([3, 7])
    logits = own @ weight.index_copy(0, trained, own_rows).T + bias.double().index_fill(0, trained, 0)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    torch.autograd.backward(2.5 * torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    for found, wanted in ((hidden.grad, own.grad), (rows.grad, own_rows.grad)):
        assert found is not None
        assert wanted is not None
        assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(llama: Path) -> None:
    import torch

    rows = [*make_rows(4), packed(list(range(20, 60)), list(range(90, 110)), learned={0, 1})]
    kept, recomputed = (gradients(loss_model(llama, gradient_checkpointing=on), rows) for on in (False, True))
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())


def test_a_part_without_a_learned_token_has_loss_zero_and_a_gradient(llama: Path) -> None:
    """Under ZeRO and sequence parallelism every worker must take part in the backward pass."""
    model, row = loss_model(llama), packed(list(range(20, 40)), learned=set())
    assert loss_of(model, [row]) == 0
    assert all(not gradient.any() for gradient in gradients(model, [row]).values())


class Largest:
    """The largest tensor that any operation made while this is entered."""

    def __init__(self) -> None:
        self.numbers = 0

    def __enter__(self) -> Largest:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        record = self

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found = func(*args, **(kwargs or {}))
                made = found if isinstance(found, tuple | list) else [found]
                record.numbers = max([record.numbers, *(tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor))])
                return found

        self._mode = Watch()
        self._mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._mode.__exit__(*raised)


def test_neither_whole_logits_nor_a_mask_is_ever_made(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pause_ray.training import loss

    row = packed(*(list(range(20, 220)) for _ in range(3)), learned={0, 1, 2})
    model = loss_model(llama)
    with Largest() as whole:
        gradients(model, [row])
    assert whole.numbers == 597 * 300, "the logits of all learned tokens, as they fit into one chunk"
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 300 * 16)
    with Largest() as chunked:
        gradients(model, [row])
    assert chunked.numbers <= 64 * 600, "nothing larger than the MLP's activations: no logits, and no mask of tokens × tokens"
