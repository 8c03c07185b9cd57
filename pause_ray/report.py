"""The report of a sweep: one HTML file without outside references, figures for papers, a CSV, a table for the terminal.

Lays out what ``results`` computed, ``findings`` said and ``figures`` drew. Reads storage only, so it can be written again
at any time, for a sweep that is still running too.
"""

from __future__ import annotations

import base64
import csv
import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_ray import figures
from pause_ray.compare import Interval, enough_replicates
from pause_ray.findings import headline, interval_words, notes, p_words
from pause_ray.needle.ledger import CellResult
from pause_ray.results import Condition, Contrast, SweepResults, read_results
from pause_ray.spec import JsonObject
from pause_ray.storage import Storage, space_errors, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

VERSIONED = ("ray", "torch", "transformers", "peft", "deepspeed", "mlflow", "polars", "pyarrow", "numpy")
SHOWN_QUESTIONS = 3
SHOWN_ANSWER_CHARS = 280
MINUS = "−"


def write_report(sweep_folder: Path, storage: Storage) -> Path:
    """Write ``report.html``, ``arms.csv`` and ``figures/*.{png,pdf,svg}`` into the sweep's folder.

    Raises:
        StorageError: the sweep's or a trial's files are damaged, or the disk is full.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    results = read_results(sweep_folder, storage)
    folder = sweep_folder / "figures"
    with space_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {name: figures.save(figure, folder / name) for name, figure in _draw(results).items()}
    write_text(sweep_folder / "arms.csv", _csv(results))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "count": count, "percent": percent, "duration": duration, "title": title}
    environment.globals |= {"p_words": p_words, "interval_words": _interval_words}
    path = sweep_folder / "report.html"
    write_text(path, environment.get_template("report.html.jinja").render(_view(results, drawn)))
    return path


def table(sweep_folder: Path, storage: Storage) -> Table:
    """The arms as a table for the terminal (80 columns are enough), with the finding as its caption.

    Differences are against the sweep's reference; rows named ``A vs B`` hold those against its control.
    ``n/s`` counts cells that could not be scored; bold arms differ from the reference by more than chance would explain.

    Raises:
        StorageError: the sweep's or a trial's files are damaged.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    results = read_results(sweep_folder, storage)
    shown = Table(
        title=f"{results.name}: {results.progress}",
        caption=headline(results),
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("arm", overflow="fold")
    for column in ("score [95 %]", "difference [95 %]", "p", "exact", "n/s"):
        shown.add_column(column, justify="right", no_wrap=True)
    for condition in results.conditions:
        shown.add_row(*_terminal_row(condition), style="bold" if condition.differs else None)
    for contrast in results.control_contrasts:
        shown.add_row(*_control_row(contrast), style="bold" if contrast.differs else None)
    return shown


def corpus_table(stats: JsonObject) -> Table:
    """The statistics of one shard set as a table for the terminal, histograms as a line each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title="training rows", title_justify="left", box=SIMPLE_HEAD, show_header=False, padding=(0, 1, 0, 0))
    for name, value in _plain(stats).items():
        shown.add_row(name, value)
    for name, bars in _histograms(stats):
        shown.add_row(name, ", ".join(f"{label}: {height:,.0f}" for label, height, _ in bars))
    return shown


def number(value: float | None) -> str:
    """``0.67``, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """``+0.22`` with a real minus sign, or a dash."""
    if value is None:
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", MINUS)


def count(value: float) -> str:
    """``12,345``."""
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share of 0 to 1 as ``67 %``."""
    return "–" if value is None else f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """``41 s``, ``12 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def title(name: str) -> str:
    """``pauses_per_1k_tokens`` → ``Pauses per 1k tokens``."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _interval_words(interval: Interval | None, *, signs: bool = False) -> str:
    return "–" if interval is None else interval_words(interval, signed=signs).replace("-", MINUS)


def _terminal_row(condition: Condition) -> list[str]:
    summary, comparison = condition.summary, condition.comparison
    if summary is None:
        return [condition.label, "not finished"]
    missing = condition.num_planned - len(condition.trials)
    return [
        condition.label + (f" ({missing} of {condition.num_planned} to come)" if missing else ""),
        f"{number(summary.grand_mean)}{_bracketed(summary.interval)}",
        "reference"
        if condition.is_reference
        else f"{signed(comparison.difference)}{_bracketed(comparison.interval, signs=True)}"
        if comparison
        else "",
        p_words(comparison.p).removeprefix("= ") if comparison else "",
        percent(summary.exact_recall),
        str(summary.num_unscored),
    ]


def _control_row(contrast: Contrast) -> list[str]:
    comparison = contrast.comparison
    difference = f"{signed(contrast.difference)}{_bracketed(comparison.interval, signs=True)}"
    return [f"{contrast.label} vs {contrast.other}", "", difference, p_words(comparison.p).removeprefix("= "), "", ""]


def _bracketed(interval: Interval | None, *, signs: bool = False) -> str:
    """`` [0.44, 0.89]``, ready for a rich cell."""
    return "" if interval is None else rf" \[{_interval_words(interval, signs=signs).replace(' to ', ', ')}]"


def _draw(results: SweepResults) -> dict[str, Figure]:
    """Name → figure, only those that have something to show."""
    scored = _reference_first(results.scored)
    drawn: dict[str, Figure] = {}
    if not scored:
        return drawn
    fields = {condition.label: figures.score_fields(condition.rows) for condition in scored}
    drawn["heatmaps"] = figures.score_heatmaps(fields)
    references = {condition.label: condition for condition in scored}
    differences = {
        condition.label: figures.difference_fields(condition.rows, references[condition.compared_to].rows)
        for condition in results.compared
        if condition.compared_to is not None
    }
    if differences:
        drawn["differences"] = figures.difference_heatmaps(differences)
    drawn["profiles"] = figures.profiles(scored)
    training = figures.training_curves(scored)
    if training is not None:
        drawn["training"] = training
    return drawn


def _view(results: SweepResults, drawn: Mapping[str, str]) -> JsonObject:
    conditions = _reference_first(results.conditions)
    bound = max((abs(edge) for contrast in [*results.contrasts, *results.control_contrasts] for edge in _reach(contrast)), default=1.0)
    return {
        "results": results,
        "headline": headline(results).replace(" -", f" {MINUS}"),
        "notes": notes(results),
        "conditions": conditions,
        "bound": max(0.1, bound),
        "enough": enough_replicates(max(1, len(results.contrasts))),
        "facts": _facts(results),
        "figures": {name: _data_uri(svg) for name, svg in drawn.items()},
        "questions": _questions(results.scored),
        "corpora": _corpora(results),
        "costs": [(condition, _cost(condition)) for condition in conditions if condition.summary],
        "versions": _versions(),
        "made": results.description,
        "spec_json": json.dumps(results.description.get("spec", {}), indent=2, ensure_ascii=False),
    }


def _facts(results: SweepResults) -> list[tuple[str, str]]:
    rows = [row for condition in results.scored for row in condition.rows]
    if not rows:
        return [("Trials", results.progress)]
    lengths, depths = sorted({row.context_tokens for row in rows}), sorted({row.depth_percent for row in rows})
    return [
        ("Trials", results.progress),
        ("Model", ", ".join(sorted({row.model for row in rows}))),
        ("Task", ", ".join(sorted({row.task for row in rows}))),
        ("Context", _range([f"{length:,}" for length in lengths], "tokens")),
        ("Needle depths", _range([f"{depth:g}" for depth in depths], "%")),
        ("Cells answered", f"{len(rows):,}"),
        ("Replicates", str(len({row.replicate for row in rows}))),
        ("Scorer", ", ".join(sorted({row.scorer for row in rows}))),
    ]


def _range(values: Sequence[str], unit: str) -> str:
    return f"{', '.join(values)} {unit}" if len(values) <= 5 else f"{values[0]} to {values[-1]} {unit} ({len(values)} values)"


def _questions(conditions: Sequence[Condition]) -> list[JsonObject]:
    """The cells on which the conditions' scores lie furthest apart, each with every condition's answer."""
    by_place: dict[tuple[Any, ...], list[tuple[Condition, CellResult]]] = {}
    for condition in conditions:
        for row in condition.rows:
            by_place.setdefault((row.replicate, row.task, row.context_tokens, row.depth_percent), []).append((condition, row))

    def spread(answers: Sequence[tuple[Condition, CellResult]]) -> float:
        scores = [row.score for _, row in answers if row.score is not None]
        return max(scores) - min(scores) if scores else 0.0

    chosen = sorted(by_place.items(), key=lambda item: (-spread(item[1]), item[0]))[:SHOWN_QUESTIONS]
    return [
        {"row": answers[0][1], "answers": [(condition.label, row, _shortened(row.response)) for condition, row in answers]}
        for _, answers in sorted(chosen)
    ]


def _shortened(text: str | None) -> str:
    if text is None:
        return ""
    return text if len(text) <= SHOWN_ANSWER_CHARS else f"{text[:SHOWN_ANSWER_CHARS]} … ({len(text):,} characters)"


def _corpora(results: SweepResults) -> list[JsonObject]:
    """Each shard set once: which conditions it trained, plain statistics, histograms."""
    found: dict[str, JsonObject] = {}
    for condition in results.scored:
        for trial in condition.trials:
            if trial.corpus_stats:
                name, stats = str(trial.manifest.get("shards")), trial.corpus_stats
                corpus = found.setdefault(name, {"name": name, "used_by": {}, "stats": _plain(stats), "histograms": _histograms(stats)})
                corpus["used_by"][condition.label] = None
    return list(found.values())


def _plain(stats: JsonObject) -> dict[str, str]:
    return {title(name): _value(value) for name, value in stats.items() if not isinstance(value, dict | list)}


def _histograms(stats: JsonObject) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Name → bars of (label, value, share of the highest), from counts by name or by ``from_tokens`` and ``to_tokens``."""
    shown = []
    for name, value in stats.items():
        if isinstance(value, dict):
            bars = [(str(label), height) for label, height in value.items()]
        elif isinstance(value, list):
            bars = [(f"{bin_['from_tokens']:,} to {bin_['to_tokens']:,}", bin_["rows"]) for bin_ in value]
        else:
            continue
        highest = max((height for _, height in bars), default=0) or 1
        shown.append((title(name), [(label, height, height / highest) for label, height in bars]))
    return shown


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"
    return str(value)


def _cost(condition: Condition) -> JsonObject:
    steps = [row for trial in condition.trials for row in trial.training]
    return {
        "steps": len(steps),
        "training": sum(row.get("seconds", 0.0) for row in steps),
        "last_loss": [trial.training[-1]["loss"] for trial in condition.trials if trial.training],
    }


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in VERSIONED:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _csv(results: SweepResults) -> str:
    """One line per condition; numbers unrounded, empty where there is none."""
    columns = [_csv_row(condition) for condition in results.conditions]
    names = list(dict.fromkeys(name for row in columns for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)
    return buffer.getvalue()


def _csv_row(condition: Condition) -> JsonObject:
    summary = condition.summary
    row: JsonObject = {
        "arm": condition.arm,
        **condition.point,
        "trials_planned": condition.num_planned,
        "trials_finished": len(condition.trials),
    }
    if summary is not None:
        row |= {
            "cells": summary.num_cells,
            "unscored": summary.num_unscored,
            "repeated": summary.num_repeated,
            "cut_off": sum(trial.num_cut_off for trial in condition.trials),
            "score": summary.grand_mean,
            **_edges("score", summary.interval),
            "exact_recall": summary.exact_recall,
            **_edges("exact_recall", summary.exact_interval),
            "middle": summary.middle_mean,
            "edges": summary.edge_mean,
            **{f"score_{length}_tokens": mean for length, mean in summary.mean_by_length.items()},
            "prompt_overhead_percent": summary.prompt_overhead_percent,
            "pauses_per_prompt": summary.pauses_per_prompt,
            "prefilled_tokens": summary.prefilled_tokens,
            "decoded_tokens": summary.decoded_tokens,
            "answering_seconds": summary.seconds,
        }
    if condition.against_reference is not None:
        row |= {"compared_to": condition.compared_to, **_contrast_columns(condition.against_reference)}
    if condition.against_control is not None:
        control = {f"control_{name}": value for name, value in _contrast_columns(condition.against_control).items()}
        row |= {"control": condition.against_control.other, **control}
    return row


def _contrast_columns(contrast: Contrast) -> JsonObject:
    comparison = contrast.comparison
    return {
        "pairs": comparison.num_pairs,
        "difference": comparison.difference,
        **_edges("difference", comparison.interval),
        "p": comparison.p,
        "p_corrected": contrast.corrected_p,
        "relative_percent": comparison.relative_percent,
    }


def _edges(name: str, interval: Interval | None) -> JsonObject:
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _reach(contrast: Contrast) -> list[float]:
    interval = contrast.comparison.interval
    return [contrast.difference] if interval is None else [interval.low, interval.high]


def _reference_first(conditions: Sequence[Condition]) -> list[Condition]:
    return sorted(conditions, key=lambda condition: not condition.is_reference)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
