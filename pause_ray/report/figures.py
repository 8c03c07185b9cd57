"""Figures of a sweep: heatmaps, profiles, recall by position, scores over costs, training curves.

matplotlib is imported when something is drawn, without pyplot, so drawing has no global state and needs no display.
Lines have Okabe and Ito's eight colours (jfly.uni-koeln.de/color) with a marker for each, so that they differ with any colour vision
and in grey print. A condition has the same colour and marker, its look, in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_ray.evaluation.compare import MIDDLE_PERCENT
from pause_ray.evaluation.grid import BIN_PERCENT, DepthAxis, GridCell, GridPosition, depth_profile, length_profile, needs_bins
from pause_ray.evaluation.statistics import Estimate, Interval
from pause_ray.report.ranking import CostAxis, PricedArm
from pause_ray.report.results import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LINE_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_LINES = 6
"""Largest number of lines in a figure."""
MOST_UPRIGHT_TICKS, MOST_TICKS = 8, 18
PAGE_WIDTH_INCHES = 10.6
"""Width of the page; wider figures would be shrunk with their numbers."""
MOST_MARKED_STEPS = 40
MAX_NAMED_ARMS = 14
"""Number of names that fit into a legend beside a figure."""
COST_WORDS = {"overhead": "prompt tokens beyond the asked length (%)", "training": "tokens trained on"}
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
    "text.parse_math": False,
}


def few_of(conditions: Sequence[ArmResult], *, at_most: int = MOST_LINES, cost_axes: Sequence[CostAxis] = ()) -> dict[int, ArmResult]:
    """Return a few conditions by their look (place in the sequence): references and controls, then the fronts, then the highest means."""
    controls = {item.against_control.other for item in conditions if item.against_control}
    on_front = {arm.condition.label for cost_axis in cost_axes for arm in cost_axis.front}

    def rank(look: int) -> tuple[bool, bool, float]:
        item = conditions[look]
        mean = item.summary.grand_mean if item.summary else None
        return not (item.is_reference or item.label in controls), item.label not in on_front, -1.0 if mean is None else -mean - 1

    return {look: conditions[look] for look in sorted(sorted(range(len(conditions)), key=rank)[:at_most])}


def profiles(conditions: Mapping[int, ArmResult], *, axis: DepthAxis) -> Figure:
    """Draw the mean score with its interval over context length and over depth, with a line for each condition (by look)."""
    figure = blank_figure(width=PAGE_WIDTH_INCHES, height=3.3)
    with style():
        by_length, by_depth = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        lines = {look: length_profile(condition.rows) for look, condition in conditions.items()}
        lengths = sorted({length for points in lines.values() for length in points})
        in_tenths = needs_bins((row for condition in conditions.values() for row in condition.rows), axis=axis)
        for nth, (look, condition) in enumerate(conditions.items()):
            off = nth - (len(conditions) - 1) / 2  # equal lines stay visible side by side
            places = {float(lengths.index(length)): point for length, point in lines[look].items()}
            width = 1.8 if condition.is_reference else 1.1
            _line(by_length, places, look=look, label=condition.label, shift=0.05 * off, width=width)
            depths = depth_profile(condition.rows, axis=axis, in_tenths=in_tenths)
            _line(by_depth, depths, look=look, label=None, shift=0.6 * off, width=width)
        _name_lengths(by_length, lengths)
        by_length.set(xlabel="context length (tokens)", ylabel="mean score", ylim=(-0.04, 1.04))
        _name_depths(by_depth, "needle", margin=4)
        _line_legend(figure, by_length)
    return figure


def recall_by_position(lines: Mapping[int, tuple[str, Mapping[float, Estimate]]]) -> Figure:
    """Draw the recall of needles over their depth; ``lines`` has a label and the recall by percent for each look."""
    figure = blank_figure(width=PAGE_WIDTH_INCHES, height=3.1)
    with style():
        axes = figure.subplots()
        for nth, (look, (label, points)) in enumerate(lines.items()):
            _line(axes, points, look=look, label=label, shift=0.5 * (nth - (len(lines) - 1) / 2), width=1.1)
        axes.set(ylabel="recall of facts", ylim=(-0.04, 1.04))
        _name_depths(axes, "fact", margin=2)
        _line_legend(figure, axes)
    return figure


def fronts(cost_axes: Sequence[CostAxis], conditions: Sequence[ArmResult]) -> Figure:
    """Draw the mean score with its interval over each kind of cost, a point per arm, and a staircase through the Pareto front.

    Of more than ``MAX_NAMED_ARMS`` conditions, those that ``few_of`` leaves out are grey.
    """
    looks = {item.label: look for look, item in few_of(conditions, at_most=MAX_NAMED_ARMS, cost_axes=cost_axes).items()}
    figure = blank_figure(width=PAGE_WIDTH_INCHES, height=3.3)
    with style():
        panels = figure.subplots(1, len(cost_axes), sharey=True, squeeze=False)[0]
        for axes, cost_axis in zip(panels, cost_axes, strict=True):
            for arm in cost_axis.arms:
                _draw_arm(axes, arm, look=looks.get(arm.condition.label))
            stair = [(arm.cost, arm.score) for arm in cost_axis.front]
            stair.append((max(arm.cost for arm in cost_axis.arms), stair[-1][1]))
            axes.step(*zip(*stair, strict=True), where="post", color="#888888", linewidth=0.9, zorder=0)
            axes.set(xlabel=COST_WORDS[cost_axis.kind], ylim=(-0.04, 1.04))
            axes.margins(x=0.08)
            axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        panels[0].set_ylabel("mean score")
        _line_legend(figure, panels[0])
    return figure


def _draw_arm(axes: Axes, arm: PricedArm, *, look: int | None) -> None:
    """Draw a point with its whisker, hollow where another arm dominates it."""
    how = {"color": "#bbbbbb", "marker": ".", "linestyle": "none"} if look is None else _look(look)
    _whisker(axes, arm.cost, arm.interval, color=how["color"], alpha=0.45)
    fill: dict[str, Any] = {} if arm.is_on_front else {"markerfacecolor": "white"}
    label = None if look is None else arm.condition.label
    axes.plot([arm.cost], [arm.score], **how, **fill, markersize=5, linewidth=1.1, label=label)


def training_curves(conditions: Mapping[int, ArmResult]) -> Figure | None:
    """Draw the training loss over steps, with a line for each replicate and hollow markers for held-out rows; None without a training."""
    from matplotlib.ticker import MaxNLocator

    if not any(trial.training for condition in conditions.values() for trial in condition.trials):
        return None
    figure = blank_figure(width=PAGE_WIDTH_INCHES, height=2.9)
    with style():
        axes = figure.subplots()
        for index, condition in conditions.items():
            for number, log in enumerate(trial.training for trial in condition.trials if trial.training):
                look = _look(index) | {"marker": "" if len(log) > MOST_MARKED_STEPS else _look(index)["marker"], "markersize": 3}
                curve = [(row["step"], row["loss"]) for row in log]
                axes.plot(*zip(*curve, strict=True), **look, linewidth=1.1, label=condition.label if number == 0 else None)
                held_out = [(row["step"], row["validation_loss"]) for row in log if "validation_loss" in row]
                if held_out:
                    hollow = _look(index) | {"linestyle": ":", "markersize": 6, "markerfacecolor": "none"}
                    axes.plot(*zip(*held_out, strict=True), **hollow, linewidth=0.8)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token)", ylim=(0, None))
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _line_legend(figure, axes)
    return figure


def save(figure: Figure, stem: Path) -> str:
    """Write ``stem.png``, ``stem.pdf`` and ``stem.svg`` (the folder must exist); the same figure gives the same bytes.

    Returns:
        The ``<svg>`` element of the figure.
    """
    save_png(figure, stem.with_suffix(".png"))
    with style():
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    text = stem.with_suffix(".svg").read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def save_png(figure: Figure, path: Path, *, dots_per_inch: int = PNG_DOTS_PER_INCH) -> None:
    """Write the figure as a PNG file."""
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is found; finding it again for every format doubles the time
        figure.savefig(path, dpi=dots_per_inch, metadata={"Software": None})


def blank_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure

    with style():
        return Figure(figsize=(width, height), layout="constrained")


def style() -> Any:
    """Return the matplotlib context for all figures of a sweep."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def format_lengths(lengths: Sequence[int]) -> list[str]:
    """Return the lengths as texts, in a short form if that is different for each."""
    short = [format_tokens(length) for length in lengths]
    return short if len(set(short)) == len(short) else [f"{length:,}" for length in lengths]


def format_tokens(count: int) -> str:
    """Return a text such as ``4K`` for multiples of 1,024 or 1,000, else the number."""
    for size in (1024, 1000):
        if count >= size and count % size == 0:
            return f"{count // size}K"
    return f"{count:,}"


def _name_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    """Draw the ticks of context lengths, which are equally far apart."""
    ticks = range(0, len(lengths), math.ceil(len(lengths) / MOST_TICKS))
    words = format_lengths(lengths)
    axes.set_xticks(ticks, [words[tick] for tick in ticks], rotation=0 if len(ticks) <= MOST_UPRIGHT_TICKS else 60)


def _name_depths(axes: Axes, what: str, *, margin: int) -> None:
    """Draw the ticks of depths, and shade the middle of the context."""
    axes.set(xlabel=f"depth of the {what} (%, 0 = beginning)", xlim=(-margin, 100 + margin), xticks=range(0, 101, 10))
    axes.axvspan(*MIDDLE_PERCENT, color="#000000", alpha=0.04, linewidth=0)


def _line(axes: Axes, points: Mapping[float, Estimate], *, look: int, label: str | None, shift: float, width: float) -> None:
    """Draw a line through the means, with whiskers for their intervals."""
    for place, point in points.items():
        _whisker(axes, place + shift, point.interval, color=_look(look)["color"], alpha=0.55)
    if points:
        line = [(place + shift, point.value) for place, point in points.items()]
        axes.plot(*zip(*line, strict=True), **_look(look), markersize=4, linewidth=width, label=label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)


def _whisker(axes: Axes, place: float, interval: Interval | None, *, color: str, alpha: float) -> None:
    if interval is not None:
        ends = (interval.low, interval.high)
        axes.plot((place, place), ends, color=color, linewidth=0.8, alpha=alpha, solid_capstyle="butt")


def _look(index: int) -> dict[str, Any]:
    """Return the colour, marker and dashes of a look; they differ for the first 24."""
    turn, place = divmod(index, len(LINE_COLOURS))
    return {"color": LINE_COLOURS[place], "marker": MARKERS[place], "linestyle": ("-", "--", ":")[turn % 3]}


def _line_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7.5, handlelength=2.4)


MOST_PANELS_PER_ROW = 4
MOST_WIDE_CELLS = 8
"""Largest number of lengths or positions with cells that have room for two decimals and a range of scores."""
MOST_NUMBERED_CELLS = 20
"""Largest number of lengths and positions with cells that have room for a number."""
BAR_INCHES = 0.8
"""Width of the colour bar with its numbers, in inches."""
MOST_TITLE_CHARS = 22
"""Length of a label from which its arm and its point have a line each."""
UNSCORED, INK = "#f3f3f3", "#444444"


def score_heatmaps(panels: Mapping[str, Mapping[GridPosition, GridCell]], *, axis: DepthAxis) -> Figure:
    """Draw a heatmap of scores for each label, all on the scale 0 to 1."""
    return _heatmaps(panels, axis, colours="cividis", least=0.0, most=1.0, signed=False)


def difference_heatmaps(panels: Mapping[str, Mapping[GridPosition, GridCell]], *, axis: DepthAxis) -> Figure:
    """Draw a heatmap of differences for each label, all on one scale around zero; blue is better than the reference."""
    sizes = [abs(field.value) for fields in panels.values() for field in fields.values() if field.value is not None]
    bound = max(0.25, math.ceil(4 * max(sizes, default=0.0)) / 4)
    return _heatmaps(panels, axis, colours="RdBu", least=-bound, most=bound, signed=True)


def _heatmaps(
    panels: Mapping[str, Mapping[GridPosition, GridCell]], axis: DepthAxis, *, colours: str, least: float, most: float, signed: bool
) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(least, most), colours)
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
        for number, axes in enumerate(grid.flat):
            if number + columns >= len(panels):
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("context length (tokens)")
            axes.set_visible(number < len(panels))
        for axes, (label, fields) in zip(grid.flat, panels.items(), strict=False):
            _heatmap(axes, fields, lengths=lengths, positions=positions, scale=scale, signed=signed)
            _name_positions(axes, axis, lengths=lengths, positions=positions)
            axes.set_title(label.replace(" ", "\n", 1) if len(label) > MOST_TITLE_CHARS else label, loc="left")
        for axes in grid[:, 0]:
            axes.set_ylabel("needle position (tokens)" if axis.kind == "lattice" else "needle depth (%)")
        shrink = min(1.0, 2.2 / rows)
        bar = figure.colorbar(scale, ax=grid, fraction=0.03, pad=0.015, aspect=20, shrink=shrink, anchor=(0.0, 1.0))
        bar.set_label("difference of scores" if signed else "mean score")
        bar.outline.set(linewidth=0.4)
    return figure


def _positions(panels: Mapping[str, Mapping[GridPosition, GridCell]], axis: DepthAxis) -> list[float]:
    """Return all positions from the beginning of a context, including steps of a lattice and bins without a needle."""
    found = {position for fields in panels.values() for _, position in fields}
    if axis.kind == "percent" or not found:
        return sorted(found)
    step = BIN_PERCENT if axis.kind == "bins" else float(axis.lattice_tokens)
    most = 100 - step if axis.kind == "bins" else max(found)
    return [step * place for place in range(round(most / step) + 1)]


def _heatmap(
    axes: Axes, fields: Mapping[GridPosition, GridCell], *, lengths: list[int], positions: list[float], scale: Any, signed: bool
) -> None:
    from matplotlib.patches import Rectangle

    values = [[_number(fields.get((length, position))) for length in lengths] for position in positions]
    image = axes.imshow(values, cmap=scale.cmap, norm=scale.norm, aspect="auto", interpolation="nearest")
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
            text, ink = _words(field, signed=signed, wide=wide, tall=tall), _ink(image, field.value)
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


def _name_positions(axes: Axes, axis: DepthAxis, *, lengths: list[int], positions: list[float]) -> None:
    """Draw the ticks, and on a lattice the marks of a quarter and three quarters of each length."""
    _name_lengths(axes, lengths)
    rows = range(0, len(positions), math.ceil(len(positions) / MOST_TICKS))
    axes.set_yticks(rows, [_format_position(positions[row], axis) for row in rows])
    if axis.kind == "lattice":
        for column, length in enumerate(lengths):
            for percent in MIDDLE_PERCENT:
                row = percent / 100 * length / axis.lattice_tokens
                for side in (-0.5, 0.38):
                    axes.plot((column + side, column + side + 0.12), (row, row), color="#D55E00", linewidth=1.6, solid_capstyle="butt")


def _format_position(position: float, axis: DepthAxis) -> str:
    if axis.kind == "lattice":
        return format_tokens(int(position))
    return f"{position:.3g}" if axis.kind == "percent" else f"{position:.0f}–{position + BIN_PERCENT:.0f}"


def _step(values: Sequence[float], *, wide: float, numbered: float) -> float:
    """Return the size of a cell in inches."""
    return wide if len(values) <= MOST_WIDE_CELLS else numbered if len(values) <= MOST_NUMBERED_CELLS else 0.12


def _words(field: GridCell, *, signed: bool, wide: bool, tall: bool) -> str:
    """Return the mean, a dagger if questions are unscored, and the range of scores if there is room."""
    text = f"{field.value:{'+' if signed else ''}.{2 if wide else 1}f}"
    text = "0" if signed and set(text) <= set("+-0.") else text
    text += "†" if field.num_unscored else ""
    text += f"\n{field.low:.1f}…{field.high:.1f}" if wide and tall and field.low != field.high and not signed else ""
    return text.replace("-", "−")


def _number(field: GridCell | None) -> float:
    return math.nan if field is None or field.value is None else field.value


def _ink(image: Any, value: float) -> str:
    """Return black or white, by contrast with the cell's colour (relative luminance of WCAG 2, simplified)."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "#ffffff" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.3 else "#111111"
