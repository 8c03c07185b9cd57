"""An exported trial as a model of MLflow's: logged once, registered once, loaded by ``mlflow.pyfunc``. Knows no sweep.

What is logged holds the export and this package's source, so that it answers where pause_ray is not installed; the base model's
weights are not in it (``trial.answering`` finds them). Uses the client with explicit ids, as ``store`` does.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pause_ray

CONTENT_TAG = "pause_ray.content"
ALIAS = "best"
REQUIREMENTS = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "pydantic", "pyyaml", "numpy", "pandas", "gguf")
"""What answering imports, at the versions that are installed here; ``bitsandbytes`` too where weights are quantised."""


def register(client: Any, experiment_id: str, *, run_id: str, name: str, folder: Path, content: str, tags: Mapping[str, str]) -> str:
    """Log and register an exported trial; what is there already stays.

    Args:
        client: Of the store.
        experiment_id: Of the run.
        run_id: Of the trial.
        name: Of the registered model.
        folder: Export.
        content: Its digest: a version with this digest is not made again.
        tags: Of model and version.

    Returns:
        ``models:/NAME/VERSION``.
    """
    from mlflow.exceptions import MlflowException

    tagged = {**tags, CONTENT_TAG: content}
    versions = [its for its in client.search_model_versions(f"name = '{name}'") if its.tags.get(CONTENT_TAG) == content]
    if versions:
        _point_to(client, name, str(versions[0].version))
        return f"models:/{name}/{versions[0].version}"
    model = _logged(client, experiment_id, content) or _log(client, experiment_id, run_id=run_id, name=name, folder=folder, tags=tagged)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(name, model.artifact_location, run_id=run_id, tags=tagged, model_id=model.model_id)
    _point_to(client, name, str(made.version))
    return f"models:/{name}/{made.version}"


def _point_to(client: Any, name: str, version: str) -> None:
    """Let the alias name this version: another one may have been the best in between, or the server went away before it was set."""
    if str(client.get_registered_model(name).aliases.get(ALIAS)) != version:
        client.set_registered_model_alias(name, ALIAS, version)


def _logged(client: Any, experiment_id: str, content: str) -> Any:
    """A model that arrived whole and was not registered, because the server went away in between."""
    found = client.search_logged_models([experiment_id], filter_string=f"tags.`{CONTENT_TAG}` = '{content}'")
    return next((model for model in found if str(model.status) == "READY"), None)


def _log(client: Any, experiment_id: str, *, run_id: str, name: str, folder: Path, tags: dict[str, str]) -> Any:
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(experiment_id, name, source_run_id=run_id, tags=tags, model_type="pause_ray")
    with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
        saved = Path(scratch) / "model"
        save(folder, saved, model=model, run_id=run_id)
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.get_logged_model(model.model_id)


def save(folder: Path, target: Path, *, model: Any = None, run_id: str | None = None) -> None:
    """Write an export in MLflow's format.

    Args:
        folder: Export.
        target: Must not exist yet.
        model: The logged model that it becomes; None for a folder alone.
        run_id: Of the trial.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "context"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string)]),
    )
    named = {"artifact_path": model.artifact_location, "model_uuid": model.model_id, "model_id": model.model_id} if model else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants an example, and would load the model to try it
        mlflow.pyfunc.save_model(
            path=str(target),
            mlflow_model=Model(run_id=run_id, **named),
            loader_module="pause_ray.trial.answering",
            data_path=str(folder),
            code_paths=[str(Path(pause_ray.__file__).parent)],
            signature=signature,
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
        )
