"""Items through steps in Ray's tasks: what goes wrong in one arrives as a line that tells what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from joblib import cpu_count

from pause_ray.core.errors import ClusterError, StorageError
from pause_ray.core.spec import JsonObject

streaming = pytest.importorskip("pause_ray.data.pipeline")
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def read(item: JsonObject) -> Iterator[JsonObject]:
    yield {"text": Path(item["path"]).read_text()}


def look_for_missing_package() -> None:
    raise ModuleNotFoundError("No module named 'pause_ray'")


class Unloadable:
    """A step that a process cannot load in which its package is not installed."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return look_for_missing_package, ()

    def __call__(self, item: JsonObject) -> Iterator[JsonObject]:
        yield item


def test_a_path_that_one_machine_does_not_see_is_a_mistake_that_names_machine_and_path(tmp_path: Path) -> None:
    [table] = streaming._apply(streaming._table([{"path": str(tmp_path / "unseen")}]), read)
    [failed] = streaming._items(table)
    assert isinstance(failed, StorageError)
    assert f"unseen: no such file or folder on {socket.gethostname()}; name texts and --storage by paths" in str(failed)


def test_a_node_without_the_package_is_told_in_one_line() -> None:
    with pytest.raises(ClusterError, match=r"^a node of the cluster has no pause_ray: use one image on all nodes .*check --cluster says"):
        list(streaming.stream([{}], [Unloadable()]))


def test_any_other_error_of_ray_stays_what_it_is() -> None:
    from ray.exceptions import RayTaskError

    def fails(item: JsonObject) -> Iterator[Any]:
        yield item["nothing"]

    with pytest.raises(RayTaskError, match="KeyError: 'nothing"):
        list(streaming.stream([{}], [fails]))


def test_a_cluster_makes_as_many_rows_at_once_as_it_has_places_for_and_one_machine_as_it_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a cluster that has only its head yet."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert streaming._tasks_at_once() == cpu_count()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert streaming._tasks_at_once() is None
