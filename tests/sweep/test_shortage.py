"""When a sweep says that it waits for nodes, and what."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

pytestmark = pytest.mark.ray
pytest.importorskip("ray")

from pause_ray.demand import Demand, Wish  # noqa: E402
from pause_ray.sweep.progress import TrialState  # noqa: E402
from pause_ray.sweep.shortage import FIRST_SECONDS, HOPELESS_SECONDS, LOOK_SECONDS, MOST_SECONDS, Shortage, ShortageWatch  # noqa: E402

GPU = Wish(resources=(("CPU", 1.0), ("GPU", 1.0)))
NEVER = Wish(resources=(("CPU", 1.0),), labels=("ray.io/market-type=on-demand",), is_hopeless=True)


def cluster(wishes: Mapping[Wish, int], *, starting: Mapping[str, int] | None = None, failed: tuple[str, ...] = ()) -> Demand:
    none = {"CPU": 0.0, "GPU": 0.0}
    return Demand(wishes=wishes, nodes=1, total=none, free=none, starting=starting or {}, failed=failed)


def times(shortage: Shortage, wishes: Mapping[Wish, int], *, until: float, start: float = 0.0, quiet_since: float = 0.0) -> list[float]:
    """After how many seconds something is said, with a look every few."""
    looks = [start + LOOK_SECONDS * number for number in range(int((until - start) / LOOK_SECONDS) + 1)]
    return [now for now in looks if shortage.look(cluster(wishes), now=now, quiet_since=quiet_since) is not None]


def test_it_is_said_after_a_minute_and_then_more_and_more_rarely() -> None:
    said = times(Shortage(), {GPU: 1}, until=4 * MOST_SECONDS)
    gaps = [after - before for before, after in zip([0.0, *said], said, strict=False)]
    assert gaps[:3] == [FIRST_SECONDS, FIRST_SECONDS, 2 * FIRST_SECONDS]
    assert gaps == sorted(gaps)
    assert max(gaps) == MOST_SECONDS


def test_what_can_never_come_is_said_soon() -> None:
    assert times(Shortage(), {GPU: 1, NEVER: 1}, until=60) == [HOPELESS_SECONDS]


def test_while_trials_get_on_nothing_is_said() -> None:
    shortage = Shortage()
    assert not any(shortage.look(cluster({GPU: 3}), now=now, quiet_since=now - LOOK_SECONDS) for now in range(0, 1000, 5))
    assert times(shortage, {GPU: 3}, start=1000, until=1000 + FIRST_SECONDS, quiet_since=1000) == [1000 + FIRST_SECONDS]


def test_what_was_given_and_is_asked_anew_waits_anew() -> None:
    shortage = Shortage()
    assert times(shortage, {GPU: 1}, until=FIRST_SECONDS) == [FIRST_SECONDS]
    assert times(shortage, {}, start=FIRST_SECONDS + 5, until=FIRST_SECONDS + 10) == []
    again = FIRST_SECONDS + 15
    assert times(shortage, {GPU: 1}, start=again, until=again + FIRST_SECONDS) == [again + FIRST_SECONDS]


def test_the_line_says_what_was_asked_what_is_there_and_what_to_look_at() -> None:
    shortage, asked = Shortage(), cluster({GPU: 4, NEVER: 2}, starting={"h100x1": 2}, failed=("h100x8 (no capacity)",))
    assert shortage.look(asked, now=0, quiet_since=0) is None
    told = shortage.look(asked, now=120, quiet_since=0)
    assert told is not None
    assert told.startswith(
        "nothing has got on for 2 min; the cluster is asked, by this sweep or by others, for 4 × (1 CPU + 1 GPU), "
        "2 × (1 CPU on ray.io/market-type=on-demand); it has 1 node with 0 CPUs (0 free), 0 GPUs (0 free); starting: 2 h100x1; "
        "its autoscaler can start nothing that gives (1 CPU on ray.io/market-type=on-demand); could not be started: h100x8 (no capacity); "
    )
    assert "`ray status`" in told
    assert "\n" not in told


def test_whoever_only_waits_has_not_got_on() -> None:
    watch = ShortageWatch(lambda text: None)
    watch._quiet_since = 0.0
    waits = {"a": TrialState("waiting", 0, 1), "b": TrialState("queued", 0, 1)}
    assert watch.hears(waits) is waits
    assert watch._quiet_since == 0
    watch.hears({**waits, "c": TrialState("training", 1, 9)})
    assert watch._quiet_since > 0
    watch._quiet_since = 0.0
    assert watch.noticing(lambda done, total: done / total)(1, 2) == 0.5
    assert watch._quiet_since > 0
