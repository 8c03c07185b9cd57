"""Connecting to Ray: the cluster this process belongs to, or one of its own on this machine. Knows no trial."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

LOCAL_LOGICAL_CPUS = 8
"""Ray's CPUs are a count of places, not of cores. A trial, its scoring actor, the progress board and shard tasks need
places at the same time even on two cores; threads are capped where the computing is done."""
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
"""Prompts and rows pass by path, so little goes through the object store."""


@contextlib.contextmanager
def connection() -> Iterator[None]:
    """Ray for the duration of the block.

    Joins the cluster of ``RAY_ADDRESS`` (set inside ``ray job submit``); without one starts a cluster on this machine
    and stops it at the end. A connection that exists already is used and kept.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **quiet)
    else:
        ray.init(
            address="local",  # not one that happens to run on this machine
            num_cpus=max(LOCAL_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def total_gpus() -> float:
    """GPUs of the cluster, those in use included."""
    return float(ray.cluster_resources().get("GPU", 0))
