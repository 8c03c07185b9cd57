"""Checkpoints on storage for tests of what copies and names them: whole to their manifest, without weights that a model could load."""

from __future__ import annotations

from pathlib import Path

from pause_ray.core.storage import write_text
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER, TRAINING_LOG, seal


def store_checkpoint(folder: Path) -> Path:
    """A sealed checkpoint of three steps."""
    log = "".join(f'{{"step": {step}, "loss": {3 - step}.0}}\n' for step in (1, 2, 3))
    for name, content in ((ADAPTER_CONFIG, "{}"), (ADAPTER_WEIGHTS, "weights"), (TOKENIZER, "{}"), (TRAINING_LOG, log)):
        write_text(folder / name, content)
    seal(folder, base_digest="0" * 16, tokenizer_digest="1" * 16, marker=None, spec={}, document_digests=frozenset())
    return folder
