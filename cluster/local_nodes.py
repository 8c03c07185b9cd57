"""The node provider of ``local.yaml``: Ray's autoscaler starts nodes with it on the head's machine."""

from __future__ import annotations

import functools
import threading
from typing import Any

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

_one_at_a_time = threading.Lock()


class LocalNodes(FakeMultiNodeProvider):
    """Ray's provider, with a separate folder for each node's copies of working directories.

    Its nodes share the head's session folder, and each of them unpacks a job's working directory there when the job first reaches it.
    In one shared folder that would delete the directory under processes that already run in it.
    """

    _number = 0

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with _one_at_a_time:
            plain = ray._private.parameter.RayParams
            LocalNodes._number += 1
            folder = f"runtime_resources_{LocalNodes._number}"
            ray._private.parameter.RayParams = functools.partial(plain, runtime_env_dir_name=folder)
            try:
                super()._create_node_with_resources_and_labels(*arguments)
            finally:
                ray._private.parameter.RayParams = plain
