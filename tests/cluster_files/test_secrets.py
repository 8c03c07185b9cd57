"""No file under cluster/ holds a secret: each names where one comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.autoscaler import CLUSTER

SOUNDS = re.compile(r"passw(or)?d|secret|token|api_?key|_key$|credential", re.IGNORECASE)
REFERENCE = re.compile(r"\$\{\w+:\?[^}]+\}|~/\S+")
"""An environment variable without which the file is refused, or a file in somebody's home."""
NO_SECRETS = {"HttpTokens"}
FILES = sorted(CLUSTER.rglob("*.yaml"))


def told(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every entry that sounds like a secret, and of every environment variable that does."""
    if isinstance(value, list):
        for item in value:
            yield from told(item, at)
    if isinstance(value, dict):
        if SOUNDS.search(str(value.get("name", ""))) and "value" in value:
            yield value["name"], value["value"]
        for name, item in value.items():
            if isinstance(item, str) and SOUNDS.search(str(name)) and name not in NO_SECRETS:
                yield str(name), item
            yield from told(item, str(name))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CLUSTER)) for path in FILES])
def test_what_sounds_like_a_secret_is_a_reference(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        for name, value in told(document):
            assert REFERENCE.fullmatch(value), f"{name}: {value}"


def test_the_search_would_find_one() -> None:
    assert list(told({"env": [{"name": "HF_TOKEN", "value": "hf_x"}]})) == [("HF_TOKEN", "hf_x")]
    assert list(told({"a": {"POSTGRES_PASSWORD": "x"}})) == [("POSTGRES_PASSWORD", "x")]


def test_the_example_of_an_env_file_is_empty_and_the_real_one_is_ignored() -> None:
    folder = CLUSTER / "mlflow"
    lines = [line for line in (folder / "mlflow.env.example").read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"\w+=", line) for line in lines)
    assert (folder / ".gitignore").read_text().split() == ["mlflow.env"]
