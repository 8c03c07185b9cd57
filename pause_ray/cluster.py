"""Connecting to Ray: the cluster this process belongs to, or one of its own on this machine. Knows no trial."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping

import ray

from pause_ray.errors import SpecError

LOCAL_LOGICAL_CPUS = 8
"""Ray's CPUs are a count of places, not of cores. A trial, its scoring actor, the progress board and shard tasks need
places at the same time even on two cores; threads are capped where the computing is done."""
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
"""Prompts and rows pass by path, so little goes through the object store."""
logger = logging.getLogger("pause_ray")


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


def check_room(needed: Mapping[str, float]) -> None:
    """Refuse what a cluster of this machine has no room for, since Ray would wait for it for ever.

    One that was joined may grow: there it is only said.

    Args:
        needed: ``CPU`` and ``GPU`` → how many are held at the same time.

    Raises:
        SpecError: naming both numbers.
    """
    there = ray.cluster_resources()
    for name, number in needed.items():
        has = float(there.get(name, 0))
        if number <= has:
            continue
        told = f"resources: training and scoring hold {number:g} {name}s at a time, and the cluster has {has:g}"
        if not os.environ.get("RAY_ADDRESS"):
            raise SpecError(f"{told}; lower train_workers or scoring_actors, or what each of them takes")
        logger.warning("%s; waiting until it has grown", told)


def total_gpus() -> float:
    """GPUs of the cluster, those in use included."""
    return float(ray.cluster_resources().get("GPU", 0))
