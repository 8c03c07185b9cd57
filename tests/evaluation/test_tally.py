"""What a fleet has answered is counted by why it was asked."""

from __future__ import annotations

from pause_ray.evaluation.cell_scheduler import Answered, Tally
from tests.stored_sweep import cell


def test_answers_are_counted_by_what_they_were_asked_for() -> None:
    tally = Tally()
    tally.add(cell(1024, 50.0, 1.0), asked="grid")
    before = tally.answered
    tally.add(cell(2048, 50.0, None, prefilled_tokens=0, decoded_tokens=0), asked="grid")
    tally.add(cell(512, 0.0, 0.0), asked="recheck")
    assert before == {"grid": Answered(cells=1, unscored_cells=0, prefilled_tokens=1024, decoded_tokens=12)}
    assert tally.answered == {
        "grid": Answered(cells=2, unscored_cells=1, prefilled_tokens=1024, decoded_tokens=12),
        "recheck": Answered(cells=1, unscored_cells=0, prefilled_tokens=512, decoded_tokens=12),
    }
