"""Items through steps in Ray Data's tasks: the border between this package's errors and Ray's. Knows no corpus."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray
import ray.data
from joblib import cpu_count
from ray.exceptions import RayError

from pause_ray import errors
from pause_ray.cluster import without_package
from pause_ray.errors import ClusterError, StorageError, UserError
from pause_ray.spec import JsonObject

BLOCK_BYTES = 4 * 1024**2
"""Of text between reading and segmenting: a few pieces, so that a corpus of any size flows."""
MAX_BLOCKS = 1024
"""Ray Data keeps a record of each block in the driver."""

Step = Callable[[JsonObject], Iterator[JsonObject]]
"""What becomes of an item: any number of others."""


def stream(items: Sequence[JsonObject], steps: Sequence[Step]) -> Iterator[JsonObject]:
    """Stream ``items`` through ``steps`` in Ray tasks; results come as they are ready, in no order.

    Raises:
        UserError: what a step raised, in this process.
        ClusterError: a node has not what a task needs to begin.
    """
    if not items:
        return
    with _quiet_ray_data():
        dataset = ray.data.from_items(_table(items).to_pylist(), override_num_blocks=min(len(items), MAX_BLOCKS))
        for number, step in enumerate(steps):
            dataset = dataset.map_batches(
                _through,
                fn_kwargs={"step": step},
                batch_size=1,
                batch_format="pyarrow",
                # Steps that ask for different shares of a CPU are not fused, so that one long file is segmented by many tasks.
                num_cpus=1 if number == len(steps) - 1 else 0.5,
                compute=ray.data.TaskPoolStrategy(size=_tasks_at_once()),
            )
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for text in batch["item"].to_pylist():
                    yield _or_raise(json.loads(text))
        except RayError as error:
            if told := without_package(str(error)):
                raise ClusterError(told) from error
            raise


def _through(batch: pa.Table, step: Step) -> Iterator[pa.Table]:
    """Apply a step inside a task; a user's mistake becomes an item, because Ray would bury its one line in a traceback."""
    for text in batch["item"].to_pylist():
        item = json.loads(text)
        try:
            for result in [item] if "failure" in item else step(item):
                yield _table([result])
        except UserError as error:
            yield _table([{"failure": str(error), "class": type(error).__name__}])
        except FileNotFoundError as error:
            where = f"{error.filename or error}: no such file or folder on {socket.gethostname()}"
            told = f"{where}; name texts and --storage by paths that are the same on every node"
            yield _table([{"failure": told, "class": StorageError.__name__}])


def _or_raise(item: JsonObject) -> JsonObject:
    if "failure" in item:
        raise getattr(errors, item["class"])(item["failure"])
    return item


def _table(items: Sequence[JsonObject]) -> pa.Table:
    return pa.table({"item": pa.array([json.dumps(item) for item in items], pa.large_string())})


def _tasks_at_once() -> int | None:
    """On this machine, one for each core, since its logical CPUs may be more; on a cluster, what Ray has or gets places for."""
    return None if os.environ.get("RAY_ADDRESS") else cpu_count()


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """No bars and no plans on the terminal while inside: the caller shows one bar. The log file in Ray's session is kept."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    consoles = [handler for handler in logging.getLogger("ray.data").handlers if handler.get_name() == "console"]
    levels = [handler.level for handler in consoles]
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")  # fewer items than cores
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
