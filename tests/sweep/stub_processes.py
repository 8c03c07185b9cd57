"""What Ray's processes do first in a sweep of stubs. Imports nothing but the standard library: most of them stay idle."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

FEW_CPUS = 4
"""Logical CPUs of the local cluster; Ray starts as many processes in advance."""


class _Launcher(importlib.abc.MetaPathFinder):
    """Replaces what starts training workers as soon as its module is imported."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "pause_ray.training.launch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
        execute = spec.loader.exec_module

        def patched(module: types.ModuleType) -> None:
            from tests.sweep.stubs import write_adapter

            execute(module)
            module.run_workers = functools.partial(write_adapter, step_seconds=self._step_seconds)  # type: ignore[attr-defined]

        spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


def use_stubs(*, cell_seconds: float, step_seconds: float) -> None:
    """Put the stubs where a process would find model libraries; none of them is imported."""

    def make_engine(spec: object, threads: int | None = None) -> object:
        from tests.sweep.stubs import make_stub_engine

        return make_stub_engine(cell_seconds=cell_seconds)

    stub = types.ModuleType("pause_ray.inference.hf")
    stub.HfEngine = make_engine  # type: ignore[attr-defined]
    sys.modules["pause_ray.inference.hf"] = stub
    sys.meta_path.insert(0, _Launcher(step_seconds))


def stub_every_process(*, cell_seconds: float = 0.0, step_seconds: float = 0.0) -> None:
    """From now on Ray's processes begin with ``use_stubs``."""
    import ray

    from pause_ray.core import ray_cluster

    ray_cluster.LOCAL_LOGICAL_CPUS = FEW_CPUS
    start, hook = ray.init, functools.partial(use_stubs, cell_seconds=cell_seconds, step_seconds=step_seconds)
    ray.init = lambda **how: start(**how, runtime_env={"worker_process_setup_hook": lambda: hook()})
