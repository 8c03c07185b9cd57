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
    found += list(dict.fromkeys(f"{its.name}: {text}." for its in results.all_contrasts for text in its.comparison.warnings))
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
    overlapping = [its.label for its in results.scored if any(trial.manifest.get("evaluation_overlap") for trial in its.trials)]
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
    better = [its for its in contrasts if its.differs and its.difference > 0]
    worse = [its.label for its in contrasts if its.differs and its.difference < 0]
    leader = max(better or contrasts, key=lambda its: its.difference)
    highest = leader.difference == max(its.difference for its in contrasts)
    among = f", {'the best' if highest else 'one'} of {len(contrasts)} arms," if len(contrasts) > 1 else ""
    worse_words = f"{format_list(worse)} scored lower by more than chance would explain." if worse else ""
    measured = _format_contrast(leader)
    if better:
        said = f"{leader.label}{among} scored {leader.difference:.2f} higher than {leader.other} {measured}: more than chance would explain"
        return f"{said}; {worse_words}" if worse else f"{said}."
    if leader.difference <= 0:
        said = (
            f"No arm scored higher than {reference}: the closest, {leader.label}, differs by {format_signed(leader.difference)} {measured}"
        )
    else:
        said = f"No arm is better than {reference} beyond chance: {leader.label}{among} scored {leader.difference:.2f} higher {measured}"
    return f"{said}; {worse_words}" if worse else f"{said}. This sweep shows no difference between the arms."


def _against_control(results: SweepResults) -> str:
    """Return a sentence about the effect of pauses beyond tuning; an empty text without a control."""
    contrasts = {its.label: its for its in results.control_contrasts}
    if not contrasts:
        return ""
    better = [its for its in contrasts.values() if its.differs and its.difference > 0]
    worse = [its.label for its in contrasts.values() if its.differs and its.difference < 0]
    if better:
        leader = max(better, key=lambda its: its.difference)
    else:
        leader = contrasts[max((its for its in results.scored if its.label in contrasts), key=_mean_score).label]
    apart = _apart(results, leader)
    which = "the best pause-tuned arm, " if len(contrasts) > 1 and not better else ""
    end = f"{leader.label}{',' if which else ''} differs by {format_signed(leader.difference)} {_format_contrast(leader)}"
    if better:
        once = leader.comparison.num_replicates == 1
        alone = "by the pauses or by the luck of one training run each" if once else "and so an effect of the pauses"
        end += f": more than chance would explain, {'by the pauses or by that' if apart else alone}"
    elif leader.label not in worse:
        end += ": nothing here is shown to be due to the pauses"
    how = f"which differs in {format_list(apart)} too" if apart else "which was tuned the same way on the same texts without pauses"
    said = f"Against {leader.other}, {how}, {which}{end}"
    return f"{said}; with pauses {format_list(worse)} scored lower by more than chance would explain." if worse else f"{said}."


def _apart(results: SweepResults, contrast: Contrast) -> list[str]:
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
        apart = _apart(results, contrast)
        if apart:
            found.append(f"{contrast.label} and its control {contrast.other} differ in more than pauses: {format_list(apart)}.")
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
        blunt = max((its.comparison.smallest_p for its in contrasts), default=0.0)
        if blunt * len(contrasts) >= SIGNIFICANT:
            text = (
                f"With so few differences p cannot be less than {blunt:.2g}, and {min(1.0, blunt * len(contrasts)):.2g} after "
                "correction: no effect, however large, could be shown. Use more lengths, depths and replicates, or fewer arms."
            )
            found += [text] if text not in found else []
    at_odds = [
        its.name
        for its in results.all_contrasts
        if its.comparison.interval and its.comparison.interval.excludes_zero() != (its.comparison.p < SIGNIFICANT)
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
    every = [(contrasts, its) for contrasts in (results.contrasts, results.control_contrasts) for its in contrasts]
    missed = [its for contrasts, its in every if not its.differs and its.comparison.smallest_p * len(contrasts) < SIGNIFICANT]
    sizes = {its.name: size for its in missed if (size := its.comparison.detectable or 0.0) > abs(its.difference)}
    seen = {name: size for name, size in sizes.items() if size <= 1}
    found = []
    if seen:
        each = format_list([f"{name} {size:.2f}" for name, size in seen.items()])
        told = each if len(seen) <= MOST_NAMED else f"{min(seen.values()):.2f} to {max(seen.values()):.2f}"
        found.append(
            "Where no difference is shown, the smallest true one that this design would have found four times of five: "
            f"{told}. A smaller one may exist."
        )
    if len(seen) < len(sizes):
        names = [name for name in sizes if name not in seen]
        told = format_list(names) if len(names) <= MOST_NAMED else f"{len(names)} comparisons"
        found.append(f"With answers so few or so scattered, even the largest true difference would often be missed: {told}.")
    return found


def _text_notes(results: SweepResults) -> list[str]:
    """Return notes on arms that read more or less text than the arm that they are compared with."""
    shares = {
        its.label: sum(row.content_tokens for row in its.rows) / sum(row.context_tokens for row in its.rows) for its in results.scored
    }
    found = []
    for its in results.all_contrasts:
        more = 100 * (shares[its.label] / shares[its.other] - 1) if shares[its.other] else 0.0
        if abs(more) >= UNEQUAL_TEXT_PERCENT:
            found.append(
                f"{its.label} read {abs(more):.0f} % {'more' if more > 0 else 'less'} text per asked token than {its.other}: "
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
    margins = {its.label: [row.margin for row in its.rows if row.margin is not None] for its in results.scored}
    near = {label: sum(margin < NEAR_TIE_LOGITS for margin in its) for label, its in margins.items()}
    if sum(near.values()) > NEAR_TIE_SHARE * sum(map(len, margins.values())):
        told = format_list([f"{label} {number} of {len(margins[label])}" for label, number in near.items() if margins[label]])
        found.append(
            f"Greedy near-ties: answers in which the two best next tokens were once within {NEAR_TIE_LOGITS} logits, so that other "
            f"hardware or software may give another answer: {told}."
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
    contrasts = [its for its in (condition.against_reference, condition.against_control) if its]
    return any(its.comparison.replicates_agree for its in contrasts) or (summary.interval is not None and summary.interval.unit == "cells")


def _cell_notes(results: SweepResults) -> list[str]:
    """Return notes on cells that are unscored, unpaired, repeated or cut off."""
    found = []
    summaries = [(condition.label, condition.summary) for condition in results.scored if condition.summary]
    unscored = [f"{label} {its.num_unscored} of {its.num_cells}" for label, its in summaries if its.num_unscored]
    if unscored:
        reasons = Counter(row.unscored_reason for condition in results.scored for row in condition.rows if row.score is None)
        why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        found.append(f"Cells that could not be scored are in no mean: {format_list(unscored)}. Reasons: {why}.")
    unpaired = [f"{its.name} {its.comparison.num_unpaired}" for its in results.all_contrasts if its.comparison.num_unpaired]
    if unpaired:
        found.append(f"Cells of the two arms without a scored counterpart are not compared: {format_list(unpaired)}.")
    repeated = [f"{label} {its.num_repeated} of {its.num_scored}" for label, its in summaries if its.num_repeated]
    if repeated:
        found.append(
            "Depths so close that the needle lands at the same sentence make the same prompt, which counts once in means, intervals and "
            f"tests; repeated cells: {format_list(repeated)}."
        )
    mixed = {condition.label: Counter(row.scorer for row in condition.rows) for condition in results.scored}
    mixed = {label: its for label, its in mixed.items() if len(its) > 1}
    if mixed:
        told = "; ".join(
            f"{label} {', '.join(f'{number} {scorer}' for scorer, number in its.most_common())}" for label, its in mixed.items()
        )
        found.append(f"Means mix scores of different scorers: {told}. Rescore the ledgers with one of them.")
    return found + _cut_off_notes([(condition.label, condition.trials) for condition in results.scored])


def _cut_off_notes(conditions: Sequence[tuple[str, Sequence[TrialResult]]]) -> list[str]:
    counts = [(label, sum(its.num_cut_off for its in trials), sum(len(its.rows) for its in trials)) for label, trials in conditions]
    if len({cut_off / cells for _, cut_off, cells in counts if cells}) < 2:
        return []
    told = format_list([f"{label} {cut_off} of {cells}" for label, cut_off, cells in counts])
    return [f"Arms differ in how many answers reached max_new_tokens without an end, which can lose or gain keywords: {told}."]


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
