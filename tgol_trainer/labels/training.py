"""Label the training data of a run as its configuration asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np

from tgol_trainer import data, thresholds
from tgol_trainer.config import MethodArguments
from tgol_trainer.data import Columns, DataError
from tgol_trainer.data.scores import read_scores

from .fitting import FittedLabels, LabelSettings, fit_labels

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from tgol_trainer.config import TGOLConfig
    from tgol_trainer.data import ScoredDataset, ScoredStream
    from tgol_trainer.thresholds import ScoreCombination

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset
ProxyDataset: TypeAlias = AnyDataset | Callable[["DiffusionPipeline"], datasets.Dataset]

STREAMED_COLUMNS = (
    "`score_columns` are standardised by all of their scores, which a stream does not know in advance. Load the "
    "dataset without `streaming=True`, or add one column of combined scores yourself (`.map`) and name it as "
    "`score_column`."
)

_READ_SCORES = ("tgol_anchored", "nft")
"""Losses that need the spread of the scores, whatever the threshold."""


def check_sources(
    args: MethodArguments, train_dataset: Any = None, proxy_dataset: Any = None, *, streamed: bool | None = None
) -> None:
    """
    Check that the data can give the threshold that the arguments ask for.

    Args:
        args ([`MethodArguments`]): The configuration.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): The training data.
        proxy_dataset (the same, or a callable that returns one, *optional*):
            The proxy set. Any other value that is not `None` stands for a proxy set that is not loaded yet.
        streamed (`bool`, *optional*): Whether the training data are a stream; by default read from `train_dataset`.

    Raises:
        ValueError: for a combination that would train something else than asked, with the remedy.
    """
    if streamed is None and train_dataset is not None:
        streamed = isinstance(train_dataset, datasets.IterableDataset)
    proxy_streamed = isinstance(proxy_dataset, datasets.IterableDataset)
    for stream, name in ((streamed, "train_dataset"), (proxy_streamed, "proxy_dataset")):
        if args.score_columns and stream:
            raise ValueError(f"{name}: {STREAMED_COLUMNS}")
    if proxy_dataset is not None and args.threshold is not None:
        raise ValueError("`proxy_dataset` and a fixed `threshold` both set τ: leave one out.")
    if proxy_dataset is not None and args.reference_samples:
        raise ValueError("`proxy_dataset` and `reference_samples` both name samples of the reference: leave one out.")
    if args.reference_update == "epoch" and streamed:
        raise ValueError(
            "`reference_update='epoch'` needs a dataset with a length: the epochs of a stream are not known when "
            "training resumes. Use a `datasets.Dataset`, or leave it at 'never'."
        )
    for name in ("precompute_ref_log_probs", "value_baseline"):
        if streamed and getattr(args, name):
            raise ValueError(f"`{name}` needs a dataset with a length: load it without `streaming=True`.")
    if streamed and (args.uses_groups or args.dead_zone):
        what = "a dead zone" if args.dead_zone else "groups (thresholds of groups, `group_size`, 'dpo')"
        raise ValueError(f"{what} need a dataset with a length: load it without `streaming=True`.")
    if streamed is False and args.threshold_strategy == "running":
        raise ValueError(
            "`threshold_strategy='running'` follows a stream. A dataset with a length has one percentile: use "
            "'global'."
        )
    if streamed is False and args.max_threshold_samples is not None:
        raise ValueError(
            "`max_threshold_samples` limits the first pass over a stream and has no effect on a dataset with a "
            "length: leave it out."
        )
    if streamed and args.max_threshold_samples is not None and not _reads_stream(args, proxy_dataset is not None):
        raise ValueError(
            "`max_threshold_samples` limits the first pass over a stream, and with a fixed `threshold` or a "
            "`proxy_dataset` there is none: leave it out."
        )
    if args.threshold_strategy == "oracle" and proxy_dataset is None and not args.reference_samples:
        raise ValueError(
            "`threshold_strategy='oracle'` is estimated from samples of the reference model. Give them as "
            "`proxy_dataset`, or set `reference_samples=True` if the reference model made the training images."
        )
    _check_threshold_update(args, bool(streamed), callable(proxy_dataset))


def _reads_stream(args: MethodArguments, proxy: bool) -> bool:
    """Whether the scores of a stream are read before training."""
    if label_settings(args).unit_mean_weight:
        return True
    fixed = args.threshold is not None and args.score_normalization == "none" and args.loss_type not in _READ_SCORES
    return not (proxy or fixed)


def _check_threshold_update(args: MethodArguments, streamed: bool, regenerated: bool) -> None:
    if args.threshold_update != "epoch":
        return
    if not streamed and not (regenerated and args.reference_update == "epoch"):
        raise ValueError(
            "`threshold_update='epoch'` would give the same τ each time: the scores do not change between epochs. "
            "Use it with a streamed train_dataset, or with a `proxy_dataset` given as a function together with "
            "`reference_update='epoch'`."
        )
    if args.dead_zone:
        raise ValueError(
            "`dead_zone` drops rows once, and `threshold_update='epoch'` would have to undo that: choose one."
        )


def label_settings(args: MethodArguments) -> LabelSettings:
    """Return the part of a configuration that decides labels and weights."""
    return LabelSettings(
        percentile=args.threshold_percentile,
        fixed=0.0 if args.score_combination == "min" else args.threshold,
        normalization=args.score_normalization,
        strategy="fixed" if args.score_combination == "min" else args.strategy,
        statistic=args.group_statistic,
        oracle_beta=args.oracle_beta,
        weighting=args.weighting,
        unit_mean_weight=args.normalize_weights,
        dead_zone=args.dead_zone,
        window=args.threshold_window if args.threshold_strategy == "running" else None,
        columns=tuple(args.score_columns or ()),
        column_weights=args.score_weights,
        combination=args.score_combination,
    )


def fit_rows(
    rows: ScoredDataset | ScoredStream,
    args: TGOLConfig,
    columns: Columns,
    *,
    proxy: AnyDataset | None = None,
    combination: ScoreCombination | None = None,
) -> FittedLabels:
    """
    Read the scores that decide the labels, and fit a labeler to them.

    Args:
        rows ([`data.ScoredDataset`] or [`data.ScoredStream`]): The training rows.
        args ([`TGOLConfig`]): The configuration.
        columns ([`data.Columns`]): Names of the columns.
        proxy (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Scores to estimate from instead of the training scores.
        combination ([`thresholds.ScoreCombination`], *optional*):
            Combination of several score columns that was fitted before and is kept.

    Returns:
        [`FittedLabels`]: with the labels of a dataset with a length. A stream is labelled while it is read.

    Raises:
        ThresholdError: for scores that cannot be divided in two.
        DataError: for bad scores of a proxy set or stream.
    """
    grouped = args.strategy in ("group", "oracle")
    group = columns.group if grouped else None
    scores, source, source_groups = None, None, None
    if proxy is not None:
        source, source_groups = _read_source(proxy, args, columns, group)
    if isinstance(rows, data.ScoredDataset):
        scores = rows.scores
    elif _reads_stream(args, proxy is not None):
        limit, alone = args.max_threshold_samples, dataclasses.replace(columns, group=None)
        scores, _ = data.stream_scores(rows.source, alone, on_bad_sample=args.on_bad_sample, limit=limit)
    return fit_labels(
        scores,
        label_settings(args),
        groups=rows.groups if isinstance(rows, data.ScoredDataset) and group is not None else None,
        source=source,
        source_groups=source_groups,
        combination=combination,
        name=columns.score,
    )


def _read_source(
    proxy: AnyDataset, args: TGOLConfig, columns: Columns, group: str | None
) -> tuple[np.ndarray, list[str] | None]:
    """Return the (M,) or (M, K) scores of the usable rows of a proxy set, and the names of their groups."""
    if not args.score_columns:
        stream = proxy.to_iterable_dataset() if isinstance(proxy, datasets.Dataset) else proxy
        wanted = dataclasses.replace(columns, group=group)
        return data.stream_scores(stream, wanted, on_bad_sample=args.on_bad_sample, name="proxy_dataset")
    if not isinstance(proxy, datasets.Dataset):
        raise ValueError(f"proxy_dataset: {STREAMED_COLUMNS}")
    if group is not None and group not in proxy.column_names:
        raise DataError(f"proxy_dataset: no column {group!r} of groups; its columns are {proxy.column_names}.")
    found = read_scores(
        *(proxy, columns),
        score_columns=args.score_columns,
        on_bad_sample=args.on_bad_sample,
        scores_alone=True,
        name="proxy_dataset",
    )
    if group is None:
        return found.scores, None
    names = proxy.select_columns([group]).with_format(None)[group]
    return found.scores, [str(names[int(row)]) for row in found.row_ids]


def check_comparisons(rows: ScoredDataset, scores: np.ndarray, args: TGOLConfig) -> None:
    """
    Check that groups hold something to compare, where the loss compares rows of one group.

    Args:
        rows ([`data.ScoredDataset`]): The rows that are trained on.
        scores (`numpy.ndarray`): (N,) their normalised scores, float32, as the losses compare them.
        args ([`TGOLConfig`]): The configuration.

    Raises:
        ValueError: if no group has two rows with different scores.
    """
    if args.comparing is None:
        return
    numbers, _ = thresholds.group_ids(rows.groups)
    lowest, highest = np.full(numbers.max() + 1, np.inf), np.full(numbers.max() + 1, -np.inf)
    np.minimum.at(lowest, numbers, scores)
    np.maximum.at(highest, numbers, scores)
    if not (highest > lowest).any():
        raise ValueError(
            f"{args.comparing} compares images of one group, and none of the {len(lowest)} groups (equal values of "
            f"{args.group_column or args.prompt_column!r}) has two images with different float32 scores. Score "
            "several images per prompt, name another `group_column`, or train with `loss_type='tgol'`."
        )
