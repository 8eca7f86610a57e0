"""Training data meet the configuration: which scores give τ, and what rows and collator get of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np

from tgol_trainer import data, thresholds
from tgol_trainer.config import CONFIDENT_LOSSES, MethodArguments
from tgol_trainer.data import Columns, DataError
from tgol_trainer.data.scores import read_scores

from . import Labelling, LabelSettings, fit_labelling
from .combining import STREAMED_COLUMNS, check_combined, combine_columns

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from tgol_trainer.config import TGOLConfig
    from tgol_trainer.data import Collator, ScoredDataset, ScoredStream

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset
ProxyDataset: TypeAlias = AnyDataset | Callable[["DiffusionPipeline"], datasets.Dataset]


def check_sources(
    args: MethodArguments,
    *,
    streamed: bool | None,
    proxy: bool = False,
    regenerated: bool = False,
    proxy_streamed: bool = False,
) -> None:
    """
    Check that the data can give the threshold that the arguments ask for.

    Args:
        args ([`MethodArguments`]):
            The configuration.
        streamed (`bool`, *optional*):
            Whether the training data are a stream; `None` where there are none.
        proxy (`bool`, *optional*, defaults to `False`):
            Whether there is a proxy set.
        regenerated (`bool`, *optional*, defaults to `False`):
            Whether a function makes the proxy set anew after the reference moves.
        proxy_streamed (`bool`, *optional*, defaults to `False`):
            Whether the proxy set is a stream.

    Raises:
        ValueError: for a combination that would train something else than asked; with the remedy.
    """
    for stream, name in ((streamed, "train_dataset"), (proxy_streamed, "proxy_dataset")):
        if args.score_columns and stream:
            raise ValueError(f"{name}: {STREAMED_COLUMNS}")
    if proxy and args.threshold is not None:
        raise ValueError("`proxy_dataset` and a fixed `threshold` both set τ: leave one out.")
    if args.sync_ref_model == "epoch" and streamed:
        raise ValueError(
            "`sync_ref_model='epoch'` needs a dataset with a length: the epochs of a stream are not known when "
            "training resumes. Use a `datasets.Dataset`, or leave it at 'no'."
        )
    if streamed and (args.uses_groups or args.dead_zone):
        what = "a dead zone" if args.dead_zone else "groups (thresholds of groups, `group_size`, 'dpo')"
        raise ValueError(f"{what} need a dataset with a length: load it without `streaming=True`.")
    if streamed is False and args.threshold_strategy == "running":
        raise ValueError(
            "`threshold_strategy='running'` follows a stream; a dataset with a length has one percentile: use "
            "'global'."
        )
    if args.threshold_strategy == "oracle" and not proxy and not args.reference_samples:
        raise ValueError(
            "`threshold_strategy='oracle'` is estimated from samples of the reference model. Give them as "
            "`proxy_dataset`, or say with `reference_samples=True` that the training images are such samples."
        )
    remade = regenerated and args.sync_ref_model == "epoch"
    if args.threshold_update == "epoch" and not streamed and not remade:
        raise ValueError(
            "`threshold_update='epoch'` would give the same τ each time: the scores do not change between "
            "epochs. It means something for a streamed train_dataset, or for a `proxy_dataset` given as a "
            "function together with `sync_ref_model='epoch'`."
        )
    if args.threshold_update == "epoch" and args.dead_zone:
        raise ValueError(
            "`dead_zone` drops rows once, which `threshold_update='epoch'` would have to undo: choose one."
        )


def check_columns_of_stream(dataset: Any, name: str, args: MethodArguments) -> None:
    """Raise ValueError for several columns of scores in a stream."""
    if args.score_columns and isinstance(dataset, datasets.IterableDataset):
        raise ValueError(f"{name}: {STREAMED_COLUMNS}")


def label_settings(args: MethodArguments) -> LabelSettings:
    """Return the part of a configuration that decides labels and weights."""
    return LabelSettings(
        percentile=args.threshold_percentile,
        fixed=0.0 if args.score_combination == "min" else args.threshold,
        normalization=args.score_normalization,
        strategy="fixed" if args.score_combination == "min" else args.threshold_strategy,
        statistic=args.group_statistic,
        oracle_beta=args.oracle_beta,
        weighting=args.weighting,
        unit_mean_weight=args.normalize_weights and args.loss_type in CONFIDENT_LOSSES,
        dead_zone=args.dead_zone,
        keep_source=args.loss_type == "qrpo" or args.threshold_strategy == "running",
        cut_percentiles=args.ordinal_percentiles if args.loss_type == "ordinal" else (),
    )


def running_percentile(labelling: Labelling, args: MethodArguments) -> thresholds.RunningPercentile:
    """Return the running threshold as it stands before the first row of training."""
    initial = [] if labelling.source is None else labelling.source[-args.threshold_window :].tolist()
    return thresholds.RunningPercentile(args.threshold_percentile, args.threshold_window, initial)


def fit(
    rows: ScoredDataset | ScoredStream,
    args: TGOLConfig,
    columns: Columns,
    *,
    proxy: AnyDataset | None = None,
    stream: datasets.IterableDataset | None = None,
    combination: thresholds.ScoreCombination | None = None,
) -> Labelling:
    """
    Estimate normalisation, threshold and weights as the arguments ask.

    Args:
        rows ([`data.ScoredDataset`] or [`data.ScoredStream`]):
            The training rows.
        args ([`TGOLConfig`]):
            The configuration.
        columns ([`data.Columns`]):
            Names of the columns.
        proxy (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Scores to estimate from instead of the training scores.
        stream (`datasets.IterableDataset`, *optional*):
            The user's stream that `rows` reads.
        combination ([`thresholds.ScoreCombination`], *optional*):
            That was fitted before, of several score columns; by default it is fitted here. The rows' scores are
            combined with it.

    Returns:
        [`data.Labelling`]

    Raises:
        ThresholdError: for scores that cannot be divided in two.
        DataError: for bad scores of a proxy set or stream.
    """
    source: np.ndarray | None = None
    source_groups: list[str] | None = None
    if args.threshold_strategy not in ("group", "oracle"):
        columns = dataclasses.replace(columns, group=None)  # of a proxy set, scores are enough
    read = functools.partial(data.stream_scores, columns=columns, on_bad_sample=args.on_bad_sample)
    if args.score_columns and isinstance(rows, data.ScoredDataset) and rows.column_scores is not None:
        given = rows.column_scores
        if isinstance(proxy, datasets.Dataset):
            given, source_groups = _proxy_columns(proxy, args, columns)
        if combination is None:
            rule = (args.score_columns, args.score_weights, args.score_combination)
            combination = combine_columns(given, *rule, args.threshold_percentile)
        rows.combine(combination)
        source = combination(given)
    elif proxy is not None:
        proxy = proxy.to_iterable_dataset() if isinstance(proxy, datasets.Dataset) else proxy
        source, source_groups = read(proxy, name="proxy_dataset")
    elif isinstance(rows, data.ScoredDataset):
        source = rows.scores
    elif args.threshold is None or args.score_normalization != "none" or args.loss_type in ("qrpo", "nft"):
        source, _ = read(stream, limit=args.max_threshold_samples)
    # Of a stream, only what the first pass read is known.
    scores = rows.scores if isinstance(rows, data.ScoredDataset) else None if proxy is not None else source
    try:
        if combination is not None and scores is not None:
            check_combined(scores, combination)
        found = fit_labelling(
            source,
            scores,
            label_settings(args),
            groups=rows.groups if isinstance(rows, data.ScoredDataset) and columns.group else None,
            source_groups=source_groups,
            proxy=proxy is not None,
        )
    except thresholds.ThresholdError as error:
        raise thresholds.ThresholdError(f"Column {columns.score!r}: {error}") from None
    return dataclasses.replace(found, combination=combination)


def _proxy_columns(proxy: datasets.Dataset, args: TGOLConfig, columns: Columns) -> tuple[np.ndarray, list[str] | None]:
    """(N, K) scores of the usable rows of a proxy set, and the names of their groups."""
    if columns.group is not None and columns.group not in proxy.column_names:
        raise DataError(f"proxy_dataset: no column {columns.group!r} of groups; its columns are {proxy.column_names}.")
    found = read_scores(
        *(proxy, columns),
        score_columns=args.score_columns,
        on_bad_sample=args.on_bad_sample,
        scores_alone=True,
        name="proxy_dataset",
    )
    if columns.group is None:
        return found.scores, None
    names = proxy.select_columns([columns.group]).with_format(None)[columns.group]
    return found.scores, [str(names[int(row)]) for row in found.row_ids]


def check_pairs(rows: ScoredDataset, args: TGOLConfig) -> None:
    """
    Check that there is something to compare within groups, where the arguments ask for that.

    Args:
        rows ([`data.ScoredDataset`]):
            The rows that are trained on.
        args ([`TGOLConfig`]):
            The configuration.

    Raises:
        ValueError: if no group has two rows with different scores.
    """
    if args.comparing is None:
        return
    numbers, _ = thresholds.group_ids(rows.groups)
    lowest, highest = np.full(numbers.max() + 1, np.inf), np.full(numbers.max() + 1, -np.inf)
    np.minimum.at(lowest, numbers, rows.scores)
    np.maximum.at(highest, numbers, rows.scores)
    if not (highest > lowest).any():
        raise ValueError(
            f"{args.comparing} compares images of one group, and none of the {len(lowest)} groups (equal values of "
            f"{args.group_column or args.prompt_column!r}) has two with different scores. Score several images a "
            "prompt, name another `group_column`, or train with `loss_type='tgol'` without centring."
        )


def set_labels(
    labelling: Labelling, args: TGOLConfig, collator: Collator, rows: ScoredDataset | ScoredStream | None
) -> None:
    """
    Hand a labelling to the collator and to the training rows.

    Args:
        labelling ([`data.Labelling`]):
            Fitted to the training data.
        args ([`TGOLConfig`]):
            Loss type and strategy.
        collator ([`data.Collator`]):
            Gets normalisation, τ, and what the loss type needs of the scores.
        rows ([`data.ScoredDataset`] or [`data.ScoredStream`], *optional*):
            Get their own thresholds, where rows differ; by default they keep what they have.
    """
    collator.normalization = labelling.normalization
    collator.threshold = labelling.threshold.value
    collator.cut_points = labelling.cut_points
    if labelling.source is not None and args.loss_type == "qrpo":
        collator.reference_scores = np.sort(labelling.source)
    if isinstance(rows, data.ScoredDataset):
        rows.thresholds = labelling.rows
    elif rows is not None and args.threshold_strategy == "running":
        rows.running = functools.partial(_running, labelling, args)


def _running(labelling: Labelling, args: TGOLConfig) -> Callable[[float], float]:
    percentile_of = running_percentile(labelling, args)
    return lambda score: percentile_of.add(float(labelling.normalization(np.float64(score))))
