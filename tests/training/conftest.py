"""What most tests of training start from: a tiny Llama and twenty rows for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny_llama import added_marker, make_model, make_rows, make_shards


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def shards(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = make_rows(20, marker_id=added_marker(llama).token_id)
    return make_shards(tmp_path_factory.mktemp("shards") / "set", rows)
