"""The report of a sweep: one HTML file without external references, figures for papers, a CSV, and a table for the terminal.

The report reads storage only, so it can be written again at any time, also while the sweep runs.
"""

from __future__ import annotations

import base64
import csv
import importlib.metadata
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_ray.core import format as formats
from pause_ray.core.format import format_interval, format_number, format_values
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import space_errors, write_text
from pause_ray.evaluation.compare import compare_arms, middle_gap, recall_by_depth, split_by_place, summarize
from pause_ray.evaluation.grid import by_fact, difference_grid, needs_bins, score_grid
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.statistics import BOOTSTRAP_UNITS, Estimate, Interval, min_replicates
from pause_ray.report import figures
from pause_ray.report.findings import ARM_COLUMNS, arm_cells, bracketed, control_cells, format_noise, headline, notes
from pause_ray.report.ranking import (
    best,
    cost_axes,
    exported,
    format_objective,
    objective_of,
    rank_correlations,
    rung_histories,
    trained_tokens,
)
from pause_ray.report.results import ArmResult, Contrast, SweepResults, answer_cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


SHOWN_QUESTIONS = 3
SHOWN_ANSWER_CHARS = 280
SHOWN_REASONS = 12
SCORERS = {
    "keywords": "share of the facts’ keywords that the answer contains",
    "all": "1 if the answer contains all keywords, else 0",
    "exact": "1 if the answer is the references and nothing else, else 0",
    "string_match": "share of the references that occur in the answer (RULER’s string match)",
    "label": "1 if the answer names the right label and no other (BABILong’s rule), else 0",
    "chain_progress": "how far along the chain the answer got, 0 to 1",
}


def facts(results: SweepResults) -> list[tuple[str, str]]:
    """Return the names and values of the report's header, such as the model and the context lengths."""
    rows = [row for condition in results.scored for row in condition.rows]
    if not rows:
        return [("Trials", results.progress)]
    lengths = sorted({row.context_tokens for row in rows})
    asked = sorted({num_asked(row) for row in rows if row.facts})
    several = [("Facts per question", format_values([str(number) for number in asked], "").strip())] if asked not in ([], [1]) else []
    precisions = sorted({_precision(trial.spec) for trial in results.trials} - {""})
    return [
        ("Trials", results.progress),
        ("Model", ", ".join(sorted({row.model for row in rows}))),
        *([("Precision", ", ".join(precisions))] if precisions else []),
        ("Engine", ", ".join(sorted({row.engine for row in rows}))),
        ("Task", ", ".join(sorted({row.task for row in rows}))),
        *several,
        ("Context", format_values([f"{length:,}" for length in lengths], "tokens")),
        ("Needle positions", _positions(results, rows)),
        ("Cells answered", f"{len(rows):,}"),
        ("Replicates", str(len({row.replicate for row in rows}))),
        ("Scorer", ", ".join(sorted({row.scorer for row in rows}))),
    ]


def num_asked(row: CellResult) -> int:
    """Return the number of needles that a question asks for."""
    return sum(bool(fact.references) for fact in row.facts)


def describe_score(results: SweepResults) -> str:
    """Return the meaning of the scores, by scorer."""
    scorers = sorted({row.scorer for condition in results.scored for row in condition.rows})
    return "; ".join(SCORERS.get(scorer, f"as graded by {scorer}, 0 to 1") for scorer in scorers)


def middle_and_edges(conditions: Sequence[ArmResult]) -> list[JsonObject]:
    """Return the summaries and differences in the middle and at the edges of the context, the gap and its gain, for each condition."""
    found = []
    parts = {condition.label: split_by_place(condition.rows) for condition in conditions}
    for condition in conditions:
        middle, edges = parts[condition.label]
        against = parts.get(condition.against_reference.other) if condition.against_reference else None
        if middle and edges:
            found.append(
                {
                    "condition": condition,
                    "middle": summarize(middle),
                    "edges": summarize(edges),
                    "gap": middle_gap(condition.rows),
                    "middle_comparison": compare_arms(middle, against[0]) if against else None,
                    "edges_comparison": compare_arms(edges, against[1]) if against else None,
                    "gain": condition.comparison.effects.middle_gain if condition.comparison else None,
                }
            )
    return found


def unscored(conditions: Sequence[ArmResult]) -> list[JsonObject]:
    """Return the reasons of unscored cells, most frequent first, with their number in all and by condition."""
    counts = {condition.label: Counter(row.unscored_reason for row in condition.rows if row.score is None) for condition in conditions}
    reasons = sum(counts.values(), Counter())
    return [
        {"reason": reason, "total": total, "by_condition": {label: item[reason] for label, item in counts.items() if item[reason]}}
        for reason, total in reasons.most_common(SHOWN_REASONS)
    ]


def costs(conditions: Sequence[ArmResult]) -> list[JsonObject]:
    """Return the steps, seconds and tokens of each condition's training and answers."""
    found = []
    for condition in conditions:
        steps = [row for trial in condition.trials for row in trial.training]
        losses = [trial.training[-1]["loss"] for trial in condition.trials if trial.training]
        found.append(
            {
                "condition": condition,
                "steps": len(steps),
                "training": sum(row.get("seconds", 0.0) for row in steps),
                "last_loss": sum(losses) / len(losses) if losses else None,
                "answers": answer_cost(condition.rows),
                "currency": ", ".join(sorted({_currency(trial.spec) for trial in condition.trials} - {""})),
            }
        )
    return found


def trainings(conditions: Sequence[ArmResult]) -> list[JsonObject]:
    """Return the speed and peak memory of each condition's training, without those whose logs do not have them."""
    found = []
    for condition in conditions:
        logs = [trial.training for trial in condition.trials if trial.training and "peak_memory_bytes" in trial.training[0]]
        steps = [row for log in logs for row in log]
        if not steps:
            continue
        tokens, seconds = sum(row["tokens"] for row in steps), sum(row["seconds"] for row in steps)
        held_out = [values[-1] for log in logs if (values := [row["validation_loss"] for row in log if "validation_loss" in row])]
        measured = [row for row in steps if "mfu" in row]
        found.append(
            {
                "condition": condition,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "padding_share": 1 - tokens / sum(row["tokens"] / (1 - row["padding_share"]) for row in steps),
                "mfu": sum(row["mfu"] * row["seconds"] for row in measured) / sum(row["seconds"] for row in measured) if measured else None,
                "peak_memory_bytes": max(row["peak_memory_bytes"] for row in steps),
                "validation_loss": sum(held_out) / len(held_out) if held_out else None,
            }
        )
    return found


def questions(results: SweepResults) -> list[JsonObject]:
    """Return the cells with the largest range of scores over conditions, each with the answer of every condition."""
    by_place: dict[tuple[Any, ...], list[tuple[ArmResult, CellResult]]] = {}
    for condition in results.scored:
        for row in condition.rows:
            place = (row.replicate, row.task, row.context_tokens, row.depth_percent, row.sample)
            by_place.setdefault(place, []).append((condition, row))

    def spread(answers: Sequence[tuple[ArmResult, CellResult]]) -> float:
        scores = [row.score for _, row in answers if row.score is not None]
        return max(scores) - min(scores) if scores else 0.0

    chosen = sorted(by_place.items(), key=lambda item: (-spread(item[1]), item[0]))[:SHOWN_QUESTIONS]
    return [
        {"row": answers[0][1], "answers": [(condition.label, row, _shortened(row.response)) for condition, row in answers]}
        for _, answers in sorted(chosen)
    ]


def corpora(results: SweepResults) -> list[JsonObject]:
    """Return each shard set once, with the conditions that were trained on it, its statistics and histograms."""
    found: dict[str, JsonObject] = {}
    for condition in results.scored:
        for trial in condition.trials:
            if trial.corpus_stats:
                name, stats = str(trial.manifest.get("shards")), trial.corpus_stats
                corpus = found.setdefault(name, {"name": name, "used_by": {}, "stats": plain(stats), "histograms": histograms(stats)})
                corpus["used_by"][condition.label] = None
    return list(found.values())


def plain(stats: JsonObject) -> dict[str, str]:
    """Return the statistics of a corpus that are single values, as titles and texts."""
    return {formats.format_title(name): _value(value) for name, value in stats.items() if not isinstance(value, dict | list)}


def histograms(stats: JsonObject) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Return the title and the bars (label, value, share of the highest) of each statistic that counts by name or by token range."""
    shown = []
    for name, value in stats.items():
        if isinstance(value, dict):
            bars = [(str(label), height) for label, height in value.items()]
        elif isinstance(value, list):
            bars = [(f"{bin_['from_tokens']:,} to {bin_['to_tokens']:,}", bin_["rows"]) for bin_ in value]
        else:
            continue
        highest = max((height for _, height in bars), default=0) or 1
        shown.append((formats.format_title(name), [(label, height, height / highest) for label, height in bars]))
    return shown


def answers_per_field(results: SweepResults) -> int:
    """Return the largest number of questions in one cell of a heatmap."""
    axis = results.axis
    counts = Counter(
        (condition.label, row.context_tokens, axis.position(fact))
        for condition in results.scored
        for row in condition.rows
        for fact in by_fact(row, axis=axis)
    )
    return max(counts.values(), default=0)


def _positions(results: SweepResults, rows: Sequence[CellResult]) -> str:
    if results.axis.kind == "percent":
        return format_values([f"{depth:g}" for depth in sorted({row.depth_percent for row in rows})], "%")
    if results.axis.kind == "lattice":
        return f"every {results.axis.lattice_tokens:,} tokens, and the end"
    if not all(trial.suite.get("samples") for trial in results.trials):
        return "of several grids, shown in tenths of the prompt"
    return f"random, {1 + max(row.sample for row in rows)} per length"


def _currency(spec: JsonObject) -> str:
    prices = (spec.get("engine") or {}).get("prices") or {}
    return str(prices.get("currency", ""))


def _precision(spec: JsonObject) -> str:
    model = spec.get("model") or {}
    return " ".join(filter(None, [model.get("dtype"), model.get("quantize")])) if isinstance(model, dict) else ""


def _shortened(text: str | None) -> str:
    if text is None:
        return ""
    return text if len(text) <= SHOWN_ANSWER_CHARS else f"{text[:SHOWN_ANSWER_CHARS]} … ({len(text):,} characters)"


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"
    return str(value)


SHOWN_ARMS, SHOWN_HISTORIES = 24, 200
MOST_HEATMAPS = 24
"""Largest number of heatmaps in a figure; each takes a second to draw."""
VERSIONED = ("ray", "torch", "transformers", "peft", "deepspeed", "mlflow", "polars", "pyarrow", "numpy")


def write_report(results: SweepResults) -> Path:
    """Write ``report.html``, ``arms.csv`` and ``figures/*.{png,pdf,svg}`` into the folder of a sweep.

    Raises:
        StorageError: the disk is full.
    """
    folder = results.folder / "figures"
    with space_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {name: figures.save(figure, folder / name) for name, figure in _draw(results).items()}
    write_text(results.folder / "arms.csv", arms_csv(results))
    path = results.folder / "report.html"
    write_text(path, page(results, drawn))
    return path


def page(results: SweepResults, drawn: Mapping[str, str]) -> str:
    """Return the report as HTML; ``drawn`` has the ``<svg>`` element of each figure by name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: function for name, function in vars(formats).items() if name.startswith("format_")}
    environment.globals |= {"interval": _format_interval, "format_objective": format_objective}
    return environment.get_template("report.html.jinja").render(_view(results, drawn))


def arms_csv(results: SweepResults) -> str:
    """Return a CSV table with a line for each condition; numbers are not rounded, and empty where there is none."""
    priced_arms = {(axis.kind, arm.condition.label): arm for axis in cost_axes(results) for arm in axis.arms}
    columns = [
        _csv_row(condition)
        | {f"{kind}_front": "yes" if arm.is_on_front else "no" for (kind, label), arm in priced_arms.items() if label == condition.label}
        for condition in results.conditions
    ]
    names = list(dict.fromkeys(name for row in columns for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)
    return buffer.getvalue()


def table(results: SweepResults) -> Table:
    """Return the arms of a sweep as a table for a terminal of at least 80 columns, with the headline as its caption.

    Differences are to the sweep's reference; rows named ``A vs B`` have those to its control. p is corrected for the number of
    comparisons; ``n/s`` counts unscored cells; bold arms differ by more than chance would explain.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=Text(f"{results.name}: {results.progress}"),
        caption=Text(headline(results) + _format_best(results)),
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column(ARM_COLUMNS[0], overflow="fold")
    for column in ARM_COLUMNS[1:]:
        shown.add_column(column, justify="right", no_wrap=True)
    lines = [(arm_cells(condition), condition.differs) for condition in results.conditions]
    for cells, differs in lines + [(control_cells(contrast), contrast.differs) for contrast in results.control_contrasts]:
        shown.add_row(*map(Text, cells), style="bold" if differs else None)
    return shown


def _format_best(results: SweepResults) -> str:
    """Return a sentence that names the best arm; an empty text if fewer than two arms have scores."""
    found = best(results)
    if found is None or len(results.scored) < 2:
        return ""
    value = f"{format_number(found.value)}{bracketed(found.interval)}"
    chosen = f"chosen as the best of {len(results.scored)}, so its value is an overestimate"
    return f"\nBest by {format_objective(found.objective)}: {found.condition.label}, {value} ({chosen})."


def corpus_table(stats: JsonObject) -> Table:
    """Return the statistics of one shard set as a table for the terminal, with a line for each histogram."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title="training rows", title_justify="left", box=SIMPLE_HEAD, show_header=False, padding=(0, 1, 0, 0))
    for name, value in plain(stats).items():
        shown.add_row(name, value)
    for name, bars in histograms(stats):
        shown.add_row(name, ", ".join(f"{label}: {height:,.0f}" for label, height, _ in bars))
    return shown


def _format_interval(interval: Interval | None, *, missing: str = "–", **options: Any) -> str:
    return missing if interval is None else format_interval(interval.low, interval.high, **options)


def _draw(results: SweepResults) -> dict[str, Figure]:
    """Return the figures by name, without those that would be empty."""
    scored = _reference_first(results.scored)
    drawn: dict[str, Figure] = {}
    if not scored:
        return drawn
    axis = results.axis
    shown = figures.few_of(scored, at_most=MOST_HEATMAPS).values()
    drawn["heatmaps"] = figures.score_heatmaps({item.label: score_grid(item.rows, axis=axis) for item in shown}, axis=axis)
    rows = {condition.label: condition.rows for condition in scored}
    differences = {
        item.label: difference_grid(rows[item.label], rows[item.against_reference.other], axis=axis)
        for item in shown
        if item.against_reference
    }
    if differences:
        drawn["differences"] = figures.difference_heatmaps(differences, axis=axis)
    lines = figures.few_of(scored)
    drawn["profiles"] = figures.profiles(lines, axis=axis)
    recall = {look: (condition.label, _recall(condition)) for look, condition in lines.items()}
    if any(points for _, points in recall.values()):
        drawn["recall"] = figures.recall_by_position(recall)
    axes = cost_axes(results)
    if axes:
        drawn["fronts"] = figures.fronts(axes, scored)
    training = figures.training_curves(dict(enumerate(scored)))
    if training is not None:
        drawn["training"] = training
    return drawn


def _recall(condition: ArmResult) -> dict[float, Estimate]:
    """Return the recall of needles by the middle of each tenth of the prompt; empty if each question has one needle."""
    return {} if all(num_asked(row) < 2 for row in condition.rows) else recall_by_depth(condition.rows)


def _view(results: SweepResults, drawn: Mapping[str, str]) -> JsonObject:
    conditions = _reference_first(results.conditions)
    scored = [condition for condition in conditions if condition.summary]
    ranges = [item.comparison.interval or Interval(item.difference, item.difference, "cells") for item in results.all_contrasts]
    bound = max((max(abs(item.low), abs(item.high)) for item in ranges), default=1.0)
    return {
        "results": results,
        "headline": headline(results),
        "notes": notes(results),
        "noise": format_noise(results),
        "conditions": conditions,
        "scored": scored,
        "bound": max(0.1, bound),
        "bootstrap_units": BOOTSTRAP_UNITS,
        "enough": min_replicates(max(1, len(results.contrasts))),
        "facts": facts(results),
        "describe_score": describe_score(results),
        "axis": results.axis,
        "several": any(num_asked(row) > 1 for condition in scored for row in condition.rows),
        "in_tenths": needs_bins((row for condition in scored for row in condition.rows), axis=results.axis),
        "answers_per_field": answers_per_field(results),
        "figures": {name: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode() for name, svg in drawn.items()},
        "lines": min(figures.MOST_LINES, len(scored)),
        "heatmaps": min(MOST_HEATMAPS, len(scored)),
        "best": best(results),
        "exported": exported(results.folder),
        "objective": objective_of(results),
        "cost_axes": cost_axes(results),
        "shown_arms": SHOWN_ARMS,
        "named_arms": figures.MAX_NAMED_ARMS,
        "rung_histories": rung_histories(results),
        "shown_histories": SHOWN_HISTORIES,
        "rank_correlations": rank_correlations(results),
        "places": middle_and_edges(scored),
        "unscored": unscored(scored),
        "questions": questions(results),
        "corpora": corpora(results),
        "costs": costs(scored),
        "trainings": trainings(scored),
        "versions": _versions(),
        "made": results.description,
        "spec_json": json.dumps(results.description.get("spec", {}), indent=2, ensure_ascii=False),
    }


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in VERSIONED:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _csv_row(condition: ArmResult) -> JsonObject:
    summary = condition.summary
    row: JsonObject = {
        "arm": condition.arm,
        **condition.point,
        "trials_planned": condition.num_planned,
        "trials_finished": len(condition.trials),
        "trials_stopped": condition.num_stopped,
    }
    if summary is not None:
        answers = answer_cost(condition.rows)
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
            "prompt_tokens": answers.prompt_tokens,
            "prefilled_tokens": answers.prefilled_tokens,
            "decoded_tokens": answers.decoded_tokens,
            "answering_seconds": answers.seconds,
            "cost": answers.money,
            "trained_tokens": trained_tokens(condition),
        }
    if condition.against_reference is not None:
        row |= {"compared_to": condition.against_reference.other, **_contrast_columns(condition.against_reference)}
    if condition.against_control is not None:
        control = {f"control_{name}": value for name, value in _contrast_columns(condition.against_control).items()}
        row |= {"control": condition.against_control.other, **control}
    return row


def _contrast_columns(contrast: Contrast) -> JsonObject:
    comparison, effects = contrast.comparison, contrast.comparison.effects
    return {
        "pairs": comparison.num_pairs,
        "difference": comparison.difference,
        **_edges("difference", comparison.interval),
        "p": comparison.p,
        "p_corrected": contrast.corrected_p,
        "detectable": comparison.detectable,
        **_estimated("relative_percent", effects.relative),
        **_estimated("rubric_change_percent", effects.rubric_change),
        **_estimated("score_change_percent", effects.score_change),
        **_estimated("exact_recall_difference", effects.exact_difference),
        **_estimated("middle_gain", effects.middle_gain),
    }


def _estimated(name: str, estimate: Estimate | None) -> JsonObject:
    return {} if estimate is None else {name: estimate.value, **_edges(name, estimate.interval)}


def _edges(name: str, interval: Interval | None) -> JsonObject:
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _reference_first(conditions: Sequence[ArmResult]) -> list[ArmResult]:
    return sorted(conditions, key=lambda condition: not condition.is_reference)
