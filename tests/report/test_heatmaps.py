"""What is drawn is what the ledger says: read back from the figure's own objects, not from pixels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from pause_ray.evaluation.grid import DepthAxis, difference_grid, score_grid
from pause_ray.report.figures import difference_heatmaps, score_heatmaps
from tests.stored_sweep import cell, grid, rows

PERCENT = DepthAxis("percent")
LENGTHS, DEPTHS = (1024, 2048, 4096), (0.0, 50.0, 100.0)
FIRST = grid(LENGTHS, DEPTHS, lambda length, depth: None if (length, depth) == (2048, 50.0) else depth / 100)
SECOND = grid(LENGTHS, DEPTHS, lambda length, _: 0.25 if length == 4096 else 0.0)


def panels_of(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def values_of(axes: Any) -> list[list[float]]:
    return axes.images[0].get_array().filled(math.nan).tolist()


def texts_of(axes: Any) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in axes.texts}


def test_every_number_is_the_ledgers_and_what_was_not_scored_is_no_zero() -> None:
    labels = {"first": rows(FIRST), "second": rows(SECOND)}
    figure = score_heatmaps({label: score_grid(its, axis=PERCENT) for label, its in labels.items()}, axis=PERCENT)
    for axes, scores in zip(panels_of(figure), (FIRST, SECOND), strict=True):
        assert axes.images[0].get_clim() == (0.0, 1.0)
        values, texts = values_of(axes), texts_of(axes)
        for (column, length), (row, depth) in itertools.product(enumerate(LENGTHS), enumerate(DEPTHS)):
            score = scores[length, depth]
            if score is None:
                assert math.isnan(values[row][column])
                assert texts[column, row] == "n/s"
            else:
                assert values[row][column] == score
                assert float(texts[column, row]) == pytest.approx(score, abs=0.005)
    hatched = [[patch.get_xy() for patch in axes.patches if patch.get_hatch()] for axes in panels_of(figure)]
    assert hatched == [[(0.5, 0.5)], []]


def test_differences_have_one_scale_around_zero() -> None:
    a, b = rows(FIRST), rows(SECOND)
    fields = {"a": difference_grid(a, b, axis=PERCENT), "b": difference_grid(b, a, axis=PERCENT)}
    there, back = panels_of(difference_heatmaps(fields, axis=PERCENT))
    assert there.images[0].get_clim() == back.images[0].get_clim() == (-1.0, 1.0)
    for one, other in zip(itertools.chain(*values_of(there)), itertools.chain(*values_of(back)), strict=True):
        assert one == -other or (math.isnan(one) and math.isnan(other))
    assert texts_of(there)[0, 2] == "+1.00"
    assert texts_of(back)[0, 2] == "−1.00"


def test_a_lattice_is_a_triangle() -> None:
    axis = DepthAxis("lattice", 1024)
    asked = [(length, place) for length in LENGTHS for place in range(0, length + 1, 1024)]
    found = [cell(length, 100 * place / length, 1.0) for length, place in asked]
    [axes] = panels_of(score_heatmaps({"a": score_grid(found, axis=axis)}, axis=axis))
    assert set(texts_of(axes)) == {(LENGTHS.index(length), place / 1024) for length, place in asked}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1K", "2K", "3K", "4K"]


def test_samples_are_drawn_in_tenths_of_the_prompt() -> None:
    axis = DepthAxis("bins")
    found = [cell(1000, 0.0, float(sample == 0), sample=sample, needle_token=740, prompt_tokens=1000) for sample in range(4)]
    [axes] = panels_of(score_heatmaps({"a": score_grid(found, axis=axis)}, axis=axis))
    assert texts_of(axes) == {(0, 7): "0.25"}
    assert axes.get_yticklabels()[7].get_text() == "70–80"


def test_a_grid_too_fine_for_numbers_has_none() -> None:
    lengths, depths = range(1000, 36_000, 1000), [round(100 * place / 34, 3) for place in range(35)]
    found = rows(grid(lengths, depths, lambda length, depth: None if depth == 0 and length == 1000 else 1.0))
    [axes] = panels_of(score_heatmaps({"a": score_grid(found, axis=PERCENT)}, axis=PERCENT))
    assert texts_of(axes) == {}
    assert len(axes.get_xticks()) <= 18
    assert [patch.get_xy() for patch in axes.patches if patch.get_hatch()] == [(-0.5, -0.5)]
