"""What a cluster has room for."""

from __future__ import annotations

import pytest

from pause_ray import cluster
from pause_ray.errors import SpecError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_what_this_machine_will_never_have_room_for_is_refused_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.check_room({"CPU": 8, "GPU": 0})
    with pytest.raises(SpecError, match=r"hold 8\.5 CPUs at a time, and the cluster has 8; lower train_workers"):
        cluster.check_room({"CPU": 8.5, "GPU": 0})


def test_a_cluster_that_was_joined_may_grow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cluster.check_room({"CPU": 8, "GPU": 0})
    assert not caplog.messages
    cluster.check_room({"CPU": 64, "GPU": 0})
    assert "64 CPUs" in caplog.text
