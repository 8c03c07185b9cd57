"""GGUF file → folder of float32 safetensors with tokenizer and chat template. Knows transformers' reader, no cache and no spec."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from pause_ray.errors import ModelError, StorageError

_TOKENIZER_BYTES = 64_000_000  # tokenizer and configs; the largest tokenizers of today are about 35 MB

_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError, struct.error)
"""What transformers' reader raises on damaged or unknown files; it checks little itself."""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``config.json``, ``*.safetensors``, ``tokenizer.json`` and the chat template of ``gguf`` into ``folder``.

    Weights are dequantised to float32, so the file's own quantisation is the only rounding.

    Raises:
        ModelError: the file is no GGUF, is cut off, or holds an architecture that transformers cannot read.
        StorageError: too little space for the converted weights.
        Exception: writing failed, in the words of Python or of Rust; ``storage.building`` understands both.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(gguf.parent), gguf.name
    _check_header(gguf)
    with _quiet():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{gguf}: transformers cannot read this GGUF file ({reason[:240]}); fetch it anew, or use a safetensors copy"
            ) from error
        if loading["missing_keys"]:  # transformers would go on with random numbers in their place
            raise ModelError(f"{gguf}: lacks the weights {', '.join(sorted(loading['missing_keys'])[:3])}; fetch it anew")
        # a config that still says "quantised with GGUF" would send every later load through the dequantiser
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        for mark in ("is_quantized", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)
        _check_space(folder, num_bytes=sum(tensor.nbytes for tensor in model.parameters()) + _TOKENIZER_BYTES)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model
    gc.collect()


def _check_header(gguf: Path) -> None:
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{gguf}: not a GGUF file (it begins with {magic!r}); fetch it anew")


def _check_space(folder: Path, *, num_bytes: int) -> None:
    """Refuse before writing: a converted model is several times its GGUF file, which surprises."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed = f"the converted model needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        raise StorageError(f"{folder.parent}: {needed}; free space or set PAUSE_RAY_CACHE to another disk, and run the same command again")


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
