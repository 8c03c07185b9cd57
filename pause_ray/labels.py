"""What people call the trials of a sweep: arm and point, as short as tells them apart. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pause_ray.spec import JsonObject, digest

MOST_VALUE_CHARS = 40
"""Of a searched value."""


def condition_labels(entries: Sequence[JsonObject]) -> dict[str, str]:
    """Trial digest → arm and point of each of a sweep's trials, as ``sweep.json`` lists them.

    A path is shortened to its last part where that is unique among the sweep's paths, a value to a few digits or characters
    where that tells it from the others of its path.
    """
    values: dict[str, dict[str, str]] = {}
    for entry in entries:
        for path, value in entry["point"].items():
            values.setdefault(path, {})[digest([value])] = _value_words(value)
    leaves = Counter(path.rsplit(".", 1)[-1] for path in values)
    names = {path: leaf if leaves[leaf := path.rsplit(".", 1)[-1]] == 1 else path for path in values}
    for path, words in values.items():
        often = Counter(words.values())
        values[path] = {key: text if often[text] == 1 else f"{text}~{key[:6]}" for key, text in words.items()}
    return {
        entry["digest"]: " ".join(
            [entry["arm"], *(f"{names[path]}={values[path][digest([value])]}" for path, value in entry["point"].items())]
        )
        for entry in entries
    }


def _value_words(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MOST_VALUE_CHARS else f"{text[: MOST_VALUE_CHARS - 1]}…"
