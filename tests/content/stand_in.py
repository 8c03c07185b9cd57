"""A model's folder as planning reads it: published sizes, the small model's tokenizer, no weights; enough of a gated model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESERVED = "<|reserved_special_token_0|>"
"""The one entry that the small model's tokenizer has not."""


def write_stand_in(folder: Path, config: Mapping[str, Any], *, model_dir: Path) -> Path:
    """Make ``folder`` of a ``config.json`` and the tokenizer in ``model_dir``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        if (model_dir / file).is_file():
            shutil.copy(model_dir / file, folder / file)
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    entry = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append(entry | {"id": max(tokenizer["model"]["vocab"].values()) + 1, "content": RESERVED})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
