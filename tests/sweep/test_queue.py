"""A budget lets trials begin until a limit is reached, and says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import Storage
from pause_ray.evaluation.ledger import Ledger
from pause_ray.sweep.queue import Budget, BudgetMeter, bill_of, left_over
from tests.evaluation.answered_rows import row


class Clock:
    """Tells the seconds that it is set to."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_without_limits_everything_begins() -> None:
    meter = BudgetMeter(Budget())
    assert all(meter.start(str(number)) is None for number in range(100))


def test_a_trial_that_began_counts_once_and_may_go_on() -> None:
    meter = BudgetMeter(Budget(max_trials=2))
    assert [meter.start(key) for key in ("a", "b", "a")] == [None, None, None]
    assert meter.start("c") == "--max-trials 2 is reached"
    assert meter.start("b") is None


def test_hours_count_from_the_beginning() -> None:
    clock = Clock()
    meter = BudgetMeter(Budget(max_hours=2), clock=clock)
    clock.seconds += 2 * 3600 - 1
    assert meter.start("a") is None
    clock.seconds += 1
    assert meter.start("b") == "--max-hours 2 is reached"


def test_cost_is_machines_and_answers() -> None:
    clock, bills = Clock(), {"before": (50.0, False), "b": (0.0, False), "c": (0.0, False)}
    meter = BudgetMeter(Budget(max_cost=10, price_per_hour=3), bill=lambda trial: bills[trial], clock=clock)
    assert [meter.start("before"), meter.start("b")] == [None, None]  # what a trial had cost before is none of this command's
    clock.seconds += 3600
    bills.update(before=(51.0, True), b=(5.5, False))
    assert meter.start("c") is None  # 3 + 1 + 5.5
    bills.update(b=(6.0, True))
    assert meter.start("d") == "--max-cost 10 is reached: 10.00 is spent"


def test_a_bill_is_what_the_ledger_says(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    ledger = Ledger(storage.trials / "t" / "cells.jsonl")
    for number, cost in enumerate([0.25, 0.5, None]):
        ledger.append(row(number, "Eat a sandwich.", cost=cost))
    assert bill_of(storage)("t") == (0.75, False)
    (storage.trials / "t" / "manifest.json").write_text("{}")
    assert bill_of(storage)("t") == (0.75, True)


@pytest.mark.parametrize("limit", [{"max_trials": 0}, {"max_hours": -1.0}, {"max_cost": 0.0}])
def test_a_limit_of_nothing_is_refused(limit: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="must be above zero"):
        Budget(**limit)  # type: ignore[arg-type]


def test_the_end_says_how_to_go_on() -> None:
    assert left_over("--max-trials 2 is reached", trials=5).startswith(
        "--max-trials 2 is reached: 5 trials were not started; the same command"
    )
