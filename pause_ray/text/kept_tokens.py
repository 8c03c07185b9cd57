"""Tokens of long texts, kept in a folder by digest of tokenizer and text, so that no process computes them twice.

A haystack is read by every scoring actor, of every sweep. Knows files; what a text is for is its reader's business.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from pathlib import Path

import numpy as np

from pause_ray.spec import digest
from pause_ray.storage import space_errors
from pause_ray.text.insertion import TokenText
from pause_ray.text.tokens import ModelTokenizer

FORMAT = 1
"""Part of the digest; raised when the same text begins to be read differently."""
LONG_CHARS = 100_000
"""Tokenising fewer takes less than a tenth of a second, not much longer than reading a file."""


def read_long(text: str, *, tokenizer: ModelTokenizer, folder: Path) -> TokenText:
    """``TokenText.of``, from ``folder`` if the text is long and was read before.

    Raises:
        TextError: a control token is in the text.
        StorageError: disk full or not writable.
    """
    if len(text) < LONG_CHARS:
        return TokenText.of(text, tokenizer=tokenizer)
    path = folder / f"{digest([FORMAT, tokenizer.digest, text])}.npz"
    kept = _load(path)
    if kept is not None:
        return TokenText(text, *kept)
    read = TokenText.of(text, tokenizer=tokenizer)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with space_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                np.savez(file, ids=read.ids, starts=read.starts)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    return read


def _load(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and starts, or None if there is no such file or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["ids"], arrays["starts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
