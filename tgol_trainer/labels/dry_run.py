"""Label scores as training would, without a model: `tgol label`."""

from __future__ import annotations

import dataclasses

import numpy as np

from tgol_trainer.config import MethodArguments
from tgol_trainer.data import Columns
from tgol_trainer.data.scores import ScoredRows

from .fitting import fit_labels
from .report import LabelReport, label_report, label_uncertainty
from .training import label_settings


def dry_run(
    rows: ScoredRows,
    method: MethodArguments,
    columns: Columns,
    *,
    group_column: str | None = None,
    proxy: ScoredRows | None = None,
) -> tuple[LabelReport, np.ndarray]:
    """
    Label scores as training would, and describe the result.

    Args:
        rows ([`ScoredRows`]): The training scores.
        method ([`MethodArguments`]): Checked settings.
        columns ([`Columns`]): The columns as read.
        group_column (`str`, *optional*): Column of the groups, as read.
        proxy ([`ScoredRows`], *optional*): Scores that give the threshold instead.

    Returns:
        `tuple[LabelReport, numpy.ndarray]`: the report, and the (N,) raw or combined scores that were labelled.

    Raises:
        ThresholdError: for scores that cannot be divided in two.
    """
    settings = label_settings(method)
    grouped = group_column if settings.strategy in ("group", "oracle") else None
    keys = rows.keys[grouped] if grouped else None
    source = proxy.scores if proxy else None
    source_keys = proxy.keys[grouped] if proxy and grouped else None
    fitted = fit_labels(
        rows.scores, settings, groups=keys, source=source, source_groups=source_keys, name=columns.score
    )
    uncertainty = label_uncertainty(
        rows, fitted, settings, source=source, group_column=grouped, source_keys=source_keys
    )
    del keys, source, source_keys
    labeler = dataclasses.replace(fitted.labeler, source=None, by_group=None)
    report = label_report(
        rows,
        fitted._replace(labeler=labeler),
        prompt_column=columns.prompt,
        score_column=columns.score,
        group_column=group_column,
        uncertainty=uncertainty,
    )
    scores = rows.scores if labeler.combination is None else labeler.combination(rows.scores)
    return report, scores if fitted.kept is None else scores[fitted.kept]
