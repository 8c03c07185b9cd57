"""Who begins next, and when nobody does any more."""

from __future__ import annotations

import pytest

from pause_ray.sweep.queue import Budget, BudgetMeter, TrialQueue


def line_of(start: object = None, **arms: int) -> TrialQueue:
    """Trials ``arm-0``, ``arm-1``, … of each arm, waiting in that order."""
    line = TrialQueue(start=start or (lambda key: None))  # type: ignore[arg-type]
    trials = {f"{arm}-{number}": arm for arm, count in arms.items() for number in range(count)}
    line.expect(trials)
    line.add(trials)
    return line


def rest(line: TrialQueue) -> list[str]:
    found = []
    while (key := line.next()) is not None:
        found.append(key)
    return found


def test_trials_begin_in_their_order_and_new_ones_after_those_that_wait() -> None:
    line = line_of(a=2)
    assert line.next() == "a-0"
    line.expect({"b-0": "b"})
    line.add(["b-0"])
    assert rest(line) == ["a-1", "b-0"]
    assert line.ended_by is None


def test_an_arm_whose_first_trials_all_fail_is_given_up_and_the_others_go_on() -> None:
    line = line_of(broken=40, sound=5)
    begun = [line.next() for _ in range(4)]
    for key in begun:
        assert key is not None
        line.note_failed(key, f"rank {key[-1]} of /runs/{key}: no such layer")
    assert rest(line) == [f"sound-{number}" for number in range(5)]
    assert line.ended_by is None
    assert line.given_up == {
        "broken": "4 of 40 trials of the arm broken have failed and none has finished, so the others were not begun; "
        "4 of them: rank 0 of /runs/broken-0: no such layer"
    }


@pytest.mark.parametrize(("failed", "finished"), [(3, 0), (39, 1)])
def test_an_arm_goes_on_below_its_share_of_failures_and_once_a_trial_has_finished(failed: int, finished: int) -> None:
    line = line_of(arm=40)
    line.note_finished(f"arm-{number}" for number in range(finished))
    for number in range(failed):
        line.note_failed(f"arm-{number}", "out of memory")
    assert line.given_up == {}


def test_small_arms_that_all_fail_end_the_sweep_with_the_most_common_reason() -> None:
    line = line_of(**{f"arm{number}": 2 for number in range(10)})
    for number, message in enumerate(["out of memory: 12 GiB", "no such file", "out of memory: 13 GiB"]):
        line.note_failed(f"arm{number}-0", message)
    assert line.next() is None
    assert line.ended_by == (
        "3 of 20 trials have failed and none has finished, so the others were not begun; 2 of them: out of memory: 12 GiB"
    )


def test_one_trial_that_finished_keeps_a_sweep_of_failures_going() -> None:
    line = line_of(**{f"arm{number}": 2 for number in range(10)})
    line.note_finished(["arm9-0"])
    for number in range(8):
        line.note_failed(f"arm{number}-0", "out of memory")
    assert line.ended_by is None


def test_a_reached_budget_leaves_the_others_in_line() -> None:
    line = line_of(BudgetMeter(Budget(max_trials=2)).start, a=3)
    assert rest(line) == ["a-0", "a-1"]
    assert line.ended_by is not None
    assert "--max-trials 2" in line.ended_by


def test_the_first_reason_to_end_counts() -> None:
    line = line_of(a=3)
    line.end("it was interrupted")
    line.end("the budget is spent")
    assert line.next() is None
    assert line.ended_by == "it was interrupted"


def test_one_that_had_begun_goes_on_before_those_that_wait_even_beyond_the_budget() -> None:
    line = line_of(lambda key: "no more" if key == "a-2" else None, a=4)
    assert [line.next(), line.next()] == ["a-0", "a-1"]
    assert line.take_back("a-1")
    assert rest(line) == ["a-1"]
    assert line.ended_by == "no more"
    assert line.take_back("a-0"), "it was started within the budget"
    assert rest(line) == ["a-0"]
    line.end("it was interrupted")
    assert not line.may_take_back
    assert not line.take_back("a-1")


def test_one_that_had_begun_does_not_go_on_where_its_arm_was_given_up_or_the_sweep_is_over() -> None:
    line = line_of(broken=40, sound=5)
    begun = [line.next() for _ in range(5)]
    for key in begun[:4]:
        assert key is not None
        line.note_failed(key, "it cannot be trained")
    assert line.given_up.keys() == {"broken"}
    assert not line.take_back(str(begun[4]))
    assert line.take_back("sound-0")
    line.end("it was interrupted")
    assert rest(line) == []
