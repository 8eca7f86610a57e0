"""Say what looks wrong with the labels of a dataset, and which flag changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tgol_trainer import thresholds

from .labeler import Labeler
from .report import GroupReport, LabelReport, summarize_groups, tie_breaker

# Where advice starts. Standardised normal scores with the paper's c = 5 have a mean weight of 5, and their largest 1 %
# carry 2.8 % of it.
_SMALL_MEAN_WEIGHT, _LARGE_MEAN_WEIGHT, _TOP_SHARE = 1.2, 12.0, 0.1
_FLIP_SHARE, _TIE_SHARE, _MINORITY, _BETWEEN_SHARE, _ONE_SIDED_EXCESS = 0.1, 0.1, 0.2, 0.5, 0.2
_COMPARED, _ALONE = 4, 1.5  # images a prompt, on average


@dataclasses.dataclass(frozen=True)
class Advice:
    """
    One thing worth knowing before training.

    Args:
        topic (`str`): A word for scripts; docs/labelling.md lists them.
        text (`str`): What was found and what it does.
        flag (`str`): What mends it: a flag of `tgol train`, or what to change in the data.
    """

    topic: str
    text: str
    flag: str


def advise(report: LabelReport, *, can_compare: bool = False) -> list[Advice]:
    """
    Return what looks wrong with the labels and weights, most serious first, then what the data would allow.

    Args:
        report ([`LabelReport`]): The dry run.
        can_compare (`bool`, *optional*, defaults to `False`):
            Whether the settings do not compare the images of a prompt, and could.
    """
    labeler = report.labeler
    found = [*_of_sides(labeler, report.tie_breaker, report.scores.max), *_of_weights(labeler)]
    found += _of_uncertainty(report)
    for part in (report.prompts, report.groups):
        found += _of_groups(part, labeler.rows is not None) if part is not None else []
    found += _of_recipe(report) if can_compare else []
    return _fitting_flags(found, labeler)


def advise_training(
    labeler: Labeler, scores: np.ndarray, prompts: Sequence[str], prompt_column: str = "prompt"
) -> list[Advice]:
    """
    Return what looks wrong with the labels of a training run, as [`advise`] does for a dry run.

    A threshold that was moved is left out, because [`fit_labels`] has logged it.

    Args:
        labeler ([`Labeler`]): Fitted to the training rows.
        scores (`numpy.ndarray`): (N,) or (N, K) raw scores of these rows.
        prompts (`Sequence[str]`): N prompts of these rows.
        prompt_column (`str`, *optional*, defaults to `"prompt"`): Their column.
    """
    scores = labeler.normalized(scores)
    ordered = np.sort(scores)
    numbers, names = thresholds.group_ids(prompts)
    tau = labeler.threshold.value if labeler.rows is None else labeler.rows
    groups = summarize_groups(
        *(prompt_column, scores, tau, numbers, labeler.normalization),
        names.__getitem__,
    )
    sides = _of_sides(labeler, tie_breaker(labeler, ordered), float(ordered[-1]))
    found = [*(item for item in sides if item.topic != "moved"), *_of_weights(labeler)]
    return _fitting_flags([*found, *_of_groups(groups, labeler.rows is not None)], labeler)


def _fitting_flags(found: list[Advice], labeler: Labeler) -> list[Advice]:
    combination = labeler.combination
    return [_without_threshold(item) for item in found] if combination and combination.method == "min" else found


def _without_threshold(item: Advice) -> Advice:
    """Where every column has its own threshold, flags that set another one are refused."""
    flags = {
        "ties": "a higher --threshold_percentile makes them negative",
        "imbalance": "--threshold_percentile, fewer columns, or --score_combination sum",
    }
    if "--threshold_strategy" in item.flag:
        return dataclasses.replace(item, flag=f"{item.flag}, with --score_combination sum")
    return dataclasses.replace(item, flag=flags.get(item.topic, item.flag))


def _of_sides(labeler: Labeler, breaker: float | None, largest: float) -> list[Advice]:
    threshold, found = labeler.threshold, []
    share = threshold.num_positive / threshold.num_scores
    if threshold.moved_from is not None:
        found.append(
            Advice(
                "moved",
                f"The {threshold.percentile:g}th percentile is the smallest score, which would make every row "
                f"positive, so τ was moved halfway to the next score: {share:.1%} are positive.",
                "nothing, if that is what you want; else --threshold, or --threshold_percentile "
                f"{100 - 50 * share:.3g} for the better half of those",
            )
        )
    ties = threshold.num_ties / threshold.num_scores
    if ties > _TIE_SHARE and labeler.rows is None:
        below = f"{share - ties:.1%} would be positive"
        flag = f"--threshold {breaker:.6g} makes them negative: {below}" if breaker else ""
        found.append(
            Advice(
                "ties",
                f"Rows that have the threshold's score: {threshold.num_ties:,} ({ties:.1%}); all are positive.",
                flag or f"a lower `--threshold`; no score is above {largest:g}",
            )
        )
    if not _MINORITY <= share <= 1 - _MINORITY:
        side = "positive" if share < 0.5 else "negative"
        found.append(
            Advice(
                "imbalance",
                f"Only {min(share, 1 - share):.1%} of the rows are {side}; most updates push one way.",
                "--threshold_percentile or --threshold to move τ"
                if threshold.source != "proxy"
                else "a proxy set made with the same prompts and reward, or no --proxy_dataset_name",
            )
        )
    return found


def _of_weights(labeler: Labeler) -> list[Advice]:
    weights, weighting = labeler.weights, labeler.weighting
    if weights is None or weighting.form == "none" or (weighting.form != "abs" and weighting.scale == 0):
        return []
    c = weighting.scale
    plain = weighting.form == "linear" and weighting.divisor == weighting.desirable == weighting.undesirable == 1
    normalized = labeler.normalization.method != "none" or labeler.combination is not None
    found = []
    if plain and weights.mean > _LARGE_MEAN_WEIGHT:
        suited = c * 4 / (weights.mean - 1)  # a mean weight of 5
        found.append(
            Advice(
                "scale too wide",
                f"Scores are spread too wide for c = {c:g}: weights are {weights.mean:.3g} on average and reach "
                f"{weights.max:.3g}, and the loss and its gradients grow with them.",
                f"--confidence_scale {suited:.2g}"
                if normalized
                else f"--score_normalization zscore, or --confidence_scale {suited:.2g}",
            )
        )
    elif plain and weights.mean < _SMALL_MEAN_WEIGHT:
        suited = c * 4 / max(weights.mean - 1, 1e-12)
        found.append(
            Advice(
                "scale too narrow",
                f"Scores are spread too narrowly for c = {c:g}: weights lie between 1 and {weights.max:.3g}, so that "
                "how far a score is from τ hardly counts (so it is in the paper for HPS scores).",
                f"--confidence_scale {suited:.2g}"
                if normalized
                else f"--score_normalization zscore, or --confidence_scale {suited:.2g}",
            )
        )
    if weights.top_1_percent_share > _TOP_SHARE and labeler.threshold.num_scores >= 100:
        found.append(
            Advice(
                "heavy rows",
                f"The heaviest 1 % of the rows carry {weights.top_1_percent_share:.0%} of the weight: a few outliers "
                "lead the training. Look at the rows with the lowest and highest scores.",
                "remove wrong scores"
                if weighting.form == "abs"
                else "remove wrong scores, or a smaller --confidence_scale",
            )
        )
    return found


def _of_uncertainty(report: LabelReport) -> list[Advice]:
    total = report.labeler.threshold.num_scores
    unsure = report.uncertainty
    flips = unsure.num_flips / total if unsure else 0.0
    if unsure is None or unsure.of == "running" or flips <= _FLIP_SHARE:
        return []
    if unsure.of == "groups":
        return [
            Advice(
                "uncertain threshold",
                f"Groups are small for thresholds of their own: within their intervals {flips:.1%} of the labels "
                "change.",
                "more images each, or --threshold_strategy global",
            )
        ]
    return [
        Advice(
            "uncertain threshold",
            f"{total:,} rows are few for this threshold: within its 95% interval {flips:.1%} of the labels change.",
            "more rows, --proxy_dataset_name with a larger scored set, or --threshold from elsewhere",
        )
    ]


def _of_groups(part: GroupReport, own: bool) -> list[Advice]:
    found = []
    what = f"values of {part.column!r}"
    if part.num_groups == 1:
        return [
            Advice(
                "one group",
                f"All rows share one value of {part.column!r}: what is learned may not hold for others.",
                "rows with more variety, unless that one is what the model is for",
            )
        ]
    if not own and part.between_share is not None and part.between_share > _BETWEEN_SHARE:
        found.append(
            Advice(
                "variance between groups",
                f"{part.between_share:.0%} of the variance of the scores lies between {what}, so one threshold mostly "
                "separates those and not better from worse images.",
                _group_remedy(part),
            )
        )
    excess = part.one_sided_share - part.one_sided_by_chance
    if part.num_several and excess > _ONE_SIDED_EXCESS:
        found.append(
            Advice(
                "one-sided groups",
                f"Of {part.num_several:,} {what} with several rows, {part.num_positive_only:,} have positive labels "
                f"alone and {part.num_negative_only:,} negative alone ({part.one_sided_share:.0%}; by chance "
                f"{part.one_sided_by_chance:.0%}): nothing contrasts within them.",
                "more images each" if own else _group_remedy(part, "more images each, or "),
            )
        )
    return found


def _of_recipe(report: LabelReport) -> list[Advice]:
    """The recipe, for the numbers of images a prompt that the benchmark has."""
    images = report.labeler.threshold.num_scores / report.prompts.num_groups
    if report.prompts.num_groups == 1:
        return []
    if images >= _COMPARED and _is_divided(report.prompts):
        why = "Each prompt can have a threshold of its own, which cancels what is common to its images."
    elif images <= _ALONE:
        why = "On a small model a loss that counts how far a score is from its threshold gained more than the default."
    else:
        return []
    return [Advice("recipe", f"Images a prompt: {images:,.1f}. {why}", "--recipe anchored")]


def _group_remedy(part: GroupReport, data: str = "") -> str:
    """Thresholds of groups, where scores differ inside most of them; else images, since those would divide nothing."""
    if _is_divided(part):
        return f"{data}--threshold_strategy group --group_column {part.column}"
    return (
        f"images of other quality, or scores that tell them apart: within {part.num_several - part.num_differing:,} "
        f"of these {part.num_several:,} values of {part.column!r} all scores are equal, and no threshold divides them"
    )


def _is_divided(part: GroupReport) -> bool:
    return 2 * part.num_differing >= part.num_several
