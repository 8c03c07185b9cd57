"""What the sections of a report show, as plain data: no markup, no drawing, no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pause_ray.compare import compare_arms, is_middle, summarize
from pause_ray.needle.ledger import CellResult
from pause_ray.places import by_fact
from pause_ray.ranking import RungHistory
from pause_ray.results import Condition, SweepResults, spent
from pause_ray.spec import JsonObject
from pause_ray.words import title, value_range

SHOWN_QUESTIONS = 3
SHOWN_ANSWER_CHARS = 280
SHOWN_REASONS = 12
SCORERS = {
    "keywords": "share of the facts’ keywords that the answer contains",
    "all": "1 if the answer contains all keywords, else 0",
    "exact": "1 if the answer is the references and nothing else, else 0",
    "string_match": "share of the references that occur in the answer (RULER’s string match)",
    "label": "1 if the answer names the right label and no other (BABILong’s rule), else 0",
    "furthest": "how far along the chain the answer got, 0 to 1",
}


def facts(results: SweepResults) -> list[tuple[str, str]]:
    """What was asked of whom: name and value."""
    rows = [row for condition in results.scored for row in condition.rows]
    if not rows:
        return [("Trials", results.progress)]
    lengths = sorted({row.context_tokens for row in rows})
    asked = sorted({num_asked(row) for row in rows if row.facts})
    several = [("Facts per question", value_range([str(number) for number in asked], "").strip())] if asked not in ([], [1]) else []
    precisions = sorted({_precision(trial.spec) for trial in results.trials} - {""})
    return [
        ("Trials", results.progress),
        ("Model", ", ".join(sorted({row.model for row in rows}))),
        *([("Precision", ", ".join(precisions))] if precisions else []),
        ("Engine", ", ".join(sorted({row.engine for row in rows}))),
        ("Task", ", ".join(sorted({row.task for row in rows}))),
        *several,
        ("Context", value_range([f"{length:,}" for length in lengths], "tokens")),
        ("Needle positions", _positions(results, rows)),
        ("Cells answered", f"{len(rows):,}"),
        ("Replicates", str(len({row.replicate for row in rows}))),
        ("Scorer", ", ".join(sorted({row.scorer for row in rows}))),
    ]


def num_asked(row: CellResult) -> int:
    """How many of its hidden facts a question asks for."""
    return sum(bool(fact.references) for fact in row.facts)


def score_words(results: SweepResults) -> str:
    """What the score of these answers means."""
    scorers = sorted({row.scorer for condition in results.scored for row in condition.rows})
    return "; ".join(SCORERS.get(scorer, f"as graded by {scorer}, 0 to 1") for scorer in scorers)


def middle_and_edges(conditions: Sequence[Condition]) -> list[JsonObject]:
    """Per condition that was asked in both: its summaries there, its differences to the reference there, and how these differ."""
    found = []
    parts = {condition.label: _by_place(condition.rows) for condition in conditions}
    for condition in conditions:
        middle, edges = parts[condition.label]
        against = parts.get(condition.compared_to or "")
        if middle and edges:
            found.append(
                {
                    "condition": condition,
                    "middle": summarize(middle),
                    "edges": summarize(edges),
                    "middle_comparison": compare_arms(middle, against[0]) if against else None,
                    "edges_comparison": compare_arms(edges, against[1]) if against else None,
                    "gain": condition.comparison.effects.middle_gain if condition.comparison else None,
                }
            )
    return found


def _by_place(rows: Sequence[CellResult]) -> tuple[list[CellResult], list[CellResult]]:
    """Those whose first fact is in the middle of the context, and the others."""
    middle = [row for row in rows if is_middle(row.depth_percent)]
    return middle, [row for row in rows if not is_middle(row.depth_percent)]


def proxy_cost(histories: Sequence[RungHistory]) -> JsonObject:
    """What all rungs together took: ``cells``, ``prefilled_tokens`` and ``seconds``."""
    rungs = [rung for history in histories for rung in history.rungs]
    return {
        "cells": sum(rung.num_cells for rung in rungs),
        "prefilled_tokens": sum(rung.prefilled_tokens for rung in rungs),
        "seconds": sum(rung.seconds for rung in rungs),
    }


def unscored(conditions: Sequence[Condition]) -> list[JsonObject]:
    """Reasons why cells have no score, most frequent first, and how many of each condition's cells have it."""
    counts = {condition.label: Counter(row.unscored_reason for row in condition.rows if row.score is None) for condition in conditions}
    reasons = sum(counts.values(), Counter())
    return [
        {"reason": reason, "total": total, "by_condition": {label: its[reason] for label, its in counts.items() if its[reason]}}
        for reason, total in reasons.most_common(SHOWN_REASONS)
    ]


def costs(conditions: Sequence[Condition]) -> list[JsonObject]:
    """What each condition's training and answers took."""
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
                "answers": spent(condition.rows),
                "currency": ", ".join(sorted({trial.currency for trial in condition.trials} - {""})),
            }
        )
    return found


def trainings(conditions: Sequence[Condition]) -> list[JsonObject]:
    """How fast and within which memory each condition was trained; empty where logs do not say."""
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
    """The cells on which the conditions' scores lie furthest apart, each with every condition's answer."""
    by_place: dict[tuple[Any, ...], list[tuple[Condition, CellResult]]] = {}
    for condition in results.scored:
        for row in condition.rows:
            place = (row.replicate, row.task, row.context_tokens, row.depth_percent, row.sample)
            by_place.setdefault(place, []).append((condition, row))

    def spread(answers: Sequence[tuple[Condition, CellResult]]) -> float:
        scores = [row.score for _, row in answers if row.score is not None]
        return max(scores) - min(scores) if scores else 0.0

    chosen = sorted(by_place.items(), key=lambda item: (-spread(item[1]), item[0]))[:SHOWN_QUESTIONS]
    return [
        {"row": answers[0][1], "answers": [(condition.label, row, _shortened(row.response)) for condition, row in answers]}
        for _, answers in sorted(chosen)
    ]


def corpora(results: SweepResults) -> list[JsonObject]:
    """Each shard set once: which conditions it trained, plain statistics, histograms."""
    found: dict[str, JsonObject] = {}
    for condition in results.scored:
        for trial in condition.trials:
            if trial.corpus_stats:
                name, stats = str(trial.manifest.get("shards")), trial.corpus_stats
                corpus = found.setdefault(name, {"name": name, "used_by": {}, "stats": plain(stats), "histograms": histograms(stats)})
                corpus["used_by"][condition.label] = None
    return list(found.values())


def plain(stats: JsonObject) -> dict[str, str]:
    """Those of a corpus's statistics that are one value each, for people."""
    return {title(name): _value(value) for name, value in stats.items() if not isinstance(value, dict | list)}


def histograms(stats: JsonObject) -> list[tuple[str, list[tuple[str, float, float]]]]:
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


def answers_per_field(results: SweepResults) -> int:
    """The most questions that one cell of a heatmap stands for."""
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
        return value_range([f"{depth:g}" for depth in sorted({row.depth_percent for row in rows})], "%")
    if results.axis.kind == "lattice":
        return f"every {results.axis.lattice_tokens:,} tokens, and the end"
    if not all(trial.suite.get("samples") for trial in results.trials):
        return "of several grids, shown in tenths of the prompt"
    return f"random, {1 + max(row.sample for row in rows)} per length"


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
