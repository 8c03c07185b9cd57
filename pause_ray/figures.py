"""Figures of a sweep: heatmaps, differences, profiles, training curves. Knows how to draw, not what it means.

matplotlib is imported when something is drawn, without pyplot, so drawing has no global state and needs no display.
Colours: cividis for scores, blue-red for differences, Okabe & Ito's eight (jfly.uni-koeln.de/color) for lines, each
line with its own marker as well; all are told apart with any colour vision, and the first in grey print too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pause_ray.needle.ledger import CellResult
from pause_ray.results import Condition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_PANELS_PER_ROW = 4
MOST_WIDE_CELLS = 8
"""Up to this many lengths or depths cells have room for two decimals and a range."""
PAGE_WIDTH_INCHES = 10.6
"""Wider figures are shrunk by the page, and their numbers with them."""
MOST_MARKED_STEPS = 40
PNG_DOTS_PER_INCH = 200
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "pause_ray",
    "pdf.fonttype": 42,
}

Place = tuple[int, float]
"""``context_tokens`` and ``depth_percent``: column and row of a heatmap."""


@dataclass(frozen=True)
class Field:
    """One cell of a heatmap."""

    value: float | None
    """Mean, or None where nothing could be scored."""
    low: float
    high: float
    """Smallest and largest single value."""
    complete: bool
    """Whether every question here was scored."""


def score_fields(rows: Sequence[CellResult]) -> dict[Place, Field]:
    """Mean score at every length × depth, with the spread over replicates and tasks."""
    found: defaultdict[Place, list[float | None]] = defaultdict(list)
    for row in rows:
        found[row.context_tokens, row.depth_percent].append(row.score)
    return {place: _field(values) for place, values in found.items()}


def difference_fields(rows: Sequence[CellResult], reference: Sequence[CellResult]) -> dict[Place, Field]:
    """Mean paired difference at every length × depth that both asked about."""
    other = {(row.task, row.context_tokens, row.depth_percent, row.replicate): row.score for row in reference}
    found: defaultdict[Place, list[float | None]] = defaultdict(list)
    for row in rows:
        key = (row.task, row.context_tokens, row.depth_percent, row.replicate)
        if key in other:
            against = other[key]
            found[row.context_tokens, row.depth_percent].append(None if row.score is None or against is None else row.score - against)
    return {place: _field(values) for place, values in found.items()}


def score_heatmaps(panels: Mapping[str, Mapping[Place, Field]]) -> Figure:
    """One heatmap of scores per label, all on the scale 0 to 1."""
    return _heatmaps(panels, colours="cividis", least=0.0, most=1.0, words="{:.2f}", legend="mean score")


def difference_heatmaps(panels: Mapping[str, Mapping[Place, Field]]) -> Figure:
    """One heatmap of differences per label, all on one scale around zero; blue is better than the reference."""
    sizes = [abs(field.value) for fields in panels.values() for field in fields.values() if field.value is not None]
    bound = max(0.25, math.ceil(4 * max(sizes, default=0.0)) / 4)
    return _heatmaps(panels, colours="RdBu", least=-bound, most=bound, words="{:+.2f}", legend="difference of scores")


def profiles(conditions: Sequence[Condition]) -> Figure:
    """Mean score over context length and over depth, a line per condition."""
    figure = _figure(width=9.6, height=3.1)
    with _style():
        by_length, by_depth = figure.subplots(1, 2, sharey=True)
        _profile(by_length, conditions, lambda condition: condition.summary.mean_by_length if condition.summary else {}, words=_tokens)
        _profile(
            by_depth, conditions, lambda condition: condition.summary.mean_by_depth if condition.summary else {}, words="{:.3g} %".format
        )
        by_length.set(xlabel="context length (tokens)", ylabel="mean score", ylim=(-0.04, 1.04))
        by_depth.set(xlabel="depth of the needle (0 % = beginning)")
        _line_legend(figure, by_length)
    return figure


def training_curves(conditions: Sequence[Condition]) -> Figure | None:
    """Training loss over steps, one line per replicate; colours as in ``profiles``. None when nothing was trained."""
    from matplotlib.ticker import MaxNLocator

    if not any(trial.training for condition in conditions for trial in condition.trials):
        return None
    figure = _figure(width=9.6, height=2.9)
    with _style():
        axes = figure.subplots()
        for index, condition in enumerate(conditions):
            curves = [[(row["step"], row["loss"]) for row in trial.training] for trial in condition.trials if trial.training]
            for number, curve in enumerate(curves):
                look = _look(index) | {"marker": "" if len(curve) > MOST_MARKED_STEPS else _look(index)["marker"], "markersize": 3}
                axes.plot(*zip(*curve, strict=True), **look, linewidth=1.1, label=condition.label if number == 0 else None)
        axes.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, None))
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _line_legend(figure, axes)
    return figure


def save(figure: Figure, stem: Path) -> str:
    """Write ``stem.png``, ``stem.pdf`` and ``stem.svg`` (the folder must exist); the same figure gives the same bytes.

    Returns:
        The ``<svg>`` element.
    """
    save_png(figure, stem.with_suffix(".png"))
    with _style():
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    text = stem.with_suffix(".svg").read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure at 200 dots per inch."""
    with _style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is found; finding it again for every format doubles the time
        figure.savefig(path, dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})


def _field(values: Sequence[float | None]) -> Field:
    scored = [value for value in values if value is not None]
    if not scored:
        return Field(None, 0.0, 0.0, complete=False)
    return Field(fmean(scored), min(scored), max(scored), complete=len(scored) == len(values))


def _heatmaps(panels: Mapping[str, Mapping[Place, Field]], *, colours: str, least: float, most: float, words: str, legend: str) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    lengths = sorted({length for fields in panels.values() for length, _ in fields})
    depths = sorted({depth for fields in panels.values() for _, depth in fields})
    panel_width = max(2.2, (0.5 if len(lengths) <= MOST_WIDE_CELLS else 0.3) * len(lengths) + 0.35)
    columns = max(1, min(MOST_PANELS_PER_ROW, len(panels), int((PAGE_WIDTH_INCHES - 0.8) / panel_width)))
    rows = math.ceil(len(panels) / columns)
    panel_height = max(1.5, (0.34 if len(depths) <= MOST_WIDE_CELLS else 0.2) * len(depths) + 0.85)
    figure = _figure(width=panel_width * columns + 0.8, height=panel_height * rows)
    with _style():
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (label, fields) in zip(grid.flat, panels.items(), strict=False):
            _heatmap(axes, fields, lengths=lengths, depths=depths, colours=colours, least=least, most=most, words=words)
            axes.set_title(_wrapped(label), loc="left")
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for number, axes in enumerate(grid.flat):
            if number + columns >= len(panels):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("context length (tokens)")
        for axes in grid[:, 0]:
            axes.set_ylabel("needle depth (%)")
        bar = figure.colorbar(
            ScalarMappable(Normalize(least, most), colours),
            ax=grid,
            fraction=0.03,
            pad=0.015,
            aspect=20,
            shrink=min(1.0, 2.2 / rows),
            anchor=(0.0, 1.0),
        )
        bar.set_label(legend)
        bar.outline.set(linewidth=0.4)
    return figure


def _heatmap(
    axes: Axes,
    fields: Mapping[Place, Field],
    *,
    lengths: list[int],
    depths: list[float],
    colours: str,
    least: float,
    most: float,
    words: str,
) -> None:
    from matplotlib.patches import Rectangle

    values = [[_number(fields.get((length, depth))) for length in lengths] for depth in depths]
    image = axes.imshow(values, cmap=colours, vmin=least, vmax=most, aspect="auto", interpolation="nearest")
    roomy = len(lengths) <= MOST_WIDE_CELLS and len(depths) <= MOST_WIDE_CELLS
    size = min(8.0, 34 / len(lengths)) if roomy else 5.5
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            field = fields.get((length, depth))
            if field is None or field.value is None:
                axes.add_patch(
                    Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#f3f3f3", edgecolor="#999999", hatch="////", linewidth=0)
                )
                text, colour = ("" if field is None else "n/s"), "#444444"
            else:
                text, colour = _words(field, words, roomy=roomy), _ink(image, field.value)
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour, linespacing=1.0)
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.3g}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([place - 0.5 for place in range(1, len(lengths))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)


def _words(field: Field, words: str, *, roomy: bool) -> str:
    """Mean, a dagger where questions are missing, and the range where there is room and spread."""
    text = words.format(field.value) if roomy else words.replace(".2f", ".1f").format(field.value)
    text = "0" if set(text) <= set("+-0.") and "+" in words else text
    text += "" if field.complete else "†"
    text += f"\n{field.low:.1f}…{field.high:.1f}" if roomy and field.low != field.high else ""
    return text.replace("-", "−")


def _number(field: Field | None) -> float:
    return math.nan if field is None or field.value is None else field.value


def _ink(image: Any, value: float) -> str:
    """Black or white, whichever is read better on the cell's colour (relative luminance of WCAG 2, simplified)."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "#ffffff" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.3 else "#111111"


def _profile(
    axes: Axes, conditions: Sequence[Condition], means: Callable[[Condition], Mapping[Any, float]], *, words: Callable[[Any], str]
) -> None:
    places = sorted({place for condition in conditions for place in means(condition)})
    for index, condition in enumerate(conditions):
        shift = 0.035 * (index - (len(conditions) - 1) / 2)  # equal lines stay visible side by side
        line = [(number + shift, means(condition)[place]) for number, place in enumerate(places) if place in means(condition)]
        if not line:
            continue
        axes.plot(
            *zip(*line, strict=True),
            **_look(index),
            markersize=4,
            linewidth=1.8 if condition.is_reference else 1.1,
            label=condition.label,
        )
    axes.set_xticks(range(len(places)), [words(place) for place in places], rotation=0 if len(places) <= MOST_WIDE_CELLS else 60)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)


def _look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line at this place; unlike for the first 24."""
    turn, place = divmod(index, len(LINE_COLOURS))
    return {"color": LINE_COLOURS[place], "marker": MARKERS[place], "linestyle": ("-", "--", ":")[turn % 3]}


def _line_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7.5, handlelength=2.4)


def _tokens(count: int) -> str:
    """``4K`` for 4,096 and 4,000, the number itself where neither fits."""
    for size in (1024, 1000):
        if count >= size and count % size == 0:
            return f"{count // size}K"
    return f"{count:,}"


def _wrapped(label: str) -> str:
    """The arm on one line and its point on the next."""
    return label.replace(" ", "\n", 1) if len(label) > 22 else label


def _figure(*, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    with _style():
        return Figure(figsize=(width, height), layout="constrained")


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(STYLE)
