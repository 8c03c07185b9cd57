from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.tiny import make_haystack_folder, make_tokenizer_folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def essays_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_haystack_folder(tmp_path_factory.mktemp("tiny") / "essays")
