"""An MLflow store under a storage root of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pause_ray.core.storage import Storage


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated store without runs: making the tables costs more than all else in a test."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def storage(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    storage = Storage.open(tmp_path / "runs")
    shutil.copy(empty_store, storage.root / "mlflow.db")
    return storage
