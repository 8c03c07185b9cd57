"""GGUF file → folder of float32 safetensors with tokenizer and chat template. Knows transformers' reader, no cache and no spec."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Iterator
from pathlib import Path

from pause_ray.errors import ModelError


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``config.json``, ``*.safetensors``, ``tokenizer.json`` and the chat template of ``gguf`` into ``folder``.

    Weights are dequantised to float32, so the file's own quantisation is the only rounding.

    Raises:
        ModelError: the file is no GGUF, is cut off, or holds an architecture that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(gguf.parent), gguf.name
    _check_header(gguf)
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{gguf}: transformers cannot read this GGUF file ({reason[:240]}); fetch it anew, or use a safetensors copy"
            ) from error
        # a config that still says "quantised with GGUF" would send every later load through the dequantiser
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        for mark in ("is_quantized", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model
    gc.collect()


def _check_header(gguf: Path) -> None:
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{gguf}: not a GGUF file (it begins with {magic!r}); fetch it anew")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice: the three bars of one conversion fill a terminal page."""
    transformers, deepspeed = logging.getLogger("transformers"), logging.getLogger("DeepSpeed")
    level = transformers.level
    transformers.setLevel(logging.ERROR)
    deepspeed.addFilter(_is_error)  # it sets its own level when transformers imports it
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.setLevel(level)
        deepspeed.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
