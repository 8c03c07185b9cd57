"""Heatmaps of a sweep: scores, and differences of scores, by context length and position. Knows how to draw, not what it means.

cividis for scores, blue-red around zero for differences: both are told apart with any colour vision, and the first in grey
print too. What could not be scored is hatched, so that it is never taken for zero; what was not asked is left blank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pause_ray.compare import MIDDLE_PERCENT
from pause_ray.figures import MOST_TICKS, MOST_UPRIGHT_TICKS, PAGE_WIDTH_INCHES, blank_figure, length_words, style, token_words
from pause_ray.places import BIN_PERCENT, Axis, Field, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS_PER_ROW = 4
MOST_WIDE_CELLS = 8
"""Up to this many lengths or positions cells have room for two decimals, and scores for their range."""
MOST_NUMBERED_CELLS = 20
"""Up to this many lengths and positions numbers can be read at all."""
BAR_INCHES = 0.8
"""Width of the colour bar with its numbers."""
UNSCORED, INK = "#f3f3f3", "#444444"


@dataclass(frozen=True, kw_only=True)
class _Scale:
    colours: str
    least: float
    most: float
    words: str
    """Format of a number with two decimals."""
    legend: str


def score_heatmaps(panels: Mapping[str, Mapping[Place, Field]], *, axis: Axis) -> Figure:
    """One heatmap of scores per label, all on the scale 0 to 1."""
    return _heatmaps(panels, axis, _Scale(colours="cividis", least=0.0, most=1.0, words="{:.2f}", legend="mean score"))


def difference_heatmaps(panels: Mapping[str, Mapping[Place, Field]], *, axis: Axis) -> Figure:
    """One heatmap of differences per label, all on one scale around zero; blue is better than the reference."""
    sizes = [abs(field.value) for fields in panels.values() for field in fields.values() if field.value is not None]
    bound = max(0.25, math.ceil(4 * max(sizes, default=0.0)) / 4)
    return _heatmaps(panels, axis, _Scale(colours="RdBu", least=-bound, most=bound, words="{:+.2f}", legend="difference of scores"))


def _heatmaps(panels: Mapping[str, Mapping[Place, Field]], axis: Axis, scale: _Scale) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    lengths = sorted({length for fields in panels.values() for length, _ in fields})
    positions = _positions(panels, axis)
    room, least_width = PAGE_WIDTH_INCHES - BAR_INCHES, max(2.2, _step(lengths, wide=0.5, numbered=0.3) * len(lengths) + 0.35)
    columns = max(1, min(MOST_PANELS_PER_ROW, len(panels), int(room / least_width)))
    panel_width = max(least_width, min(room / columns, _step(lengths, wide=0.8, numbered=0.3) * len(lengths) + 0.35))
    rows = math.ceil(len(panels) / columns)
    panel_height = max(1.5, _step(positions, wide=0.34, numbered=0.2) * len(positions) + 0.85)
    figure = blank_figure(width=panel_width * columns + BAR_INCHES, height=panel_height * rows)
    with style():
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (label, fields) in zip(grid.flat, panels.items(), strict=False):
            _heatmap(axes, fields, lengths=lengths, positions=positions, scale=scale)
            _name_positions(axes, axis, lengths=lengths, positions=positions)
            axes.set_title(_wrapped(label), loc="left")
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for number, axes in enumerate(grid.flat):
            if number + columns >= len(panels):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("context length (tokens)")
        for axes in grid[:, 0]:
            axes.set_ylabel("needle position (tokens)" if axis.kind == "lattice" else "needle depth (%)")
        bar = figure.colorbar(
            ScalarMappable(Normalize(scale.least, scale.most), scale.colours),
            ax=grid,
            fraction=0.03,
            pad=0.015,
            aspect=20,
            shrink=min(1.0, 2.2 / rows),
            anchor=(0.0, 1.0),
        )
        bar.set_label(scale.legend)
        bar.outline.set(linewidth=0.4)
    return figure


def _positions(panels: Mapping[str, Mapping[Place, Field]], axis: Axis) -> list[float]:
    """From the beginning of a context down; steps of a lattice and bins without a fact have a row as well."""
    found = {position for fields in panels.values() for _, position in fields}
    if axis.kind == "percent" or not found:
        return sorted(found)
    step = BIN_PERCENT if axis.kind == "bins" else float(axis.lattice_tokens)
    most = 100 - step if axis.kind == "bins" else max(found)
    return [step * place for place in range(round(most / step) + 1)]


def _heatmap(axes: Axes, fields: Mapping[Place, Field], *, lengths: list[int], positions: list[float], scale: _Scale) -> None:
    from matplotlib.patches import Rectangle

    values = [[_number(fields.get((length, position))) for length in lengths] for position in positions]
    image = axes.imshow(values, cmap=scale.colours, vmin=scale.least, vmax=scale.most, aspect="auto", interpolation="nearest")
    wide, tall = len(lengths) <= MOST_WIDE_CELLS, len(positions) <= MOST_WIDE_CELLS
    numbered = max(len(lengths), len(positions)) <= MOST_NUMBERED_CELLS
    size = min(8.0 if tall else 7.0, 34 / len(lengths)) if wide else 5.5
    dots: dict[str, list[tuple[float, float]]] = {}
    for (length, position), field in fields.items():
        column, row = lengths.index(length), positions.index(position)
        if field.value is None:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=UNSCORED, edgecolor="#999999", hatch="////", linewidth=0))
            text, ink = "n/s", INK
        else:
            text, ink = _words(field, scale.words, wide=wide, tall=tall), _ink(image, field.value)
        if numbered:
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink, linespacing=1.0)
        if field.uncertain:
            dots.setdefault(ink, []).append((column + 0.42, row - 0.36))
    for ink, places in dots.items():  # one element for all: of thousands, each takes a millisecond in each format
        axes.plot(
            *zip(*places, strict=True), linestyle="none", marker="o", markersize=2.4 if numbered else 1.5, markeredgewidth=0, color=ink
        )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([place - 0.5 for place in range(1, len(lengths))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(positions))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if numbered else 0.3)
    axes.tick_params(which="minor", length=0)


def _name_positions(axes: Axes, axis: Axis, *, lengths: list[int], positions: list[float]) -> None:
    """Ticks; on a lattice also where a quarter and three quarters of each length are."""
    columns, rows = range(0, len(lengths), _every(lengths)), range(0, len(positions), _every(positions))
    words = length_words(lengths)
    axes.set_xticks(columns, [words[place] for place in columns], rotation=0 if len(lengths) <= MOST_UPRIGHT_TICKS else 60)
    axes.set_yticks(rows, [_position_words(positions[place], axis) for place in rows])
    if axis.kind == "lattice":
        for column, length in enumerate(lengths):
            for percent in MIDDLE_PERCENT:
                row = percent / 100 * length / axis.lattice_tokens
                for side in (-0.5, 0.38):
                    axes.plot((column + side, column + side + 0.12), (row, row), color="#D55E00", linewidth=1.6, solid_capstyle="butt")


def _position_words(position: float, axis: Axis) -> str:
    if axis.kind == "lattice":
        return token_words(int(position))
    return f"{position:.3g}" if axis.kind == "percent" else f"{position:.0f}–{position + BIN_PERCENT:.0f}"


def _step(values: Sequence[float], *, wide: float, numbered: float) -> float:
    """Inches of a cell."""
    return wide if len(values) <= MOST_WIDE_CELLS else numbered if len(values) <= MOST_NUMBERED_CELLS else 0.12


def _every(values: Sequence[float]) -> int:
    return math.ceil(len(values) / MOST_TICKS)


def _words(field: Field, words: str, *, wide: bool, tall: bool) -> str:
    """Mean, a dagger where questions are missing, and the range of scores where there is room and spread."""
    text = (words if wide else words.replace(".2f", ".1f")).format(field.value)
    text = "0" if set(text) <= set("+-0.") and "+" in words else text
    text += "†" if field.num_unscored else ""
    text += f"\n{field.low:.1f}…{field.high:.1f}" if wide and tall and field.low != field.high and "+" not in words else ""
    return text.replace("-", "−")


def _number(field: Field | None) -> float:
    return math.nan if field is None or field.value is None else field.value


def _ink(image: Any, value: float) -> str:
    """Black or white, whichever is read better on the cell's colour (relative luminance of WCAG 2, simplified)."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "#ffffff" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.3 else "#111111"


def _wrapped(label: str) -> str:
    """The arm on one line and its point on the next."""
    return label.replace(" ", "\n", 1) if len(label) > 22 else label
