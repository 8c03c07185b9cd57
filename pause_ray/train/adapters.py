"""Several adapters on one frozen base, each acting on its own tokens of a sequence. Knows torch and PEFT, no Ray and no optimizer.

Rows lie end to end and documents attend to themselves alone, so what one adapter does reaches no other one's tokens: losses and
gradients are those that each would have alone. The base model goes over all tokens at once; an adapter's own matrices, its vocabulary
row and its dropout go over its own. First values and files are those of an adapter that is trained alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from pause_ray.engines.weights import empty_base, load_base
from pause_ray.errors import ModelError, SpecError
from pause_ray.rows import NO_LOSS, PackedRow
from pause_ray.train.assignment import Assignment
from pause_ray.train.loop import collate, num_labelled
from pause_ray.train.loss import LossModel, tensors
from pause_ray.train.model import ADAPTER, TrainedRow, adapter_config, start_adapter


def name_of(index: int) -> str:
    """PEFT's name for the adapter of the ``index``-th assignment; no name is the beginning of another."""
    return f"adapter_{index:04}"


def name_alone(parameter: str, adapter: str) -> str:
    """The name that a parameter of ``adapter`` has where the adapter is trained alone."""
    return ".".join(ADAPTER if part == adapter else part for part in parameter.split("."))


class DropoutStream:
    """The random numbers of one adapter's dropout: those that it would draw if nothing else drew any."""

    def __init__(self, device: torch.device) -> None:
        """On ``device``, whose generator is borrowed for every draw."""
        self._device = device
        self._state = torch.empty(0)
        self._before: dict[int, torch.Tensor] = {}

    def begin_step(self, seed: int) -> None:
        """Start anew from ``seed``."""
        torch.manual_seed(seed)
        self._state = self._generator_state()

    def begin_pass(self) -> None:
        """Forget which layers have drawn: each draws once in a forward pass, and once more, the same, where that is computed again."""
        self._before.clear()

    @contextlib.contextmanager
    def resumed(self, layer: nn.Module) -> Iterator[None]:
        """Let ``layer`` draw from this stream inside the block."""
        again = id(layer) in self._before
        before = self._before.setdefault(id(layer), self._state)
        self._set_generator_state(before)
        yield
        if not again:
            self._state = self._generator_state()

    def _generator_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set_generator_state(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


class _StreamDropout(nn.Dropout):
    def __init__(self, p: float, stream: DropoutStream) -> None:
        super().__init__(p)
        self._stream = stream

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        with self._stream.resumed(self):
            return super().forward(x)


@dataclass
class _Spans:
    """Whose tokens the running pass has; set by the loss, read by every layer. Adapters stand in the order of their tokens."""

    tokens: dict[str, int] = field(default_factory=dict)
    """Adapter → tokens."""
    learned: dict[str, int] = field(default_factory=dict)
    """Adapter → tokens with a loss."""

    def split(self, states: torch.Tensor, *, dim: int, learned: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Each adapter with its part of ``states`` along ``dim``.

        Raises:
            ModelError: the model does not hand all tokens to the layer.
        """
        counts = self.learned if learned else self.tokens
        if states.shape[dim] != sum(counts.values()):
            raise ModelError(
                f"a layer is given {states.shape[dim]} of {sum(counts.values())} tokens, so that adapters cannot tell which are theirs; "
                "train them one after another (train_together: 1)"
            )
        return zip(counts, torch.split(states, list(counts.values()), dim=dim), strict=True)


def unfit(assignments: Sequence[Assignment]) -> dict[int, SpecError]:
    """Why adapters do not fit their base, by the number of the assignment; no weights are read.

    Raises:
        ModelError: there is no base model.
    """
    first = assignments[0]
    base = empty_base(first.model_dir, dtype=first.train.precision, marker=first.marker)
    found = {}
    for index, assignment in enumerate(assignments):
        try:
            adapter_config(assignment.train.lora, base, assignment.marker)
        except SpecError as error:
            found[index] = error
    return found


class AdaptersLoss(LossModel):
    """The summed cross-entropy of each of several adapters on its own rows, in one forward pass of the base."""

    def __init__(self, assignments: Sequence[Assignment], *, device: str) -> None:
        """The base model and a fresh adapter for each assignment, named by ``name_of``, in training mode.

        Args:
            assignments: What is trained; all that concerns the base is equal in them.
            device: ``cpu`` or ``cuda:N``.

        Raises:
            SpecError: an adapter that does not fit the model, or a model that drops out by itself.
            ModelError: the base model cannot be loaded, or its attention is not known.
        """
        spans = _Spans()
        streams = {name_of(index): DropoutStream(torch.device(device)) for index in range(len(assignments))}
        super().__init__(_load(assignments, device=device, spans=spans, streams=streams))
        self._spans, self._streams = spans, streams

    def begin_step(self, adapter: str, *, seed: int) -> None:
        """Let ``adapter`` drop out by ``seed`` from here on."""
        self._streams[adapter].begin_step(seed)

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """The trained parameters of one adapter, by their names in the model."""
        return _trained(self.model, adapter)

    def each(self, rows: Mapping[str, Sequence[PackedRow]]) -> torch.Tensor:
        """Cross-entropy in nats, summed over the learned tokens of each adapter's rows: float32 (adapters,), in the order of ``rows``."""
        batch = tensors(collate([row for own in rows.values() for row in own]), device=self.model.device)
        self._spans.tokens = {name: sum(len(row.input_ids) for row in own) for name, own in rows.items()}
        self._spans.learned = {name: sum(num_labelled(row) for row in own) for name, own in rows.items()}
        for name in rows:
            self._streams[name].begin_pass()
        targets = batch.pop("targets")[0]
        learned = (targets != NO_LOSS).nonzero()[:, 0]
        states = self._spans.split(self.learned_states(**batch, learned=learned), dim=0, learned=True)
        wanted = self._spans.split(targets[learned], dim=0, learned=True)
        parts = zip(states, wanted, strict=True)
        return torch.stack([self.summed(own, its, adapter=name) for (name, own), (_, its) in parts])


def _load(assignments: Sequence[Assignment], *, device: str, spans: _Spans, streams: Mapping[str, DropoutStream]) -> peft.PeftModel:
    first = assignments[0].train
    base = load_base(assignments[0].model_dir, dtype=first.precision, marker=assignments[0].marker, device=device, quantize=first.quantize)
    _check_no_dropout(base)
    configs = {name_of(index): adapter_config(its.train.lora, base, its.marker) for index, its in enumerate(assignments)}
    seeds = {name_of(index): assignment.seed for index, assignment in enumerate(assignments)}
    for config in configs.values():
        config.base_model_name_or_path = base.name_or_path  # which PEFT does for the first one only
    model = peft.get_peft_model(base, configs[name_of(0)], adapter_name=name_of(0), autocast_adapter_dtype=False)
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    dtype = getattr(torch, first.precision)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                start_adapter(path, layer, seed=seeds[name], dtype=dtype, adapter=name)
            _divide_layer(layer, spans, streams)
        elif type(layer) is TrainableTokensLayer:
            _divide_table(layer, spans)
    for name in configs:  # PEFT has one at a time trained
        for parameter in _trained(model, name).values():
            parameter.requires_grad = True
            parameter.data = parameter.data.to(dtype)
    if first.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _trained(model: peft.PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if adapter in name.split(".")}


def _divide_layer(layer: Any, spans: _Spans, streams: Mapping[str, DropoutStream]) -> None:
    for name, dropout in layer.lora_dropout.items():
        if isinstance(dropout, nn.Dropout):
            layer.lora_dropout[name] = _StreamDropout(dropout.p, streams[name])
    layer.forward = functools.partial(_adapted, layer, spans)


def _divide_table(layer: Any, spans: _Spans) -> None:
    layer.__class__ = TrainedRow
    layer.forward = functools.partial(_with_rows, layer, spans)


def _check_no_dropout(base: nn.Module) -> None:
    """Refuse a base that draws random numbers itself: with several adapters beside each other, they would be other ones than alone."""
    config = base.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = max((module.p for module in base.modules() if isinstance(module, nn.Dropout)), default=0.0)
    if max(layers, getattr(config, "attention_dropout", 0.0) or 0.0) > 0:
        raise SpecError(
            f"train_together: model type {config.model_type} has dropout of its own, so an adapter would not be the one that it is alone; "
            "set train_together to 1"
        )


def _adapted(layer: Any, spans: _Spans, x: torch.Tensor) -> torch.Tensor:
    """A linear layer's output for all tokens, with what each adapter adds to its own."""
    dim = x.dim() - 2
    parts = zip(spans.split(x, dim=dim), spans.split(layer.base_layer(x), dim=dim), strict=True)
    return torch.cat([_with_adapter(layer, name, own, its) for (name, own), (_, its) in parts], dim=dim)


def _with_adapter(layer: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """As PEFT's layer does it where ``name`` is its active adapter."""
    if name not in layer.lora_A:
        return result
    inner, outer = layer.lora_A[name], layer.lora_B[name]
    x = x.to(inner.weight.dtype)
    if name in layer.lora_variant:
        found = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result)
    else:
        found = result + outer(inner(layer.lora_dropout[name](x))) * layer.scaling[name]
    adapted: torch.Tensor = found.to(result.dtype)
    return adapted


def _with_rows(layer: Any, spans: _Spans, x: torch.Tensor) -> torch.Tensor:
    """The embeddings of all tokens, or the logits of the learned ones, with each adapter's own rows in its part."""
    learned = not isinstance(layer.base_layer, nn.Embedding)
    parts = zip(spans.split(x, dim=1, learned=learned), spans.split(layer.base_layer(x), dim=1, learned=learned), strict=True)
    return torch.cat([layer.put_rows(its, own, name) for (name, own), (_, its) in parts], dim=1)
