"""Nodes that Ray's autoscaler starts on the head's own machine, for ``cluster/local.yaml``. Knows Ray's provider of them, and no work."""

from __future__ import annotations

import functools
import threading
from typing import Any

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

_one_at_a_time = threading.Lock()


class LocalNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's provider, with a place of each node's own for what a job brings along.

    Its nodes share the head's session folder, where each of them unpacks a job's working directory anew when the job first comes to
    it: processes that run in it already would find themselves in a folder that is gone.
    """

    _number = 0

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with _one_at_a_time:
            plain = ray._private.parameter.RayParams
            LocalNodes._number += 1
            own = f"runtime_resources_{LocalNodes._number}"
            ray._private.parameter.RayParams = functools.partial(plain, runtime_env_dir_name=own)
            try:
                super()._create_node_with_resources_and_labels(*arguments)
            finally:
                ray._private.parameter.RayParams = plain
