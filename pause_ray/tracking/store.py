"""A client of one MLflow store: finds runs by tag, sends values once, and reports failures in one line without secrets.

Runs are found by the tag ``pause_ray.digest``, never by name. The module uses the client API with explicit run ids
(the fluent API keeps one active run per process) and batches.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pause_ray
from pause_ray.core.errors import TrackingError, missing_extra
from pause_ray.core.storage import Storage, exclusive

CONTENT_TAG = "pause_ray.content"
ALIAS = "best"
REQUIREMENTS = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "pydantic", "pyyaml", "numpy", "pandas", "gguf")
"""Packages that a registered model requires, at the installed versions."""


def register(client: Any, experiment_id: str, *, run_id: str, name: str, folder: Path, content: str, tags: Mapping[str, str]) -> str:
    """Log and register the export in ``folder`` as a model of the trial's run; return ``models:/NAME/VERSION``.

    A version with the digest ``content`` is not made again.
    """
    from mlflow.exceptions import MlflowException

    tagged = {**tags, CONTENT_TAG: content}
    version = next((its for its in client.search_model_versions(f"name = '{name}'") if its.tags.get(CONTENT_TAG) == content), None)
    if version is None:
        model = _logged(client, experiment_id, content) or _log(client, experiment_id, run_id=run_id, name=name, folder=folder, tags=tagged)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(name, model.artifact_location, run_id=run_id, tags=tagged, model_id=model.model_id)
    number = str(version.version)
    if str(client.get_registered_model(name).aliases.get(ALIAS)) != number:  # another may have been the best in between
        client.set_registered_model_alias(name, ALIAS, number)
    return f"models:/{name}/{number}"


def _logged(client: Any, experiment_id: str, content: str) -> Any:
    """Return a model that was logged and not registered, because the server failed in between."""
    found = client.search_logged_models([experiment_id], filter_string=f"tags.`{CONTENT_TAG}` = '{content}'")
    return next((model for model in found if str(model.status) == "READY"), None)


def _log(client: Any, experiment_id: str, *, run_id: str, name: str, folder: Path, tags: dict[str, str]) -> Any:
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(experiment_id, name, source_run_id=run_id, tags=tags, model_type="pause_ray")
    with tempfile.TemporaryDirectory(prefix="pause_ray-") as scratch:
        saved = Path(scratch) / "model"
        _save(folder, saved, model=model, run_id=run_id)
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.get_logged_model(model.model_id)


def _save(folder: Path, target: Path, *, model: Any, run_id: str) -> None:
    """Write an export in MLflow's format into the new folder ``target``, as the logged model of the trial's run."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "context"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string)]),
    )
    named = {"artifact_path": model.artifact_location, "model_uuid": model.model_id, "model_id": model.model_id}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow recommends an input example, for which it would load the model
        mlflow.pyfunc.save_model(
            path=str(target),
            mlflow_model=Model(run_id=run_id, **named),
            loader_module="pause_ray.trial.ask",
            data_path=str(folder),
            code_paths=[str(Path(pause_ray.__file__).parent)],
            signature=signature,
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
        )


BATCH_METRICS, BATCH_PARAMS = 1000, 100
"""MLflow's limits for a batch."""
BATCH_MIXED_METRICS = 800
"""Metrics in a batch with parameters and up to 100 tags; MLflow allows 1,000 of all together."""
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set while sending, unless the user has set them: a server that is away costs seconds (MLflow's own: over half an hour)."""
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
CONNECT_SECONDS = 5.0
SAFE_REASONS = (
    "Connection refused",
    "timed out",
    "Name or service not known",
    "Temporary failure in name resolution",
    "No route to host",
    "Network is unreachable",
    "unable to open database file",
    "database is locked",
    "readonly database",
    r"error code \d+",
    "Permission denied",
)
"""Texts of a failure that may be shown, since they quote no address and no password."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags that make MLflow's pages show runs and curves first, not traces of agents."""
KIND_TAG, DIGEST_TAG = "pause_ray.kind", "pause_ray.digest"
logger = logging.getLogger("pause_ray")


def tracking_uri(storage: Storage) -> str:
    """Return the URI of the store: ``MLFLOW_TRACKING_URI``, else a SQLite file under the storage root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.root / 'mlflow.db'}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The wanted content of a run, as plain values."""

    kind: str
    """``sweep``, ``trial`` or ``training``."""
    name: str
    digest: str
    """Digest of the trial, sweep or training; identifies the run together with the kind and the parent run."""
    content: str | None
    """Digest of all content, sent last as a tag that marks the run as complete. None while more is to come."""
    status: str
    started_ms: int
    ended_ms: int
    tags: dict[str, str] = field(default_factory=dict)
    """Values that may change later, such as the arm's name; MLflow does not allow to change a parameter."""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Steps and values of each series, by name."""
    files: Sequence[tuple[Path, str]] = ()
    """Local files, each with its artifact folder ("" for the root)."""


class Sender:
    """One experiment of one MLflow store."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client = client
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, uri: str, *, experiment: str, artifacts: Path) -> Sender:
        """Connect, and create the experiment if it does not exist; a store without a server keeps artifacts under ``artifacts``."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        location = None if uri.startswith(("http", "databricks")) else (artifacts / experiment).as_uri()
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                return cls(client, client.create_experiment(experiment, artifact_location=location, tags=EXPERIMENT_TAGS))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(experiment)
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow: the experiment {experiment} was deleted; restore it (mlflow experiments restore) or name the sweep anew"
            )
        return cls(client, found.experiment_id)

    def logged_children(self, parent_id: str) -> dict[str, str]:
        """Return the content digests of the child runs that are complete, by trial digest."""
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent_id}'")
        return {run.data.tags[DIGEST_TAG]: run.data.tags[CONTENT_TAG] for run in runs if CONTENT_TAG in run.data.tags}

    def send(self, wanted: Run, *, parent_id: str | None = None) -> str:
        """Create or complete a run and return its id; values that it has are not sent again, and a complete run stays complete."""
        run = self._find(wanted, parent_id) or self._create(wanted, parent_id)
        run_id: str = run.info.run_id
        if wanted.content is None and CONTENT_TAG in run.data.tags:
            return run_id
        if wanted.content is None or run.data.tags.get(CONTENT_TAG) != wanted.content:
            self._send_values(run, wanted)
            if run.info.run_name != wanted.name:
                self._client.update_run(run_id, name=wanted.name)
            for path, folder in wanted.files:
                self._client.log_artifact(run_id, str(path), folder or None)
            if wanted.content is not None:
                self._client.set_tag(run_id, CONTENT_TAG, wanted.content)
        if run.info.status == wanted.status:
            return run_id
        if wanted.status in ("FINISHED", "KILLED"):
            self._client.set_terminated(run_id, status=wanted.status, end_time=wanted.ended_ms)
        else:
            self._client.update_run(run_id, status=wanted.status)
        return run_id

    def child(self, parent_id: str, key: str) -> str | None:
        """Return the id of the child run with this digest; None if there is none."""
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.`{DIGEST_TAG}` = '{key}'")
        return runs[0].info.run_id if runs else None

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set those tags of a run that differ."""
        has = self._client.get_run(run_id).data.tags
        for name, value in tags.items():
            if has.get(name) != value:
                self._client.set_tag(run_id, name, value)

    def register(self, name: str, *, run_id: str, folder: Path, content: str, tags: Mapping[str, str]) -> str:
        """Log and register an exported trial in this experiment; see the function ``register``."""
        return register(self._client, self.experiment_id, run_id=run_id, name=name, folder=folder, content=content, tags=tags)

    def is_whole(self, run_id: str) -> bool:
        """Return whether the run is complete."""
        return CONTENT_TAG in self._client.get_run(run_id).data.tags

    def steps(self, run_id: str, name: str) -> set[int]:
        """Return the steps of a series that the store has."""
        return {point.step for point in self._client.get_metric_history(run_id, name)}

    def append(self, run_id: str, points: Sequence[tuple[str, int, float]], *, at_ms: int) -> None:
        """Add points (series, step, value) that the run does not have."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, at_ms, step) for name, step, value in points]
        for start in range(0, len(metrics), BATCH_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])

    def end(self, run_id: str, *, status: str) -> None:
        """Close a run that is running; one that has ended keeps its status."""
        if self._client.get_run(run_id).info.status == "RUNNING":
            self._client.set_terminated(run_id, status=status)

    def _send_values(self, run: Any, wanted: Run) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id, has = run.info.run_id, run.data
        params = [Param(name, value) for name, value in wanted.params.items() if name not in has.params]
        metrics = [Metric(name, value, wanted.ended_ms, 0) for name, value in wanted.metrics.items() if has.metrics.get(name) != value]
        for name, points in wanted.series.items():
            known = self.steps(run_id, name) if name in has.metrics else set()
            metrics += [Metric(name, value, wanted.ended_ms, step) for step, value in points if step not in known]
        tags = [RunTag(name, value) for name, value in wanted.tags.items() if has.tags.get(name) != value]
        rounds = max(math.ceil(len(params) / BATCH_PARAMS), math.ceil(len(metrics) / BATCH_MIXED_METRICS), 1)
        for number in range(rounds):
            self._client.log_batch(
                run_id,
                params=params[number * BATCH_PARAMS : (number + 1) * BATCH_PARAMS],
                metrics=metrics[number * BATCH_MIXED_METRICS : (number + 1) * BATCH_MIXED_METRICS],
                tags=tags if number == 0 else (),
            )

    def _find(self, wanted: Run, parent_id: str | None) -> Any:
        among = f"tags.`mlflow.parentRunId` = '{parent_id}'" if parent_id else f"tags.`{KIND_TAG}` = '{wanted.kind}'"
        runs = self._search(f"{among} and tags.`{DIGEST_TAG}` = '{wanted.digest}'")
        return runs[0] if runs else None

    def _create(self, wanted: Run, parent_id: str | None) -> Any:
        tags = {**wanted.tags, KIND_TAG: wanted.kind, DIGEST_TAG: wanted.digest, **({"mlflow.parentRunId": parent_id} if parent_id else {})}
        return self._client.create_run(self.experiment_id, start_time=wanted.started_ms, tags=tags, run_name=wanted.name)

    def _search(self, filter_string: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], filter_string, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


@contextlib.contextmanager
def connected(storage: Storage, *, experiment: str, waiting: Callable[[str], None] = lambda _: None) -> Iterator[Sender]:
    """Connect to the store that ``tracking_uri`` names, while no other process with the same storage root sends.

    Args:
        storage: The storage root, whose lock is held, and which has the artifacts if the store has no server.
        experiment: Name of the experiment; it is created if it does not exist.
        waiting: Called with the lock's holder if another process is sending.

    Raises:
        TrackingError: The store cannot be reached or refuses; what was sent stays.
    """
    where = tracking_uri(storage)
    with exclusive(storage.root / ".mlflow.lock", waiting=waiting), _border(where):
        yield Sender.open(where, experiment=experiment, artifacts=storage.root / "mlartifacts")


@contextlib.contextmanager
def _border(uri: str) -> Iterator[None]:
    """Set short timeouts for MLflow, and raise any error of its stores as a ``TrackingError`` without secrets.

    Stores raise the exceptions of many libraries (SQLAlchemy, requests, boto3, …), and their texts may hold the URI with its
    password, so only the kind of error and the operating system's text are passed on.
    """
    added = {name: value for name, value in PATIENCE.items() if name not in os.environ}
    os.environ.update(added)
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _check_database_answers(uri)
        yield
    except TrackingError:
        raise
    except ModuleNotFoundError as error:
        if (remedy := missing_extra(error)) is None:
            raise
        raise TrackingError(f"MLflow: {remedy}. Results on storage are unharmed") from None
    except Exception as error:  # noqa: BLE001 (border to another system)
        raise TrackingError(
            f"MLflow at {without_secrets(uri)}: {_reason(error)}; results on storage are unharmed. "
            "Start the server, or point MLFLOW_TRACKING_URI to another, and run the same command again"
        ) from None
    finally:
        for name in added:
            os.environ.pop(name, None)


def _check_database_answers(uri: str) -> None:
    """Fail fast where MLflow would try a database for an hour (15 attempts with doubling pauses)."""
    parts = urlsplit(uri)
    port = parts.port or DATABASE_PORTS.get(parts.scheme.split("+")[0])
    if parts.hostname and port and not uri.startswith("http"):
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()


def without_secrets(uri: str) -> str:
    """Return the URI without user, password, query and fragment."""
    parts = urlsplit(uri)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"


def _reason(error: BaseException) -> str:
    """Return the kind of error, with the reason of a failed connection, and no text that could quote a URI."""
    seen: BaseException | None = error
    texts = []
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    known = re.search("|".join(SAFE_REASONS), "\n".join(texts))
    return f"{type(error).__name__}" + (f" ({known.group()})" if known else "")
