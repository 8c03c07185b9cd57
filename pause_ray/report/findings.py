"""Texts about the results of a sweep: the headline, the notes that limit what the numbers show, and the lines of the short table of arms.

A sentence calls a difference one only if its interval excludes zero and its corrected p is small, and never calls a difference to an
untuned reference an effect of pauses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pause_ray.core.format import format_interval, format_list, format_number, format_p_value, format_percent, format_signed
from pause_ray.evaluation.statistics import SIGNIFICANT, Interval, min_replicates, wilson
from pause_ray.report.results import ArmResult, Contrast, SweepResults, TrialResult

NEAR_TIE_LOGITS = 0.05
"""Logits of two tokens that are this close may swap their order on other hardware; in bfloat16 one step of a logit near 10 is 0.06."""
NEAR_TIE_SHARE = 0.02
"""Share of answers with near-ties above which a note reports them."""
UNEQUAL_TEXT_PERCENT = 1.0
MOST_NAMED = 6
"""Largest number of comparisons that a note lists one by one."""


def headline(results: SweepResults) -> str:
    """Return a sentence with the main result, and a second one about the effect of the pauses if the sweep has a control."""
    if not results.scored:
        return "No trial has finished yet, so there is no result."
    if not results.contrasts:
        best = max(results.scored, key=_mean_score)
        return f"{best.label} has a mean score of {_mean_score(best):.2f}; there is nothing yet to compare it with."
    return " ".join(filter(None, [_against_reference(results), _against_control(results)]))


def notes(results: SweepResults) -> list[str]:
    """Return sentences that limit what the numbers show, most important first."""
    found: list[str] = []
    if not results.is_finished:
        waiting = [condition.label for condition in results.conditions if condition.num_missing]
        found.append(f"Unfinished: {results.progress}. Missing in whole or in part: {format_list(waiting)}.")
    if results.num_stopped:
        found.append(
            f"{results.num_stopped} of {results.num_planned} trials were stopped early by proxy scores, or not started because their point "
            "was stopped: they have no score on the full grid, and the arms that continued were chosen by one replicate."
        )
    found += list(dict.fromkeys(f"{item.name}: {text}." for item in results.all_contrasts for text in item.comparison.warnings))
    found += _confounding_notes(results)
    found += _replicate_notes(results)
    if len(results.contrasts) > 1:
        found.append(
            f"{len(results.contrasts)} arms are compared with {results.reference_arm}. The highest of many scores overestimates the arm: "
            "use the corrected p, and test the winner again on new replicates."
        )
    found += _power_notes(results)
    found += _detectable_notes(results)
    found += _text_notes(results)
    found += _cell_notes(results)
    found += _precision_notes(results)
    if any(condition.is_reference for condition in results.scored):
        alone = [condition.label for condition in results.scored if not condition.is_reference and condition.comparison is None]
        if alone:
            found.append(f"Not compared, because {results.reference_arm} has no single counterpart: {format_list(alone)}.")
    overlapping = [item.label for item in results.scored if any(trial.manifest.get("evaluation_overlap") for trial in item.trials)]
    if overlapping:
        found.append(
            f"The training text overlaps with the evaluation, as the spec permits, so this is not a fair test: {format_list(overlapping)}."
        )
    return found


def format_noise(results: SweepResults) -> list[str]:
    """Return how often other batch shapes alone changed an answer, for each precision in which that was measured."""
    measured: dict[str, Counter[str]] = {}
    for trial in results.trials:
        if noise := trial.noise:
            measured.setdefault(noise["dtype"], Counter()).update({name: value for name, value in noise.items() if name != "dtype"})
    return [
        f"In {dtype}, {total['cells']} answered questions were asked again in other batch shapes, with everything else equal: "
        f"{_format_share(total['answers_changed'], total['cells'])} of the answers changed, and "
        f"{_format_share(total['scores_changed'], total['cells'])} of the scores. "
        "Between arms, single cells may differ that often by rounding alone."
        for dtype, total in sorted(measured.items())
    ]


ARM_COLUMNS = ("arm", "score [95 %]", "difference [95 %]", "p corr.", "exact", "n/s")


def arm_cells(condition: ArmResult) -> list[str]:
    """Return a condition's line of the short table of arms, under ``ARM_COLUMNS``; ``n/s`` counts unscored cells."""
    summary, contrast, missing = condition.summary, condition.against_reference, condition.num_missing
    if summary is None:
        return [condition.label, "not finished" if missing else "stopped early", "", "", "", ""]
    return [
        condition.label + (f" ({missing} of {condition.num_planned} to come)" if missing else ""),
        f"{format_number(summary.grand_mean)}{bracketed(summary.interval)}",
        *(contrast_cells(contrast) if contrast else ["reference" if condition.is_reference else "", ""]),
        format_percent(summary.exact_recall),
        str(summary.num_unscored),
    ]


def control_cells(contrast: Contrast) -> list[str]:
    """Return the line of the short table of arms that compares a condition with its control."""
    return [f"{contrast.label} vs {contrast.other}", "", *contrast_cells(contrast), "", ""]


def contrast_cells(contrast: Contrast) -> list[str]:
    """Return a difference with its interval, and the corrected p."""
    return [
        f"{format_signed(contrast.difference)}{bracketed(contrast.comparison.interval, signs=True)}",
        format_p_value(contrast.corrected_p),
    ]


def bracketed(interval: Interval | None, *, signs: bool = False) -> str:
    """Return an interval as a text such as `` [0.44, 0.89]``."""
    return "" if interval is None else f" [{format_interval(interval.low, interval.high, signs=signs).replace(' to ', ', ')}]"


def _against_reference(results: SweepResults) -> str:
    contrasts, reference = results.contrasts, results.reference_arm
    better = [item for item in contrasts if item.differs and item.difference > 0]
    worse = [item.label for item in contrasts if item.differs and item.difference < 0]
    leader = max(better or contrasts, key=lambda item: item.difference)
    highest = leader.difference == max(item.difference for item in contrasts)
    among = f", {'the best' if highest else 'one'} of {len(contrasts)} arms," if len(contrasts) > 1 else ""
    worse_words = f"{format_list(worse)} scored lower by more than chance would explain." if worse else ""
    measured = _format_contrast(leader)
    if better:
        text = f"{leader.label}{among} scored {leader.difference:.2f} higher than {leader.other} {measured}: more than chance would explain"
        return f"{text}; {worse_words}" if worse else f"{text}."
    if leader.difference <= 0:
        text = (
            f"No arm scored higher than {reference}: the closest, {leader.label}, differs by {format_signed(leader.difference)} {measured}"
        )
    else:
        text = f"No arm is better than {reference} beyond chance: {leader.label}{among} scored {leader.difference:.2f} higher {measured}"
    return f"{text}; {worse_words}" if worse else f"{text}. This sweep shows no difference between the arms."


def _against_control(results: SweepResults) -> str:
    """Return a sentence about the effect of pauses beyond tuning; an empty text without a control."""
    contrasts = {item.label: item for item in results.control_contrasts}
    if not contrasts:
        return ""
    better = [item for item in contrasts.values() if item.differs and item.difference > 0]
    worse = [item.label for item in contrasts.values() if item.differs and item.difference < 0]
    if better:
        leader = max(better, key=lambda item: item.difference)
    else:
        leader = contrasts[max((item for item in results.scored if item.label in contrasts), key=_mean_score).label]
    others = _other_differences(results, leader)
    which = "the best pause-tuned arm, " if len(contrasts) > 1 and not better else ""
    end = f"{leader.label}{',' if which else ''} differs by {format_signed(leader.difference)} {_format_contrast(leader)}"
    if better:
        once = leader.comparison.num_replicates == 1
        alone = "by the pauses or by the luck of one training run each" if once else "and so an effect of the pauses"
        end += f": more than chance would explain, {'by the pauses or by that' if others else alone}"
    elif leader.label not in worse:
        end += ": nothing here is shown to be due to the pauses"
    how = f"which differs in {format_list(others)} too" if others else "which was tuned the same way on the same texts without pauses"
    text = f"Against {leader.other}, {how}, {which}{end}"
    return f"{text}; with pauses {format_list(worse)} scored lower by more than chance would explain." if worse else f"{text}."


def _other_differences(results: SweepResults, contrast: Contrast) -> list[str]:
    """Return the parts of the spec, besides the pauses, in which a pause-tuned condition and its control differ."""
    trials = {condition.label: condition.trials for condition in results.conditions}
    a, b = trials[contrast.label][0].spec, trials[contrast.other][0].spec
    return [name for name in ("model", "train", "corpus", "adapter", "eval") if a.get(name) != b.get(name)]


def _confounding_notes(results: SweepResults) -> list[str]:
    """Return notes on differences that may come from pauses or from tuning."""
    found = []
    references = {condition.label: condition for condition in results.conditions if condition.is_reference}
    mixed = [
        condition.label
        for condition in results.scored
        if condition.is_pause_tuned
        and condition.against_reference is not None
        and condition.against_control is None
        and not any(trial.is_trained for trial in references[condition.against_reference.other].trials)
    ]
    if mixed:
        plain = [
            condition.arm for condition in results.scored if any(trial.is_trained and not trial.has_pauses for trial in condition.trials)
        ]
        remedy = f"set control: {plain[0]}" if plain else "add an arm with pauses: null that is tuned the same way, and name it as control"
        if results.control_arm is not None:
            remedy = f"{results.control_arm} must have finished trials, and one counterpart for each of them"
        found.append(
            f"Tuning and pauses are confounded: {format_list(mixed)} had both and {results.reference_arm} had neither, so a difference "
            f"between them may come from tuning alone. To tell them apart, {remedy}."
        )
    for contrast in results.control_contrasts:
        others = _other_differences(results, contrast)
        if others:
            found.append(f"{contrast.label} and its control {contrast.other} differ in more than pauses: {format_list(others)}.")
    return found


def _replicate_notes(results: SweepResults) -> list[str]:
    replicates = max((condition.summary.num_replicates for condition in results.scored if condition.summary), default=0)
    arms = max(len(results.contrasts), len(results.control_contrasts), 1)
    enough = min_replicates(arms)
    if replicates == 1:
        return [
            "One replicate: one wording of the fact and one order of the haystack. Intervals and p values speak of other cells of "
            f"this haystack, not of other texts, wordings or training seeds; for that, set replicates to {enough} or more."
        ]
    if 1 < replicates < enough:
        against = f"{arms} compared arms" if arms > 1 else "one compared arm"
        return [
            f"{replicates} replicates: intervals are Student's t over the replicates' means{', and wide' if replicates < 4 else ''}. "
            "p values flip the signs of cells averaged over the replicates, and so speak of other cells, not of other texts: "
            f"flipping {replicates} replicates could not give less than {2.0 ** (1 - replicates):.2g}. With {against} "
            f"that takes {enough} replicates."
        ]
    return []


def _power_notes(results: SweepResults) -> list[str]:
    """Return notes on tests that cannot become significant, and on intervals and p values that disagree."""
    found = []
    for contrasts in (results.contrasts, results.control_contrasts):
        blunt = max((item.comparison.smallest_p for item in contrasts), default=0.0)
        if blunt * len(contrasts) >= SIGNIFICANT:
            text = (
                f"With so few differences p cannot be less than {blunt:.2g}, and {min(1.0, blunt * len(contrasts)):.2g} after "
                "correction: no effect, however large, could be shown. Use more lengths, depths and replicates, or fewer arms."
            )
            found += [text] if text not in found else []
    at_odds = [
        item.name
        for item in results.all_contrasts
        if item.comparison.interval and item.comparison.interval.excludes_zero() != (item.comparison.p < SIGNIFICANT)
    ]
    if at_odds:
        found.append(
            f"Interval and p disagree on whether there is a difference: {format_list(at_odds)}. "
            "An arm counts as different only if both agree."
        )
    flat = [condition.label for condition in results.scored if _is_flat(condition)]
    if flat:
        found.append(
            f"All replicates have the same mean or the same difference, so their spread gives no interval: {format_list(flat)}. "
            "The interval is over cells instead, and does not cover other texts."
        )
    return found


def _detectable_notes(results: SweepResults) -> list[str]:
    """Return the smallest detectable difference of each comparison that shows none although its sign-flip test could."""
    every = [(contrasts, item) for contrasts in (results.contrasts, results.control_contrasts) for item in contrasts]
    missed = [item for contrasts, item in every if not item.differs and item.comparison.smallest_p * len(contrasts) < SIGNIFICANT]
    sizes = {item.name: size for item in missed if (size := item.comparison.detectable or 0.0) > abs(item.difference)}
    seen = {name: size for name, size in sizes.items() if size <= 1}
    found = []
    if seen:
        each = format_list([f"{name} {size:.2f}" for name, size in seen.items()])
        listed = each if len(seen) <= MOST_NAMED else f"{min(seen.values()):.2f} to {max(seen.values()):.2f}"
        found.append(
            "Where no difference is shown, the smallest true one that this design would have found four times of five: "
            f"{listed}. A smaller one may exist."
        )
    if len(seen) < len(sizes):
        names = [name for name in sizes if name not in seen]
        listed = format_list(names) if len(names) <= MOST_NAMED else f"{len(names)} comparisons"
        found.append(f"With answers so few or so scattered, even the largest true difference would often be missed: {listed}.")
    return found


def _text_notes(results: SweepResults) -> list[str]:
    """Return notes on arms that read more or less text than the arm that they are compared with."""
    shares = {
        item.label: sum(row.content_tokens for row in item.rows) / sum(row.context_tokens for row in item.rows) for item in results.scored
    }
    found = []
    for item in results.all_contrasts:
        more = 100 * (shares[item.label] / shares[item.other] - 1) if shares[item.other] else 0.0
        if abs(more) >= UNEQUAL_TEXT_PERCENT:
            found.append(
                f"{item.label} read {abs(more):.0f} % {'more' if more > 0 else 'less'} text per asked token than {item.other}: "
                "their difference includes an effect of context length."
            )
    return found


def _precision_notes(results: SweepResults) -> list[str]:
    """Return notes on answers that rounding may have changed."""
    found = []
    unmeasured = [
        condition.label for condition in results.scored if any(_is_coarse(trial) and trial.noise is None for trial in condition.trials)
    ]
    if unmeasured:
        found.append(
            "Scored below float32, and how often that alone changes an answer was not measured (engine.numerics_check_cells): "
            f"{format_list(unmeasured)}."
        )
    margins = {item.label: [row.margin for row in item.rows if row.margin is not None] for item in results.scored}
    near = {label: sum(margin < NEAR_TIE_LOGITS for margin in item) for label, item in margins.items()}
    if sum(near.values()) > NEAR_TIE_SHARE * sum(map(len, margins.values())):
        listed = format_list([f"{label} {number} of {len(margins[label])}" for label, number in near.items() if margins[label]])
        found.append(
            f"Greedy near-ties: answers in which the two best next tokens were once within {NEAR_TIE_LOGITS} logits, so that other "
            f"hardware or software may give another answer: {listed}."
        )
    return found


def _is_coarse(trial: TrialResult) -> bool:
    """Return whether transformers answered in a precision in which batch shapes matter."""
    model, engine = trial.spec.get("model") or {}, trial.spec.get("engine") or {}
    return engine.get("kind") == "hf" and (model.get("dtype") != "float32" or model.get("quantize") is not None)


def _format_share(part: int, total: int) -> str:
    """Return a text such as ``1 of 12 (8 %, 95 % interval 1 to 35 %)``."""
    interval = wilson(part, total)
    return f"{part} of {total} ({100 * part / total:.0f} %, 95 % interval {100 * interval.low:.0f} to {100 * interval.high:.0f} %)"


def _is_flat(condition: ArmResult) -> bool:
    summary = condition.summary
    if summary is None or summary.num_replicates == 1:
        return False
    contrasts = [item for item in (condition.against_reference, condition.against_control) if item]
    return any(item.comparison.replicates_agree for item in contrasts) or (
        summary.interval is not None and summary.interval.unit == "cells"
    )


def _cell_notes(results: SweepResults) -> list[str]:
    """Return notes on cells that are unscored, unpaired, repeated or cut off."""
    found = []
    summaries = [(condition.label, condition.summary) for condition in results.scored if condition.summary]
    unscored = [f"{label} {item.num_unscored} of {item.num_cells}" for label, item in summaries if item.num_unscored]
    if unscored:
        reasons = Counter(row.unscored_reason for condition in results.scored for row in condition.rows if row.score is None)
        why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        found.append(f"Cells that could not be scored are in no mean: {format_list(unscored)}. Reasons: {why}.")
    unpaired = [f"{item.name} {item.comparison.num_unpaired}" for item in results.all_contrasts if item.comparison.num_unpaired]
    if unpaired:
        found.append(f"Cells of the two arms without a scored counterpart are not compared: {format_list(unpaired)}.")
    repeated = [f"{label} {item.num_repeated} of {item.num_scored}" for label, item in summaries if item.num_repeated]
    if repeated:
        found.append(
            "Depths so close that the needle lands at the same sentence make the same prompt, which counts once in means, intervals and "
            f"tests; repeated cells: {format_list(repeated)}."
        )
    mixed = {condition.label: Counter(row.scorer for row in condition.rows) for condition in results.scored}
    mixed = {label: item for label, item in mixed.items() if len(item) > 1}
    if mixed:
        listed = "; ".join(
            f"{label} {', '.join(f'{number} {scorer}' for scorer, number in item.most_common())}" for label, item in mixed.items()
        )
        found.append(f"Means mix scores of different scorers: {listed}. Rescore the ledgers with one of them.")
    return found + _cut_off_notes([(condition.label, condition.trials) for condition in results.scored])


def _cut_off_notes(conditions: Sequence[tuple[str, Sequence[TrialResult]]]) -> list[str]:
    counts = [(label, sum(item.num_cut_off for item in trials), sum(len(item.rows) for item in trials)) for label, trials in conditions]
    if len({cut_off / cells for _, cut_off, cells in counts if cells}) < 2:
        return []
    listed = format_list([f"{label} {cut_off} of {cells}" for label, cut_off, cells in counts])
    return [f"Arms differ in how many answers reached max_new_tokens without an end, which can lose or gain keywords: {listed}."]


def _format_contrast(contrast: Contrast) -> str:
    """Return a text such as ``on the same 9 questions (95 % interval -0.10 to +0.30, p = 0.25, corrected 1.00)``."""
    comparison = contrast.comparison
    interval = comparison.interval
    details = [f"95 % interval {format_interval(interval.low, interval.high, signs=True)}"] if interval else []
    details.append(f"p {format_p_value(comparison.p)}" if comparison.p < 0.001 else f"p = {format_p_value(comparison.p)}")
    if contrast.corrected_p != comparison.p:
        details.append(f"corrected {format_p_value(contrast.corrected_p)}")
    where = ", on this haystack and wording" if comparison.num_replicates == 1 else ""
    return f"on the same {comparison.num_pairs} questions{where} ({', '.join(details)})"


def _mean_score(condition: ArmResult) -> float:
    summary = condition.summary
    return -1.0 if summary is None or summary.grand_mean is None else summary.grand_mean
