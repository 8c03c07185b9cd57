"""The work that a sweep's bar counts."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from pause_ray.core.process import Stage
from pause_ray.sweep.progress import PENDING_SECONDS, ProgressDisplay, TrialState, work_done, work_of
from pause_ray.trial.spec import TrialSpec

NEEDLES = {"needles": [{"needle": "The key is under the mat.", "question": "Where is it?", "keywords": ["mat"]}]}


def trial(reuse: str = "none", **grid: object) -> TrialSpec:
    suite = {"name": "s", "task": {"kind": "single", "needles": NEEDLES}, "noise": "Grass is green.", "context_tokens": [1000, 3000]}
    return TrialSpec.parse({"model": {"source": "some/model"}, "engine": {"reuse": reuse}, "eval": suite | grid}, origin="test")


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        ({"depth_percent": [0, 50, 100]}, 3 * 1000 + 3 * 3000),
        ({"lattice_tokens": 1000}, 2 * 1000 + 4 * 3000),  # 0 and the end; 0, 1000, 2000 and the end
        ({"samples": 5}, 5 * 1000 + 5 * 3000),
    ],
)
def test_without_sharing_scoring_is_counted_in_the_prompt_tokens_of_every_cell(grid: dict[str, object], tokens: int) -> None:
    assert work_of(trial(**grid)) == (0.0, tokens)


@pytest.mark.parametrize(
    ("reuse", "tokens"),
    [
        # A fact at the beginning shares nothing; others share what stands before both facts.
        ("depth", (1000 + 1000 + 500) + (3000 + 3000 + 1500)),
        ("full", 1000 + 2000 + 1000 + 500 + 2000 + 1500),
    ],
)
def test_what_prompts_share_is_counted_once(reuse: str, tokens: int) -> None:
    assert work_of(trial(reuse, depth_percent=[0, 50, 100])) == (0.0, tokens)


def test_work_that_is_behind_a_trial_never_shrinks() -> None:
    spec = trial(samples=2)
    stages = [
        TrialState(Stage.WAITING, 0, 1),
        TrialState(Stage.QUEUED, 0, 4),
        TrialState(Stage.SCORING, 0, 4),
        TrialState(Stage.SCORING, 3, 4),
        TrialState(Stage.QUEUED, 3, 4),
        TrialState(Stage.QUEUED, 4, 4),
        TrialState(Stage.NUMERICS_CHECK, 0, 2),
        TrialState(Stage.DONE, 1, 1),
    ]
    done = [work_done(work_of(spec), state) for state in stages]
    assert done == sorted(done)
    assert done[-1] == sum(work_of(spec))


@pytest.mark.parametrize(
    ("found", "states", "shown"),
    [
        ({}, {}, "0%"),
        ({}, {"a": TrialState(Stage.SCORING, 3, 4)}, "38%"),
        ({"a": (0.0, 0.5)}, {}, "0%"),
        ({"a": (0.0, 0.5)}, {"a": TrialState(Stage.STARTING, 0, 1)}, "0%"),
        ({"a": (0.0, 0.5)}, {"a": TrialState(Stage.SCORING, 2, 4)}, "0%"),
        ({"a": (0.0, 0.5)}, {"a": TrialState(Stage.SCORING, 3, 4)}, "17%"),  # of the six answers that are missing of eight
        ({"a": (0.0, 0.5), "b": (1.0, 1.0)}, {"a": TrialState(Stage.DONE, 1, 1), "b": TrialState(Stage.DONE, 1, 1)}, "100%"),
    ],
)
def test_what_storage_has_is_no_part_of_the_bar(found: dict[str, tuple[float, float]], states: dict[str, TrialState], shown: str) -> None:
    screen = io.StringIO()
    with ProgressDisplay(Console(file=screen, force_terminal=True, no_color=True, width=200)) as progress:
        progress.add({key: (key, trial(samples=2)) for key in "ab"})
        progress.subtract_stored(found)
        progress.show(states)
    last = screen.getvalue().split("all trials")[-1]
    assert f" {shown} " in last.splitlines()[0]


class Notices:
    """The display's messages about pending requests."""

    def __init__(self) -> None:
        self.screen = io.StringIO()
        self.display = ProgressDisplay(Console(file=self.screen, width=300))

    def shown_at(self, request: str | None, states: Mapping[str, TrialState], *, now: float) -> bool:
        before = self.screen.tell()
        self.display.states = dict(states)
        self.display.note_pending(request, now=now)
        return request is not None and request in self.screen.getvalue()[before:]

    def times(self, request: str | None, states: Mapping[str, TrialState], *, start: int) -> list[float]:
        """The times, in steps of a second for two minutes, at which the request is shown."""
        return [now for now in range(start, start + 120) if self.shown_at(request, states, now=now)]


def test_pending_requests_are_shown_once_after_a_minute_without_progress() -> None:
    notices, waits = Notices(), {"a": TrialState(Stage.WAITING, 0, 1), "b": TrialState(Stage.QUEUED, 0, 1)}
    line = "{'GPU': 1.0}: 1+ pending tasks/actors"
    assert notices.times(line, waits, start=0) == [PENDING_SECONDS]
    assert notices.times(line, waits, start=120) == []
    assert notices.times(line.replace("1+", "2+"), waits, start=240) == [240 + PENDING_SECONDS]
    assert notices.times(None, waits, start=360) == []
    assert notices.times(line, waits, start=480) == [480 + PENDING_SECONDS], "a new shortage"


def test_while_a_trial_makes_progress_no_pending_request_is_shown() -> None:
    notices = Notices()
    steps = [{"a": TrialState(Stage.TRAINING, step, 999)} for step in range(300)]
    assert not any(notices.shown_at("{'GPU': 1.0}: 1+", states, now=now) for now, states in enumerate(steps))
