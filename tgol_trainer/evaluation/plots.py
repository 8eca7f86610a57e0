"""Plot scores for a model card: around the threshold, and before and after training."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tgol_trainer._files import replacing
from tgol_trainer.thresholds import shown

from .drawing import INK, printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange of Okabe and Ito (2008), told apart under the common forms of colour blindness; grey for "before".
_BLUE, _ORANGE, _GREY = "#0072b2", "#e69f00", "#8c8c8c"
_DPI = 150
_MAX_BARS = 25
"""Up to this many distinct values, such as star ratings, are drawn as one bar each if they lie well apart."""


def save_score_histogram(
    path: str | os.PathLike[str],
    scores: Sequence[float] | np.ndarray,
    threshold: float,
    *,
    name: str = "score",
    labels: tuple[str, str] = ("positive", "negative"),
    margins: np.ndarray | None = None,
    weighting: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """
    Draw a histogram of the scores that shows how the threshold divides them.

    Up to 25 distinct values that lie well apart get one bar each; others are binned with an edge at the threshold, so
    that no bar belongs to both sides. Values far outside the bulk are counted in the outermost bars, and the plot
    says so.

    Args:
        path (`str` or `os.PathLike`): PNG file; missing folders are made. It appears whole or not at all.
        scores (`Sequence[float]` or `numpy.ndarray`): Finite scores, (N,).
        threshold (`float`): τ, in the unit of the scores; a score equal to it is positive.
        name (`str`, *optional*, defaults to `"score"`): Name of the score, for the axis.
        labels (`tuple[str, str]`, *optional*, defaults to `("positive", "negative")`):
            Names in the legend of the scores from the threshold up and of the scores below it.
        margins (`numpy.ndarray`, *optional*):
            (N,) s − τ, whose sign is the label, if rows have their own τ or were labelled in another unit; by default
            the scores minus the threshold.
        weighting (`Callable`, *optional*):
            Function from margins to weights, elementwise; it may overwrite the margins. An outline then counts the
            samples by weight, relative to the mean weight.

    Raises:
        ValueError: if there are no scores, or one of them or the threshold is NaN or infinite.
    """
    from matplotlib.patches import Patch

    values = _finite(scores, name)
    threshold = float(threshold)
    if not math.isfinite(threshold):
        raise ValueError(f"The threshold is {threshold}; it must be a finite number.")
    if margins is None:
        values = np.sort(values)
        split = int(np.searchsorted(values, threshold))
        below, above, ties = values[:split], values[split:], int((values == threshold).sum())
    else:
        order = np.argsort(values, kind="stable")
        values, margins = values[order], margins[order]
        below, above, ties = values[margins < 0], values[margins >= 0], int((margins == 0).sum())
    distinct = values[np.concatenate([[True], values[1:] != values[:-1]])]
    few = _bar_each(distinct)
    edges, outside = ([], 0) if few else _edges(values, threshold)
    with _figure(path, 1, 1, (6.4, 3.6)) as (_, (axes,)):
        handles: list[Artist] = []
        for side, label, sign, colour in ((below, labels[1], "<", _ORANGE), (above, labels[0], "≥", _BLUE)):
            counts = np.diff(_cuts(side, distinct, edges))
            if few:
                axes.bar(distinct, counts, width=0.8 * _spacing(distinct), color=colour)
            else:
                axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colour)
            share = 100 * side.size / values.size
            text = f"{_escaped(label)} (score {sign} τ): {side.size:,} ({share:.1f} %)"
            handles.append(Patch(color=colour, label=text))
        if weighting is not None:
            weights = weighting(values - threshold if margins is None else margins)
            np.cumsum(weights, out=weights)
            sums = np.diff(np.concatenate([[0], weights])[_cuts(values, distinct, edges)]) * values.size / weights[-1]
            handles.append(_draw_outline(axes, sums, distinct, edges))
        text = f"threshold τ = {shown(threshold, float(values.std())):.6g}" + (
            f" ({ties:,} tied with it)" if ties else ""
        )
        handles.append(axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.5, label=text))
        if few and distinct.size <= 10:
            axes.set_xticks(distinct)
        axes.set_xlabel(
            _escaped(name) + (f"\n(end bars also count values beyond them: {outside:,})" if outside else "")
        )
        axes.set_ylabel("samples")
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, frameon=False, fontsize=9
        )


def save_score_distributions(
    path: str | os.PathLike[str],
    comparisons_data: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    medium: str = "image",
) -> None:
    """
    Draw one small panel per score with its distribution before and after, as in the paper's Figure 3.

    Args:
        path (`str` or `os.PathLike`): PNG file; missing folders are made. It appears whole or not at all.
        comparisons_data (`Mapping[str, tuple[Sequence, Sequence]]`):
            Name of a score to its values before and after; pairs in which either is `None` are left out.
        medium (`str`, *optional*, defaults to `"image"`): What was scored, `"image"` or `"video"`, for the axis.

    Raises:
        ValueError: if there are no scores, two sides differ in length, no pair is left, or a value is NaN or infinite.
    """
    from matplotlib.patches import Patch

    if not comparisons_data:
        raise ValueError("There is no score to draw: `comparisons_data` is empty.")
    pairs = {name: _complete_pairs(name, *sides) for name, sides in comparisons_data.items()}
    columns = 2 if len(pairs) in (2, 4) else min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    with _figure(path, rows, columns, (max(3.2 * columns, 4.2), 2.5 * rows + 0.4)) as (figure, panels):
        for axes, (name, (before, after)) in zip(panels, pairs.items(), strict=False):
            _draw_overlaid(axes, before, after)
            axes.set_title(_escaped(name if len(name) <= 34 else name[:33] + "…"), fontsize=10)
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        for axes in panels[: len(pairs) : columns]:
            axes.set_ylabel(f"{medium}s")
        handles = [Patch(color=_GREY, label="before"), Patch(color=_BLUE, label="after"), *panels[0].lines]
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)


@contextlib.contextmanager
def _figure(
    path: str | os.PathLike[str], rows: int, columns: int, size: tuple[float, float]
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure and its panels in matplotlib's own default style, and save it as PNG on leaving without error."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"), warnings.catch_warnings():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
            axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.margins(y=0.08)
        yield figure, panels
        # A script that the bundled font lacks is drawn as boxes; a warning per glyph would help nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        with replacing(path) as draft:
            # Matplotlib writes its version by default, which would make equal plots differ.
            figure.savefig(draft, format="png", dpi=_DPI, metadata={"Software": None})


def _cuts(values: np.ndarray, distinct: np.ndarray, edges: list[float]) -> np.ndarray:
    """Return where sorted values pass from one bar to the next; the outermost bars hold what lies beyond them too."""
    inner = edges[1:-1] if edges else distinct[1:]
    return np.concatenate([[0], np.searchsorted(values, inner), [values.size]]).astype(np.int64)


def _draw_outline(axes: Axes, heights: np.ndarray, distinct: np.ndarray, edges: list[float]) -> Artist:
    from matplotlib.lines import Line2D

    if edges:
        axes.stairs(heights, edges, color=INK, linewidth=1)
    else:
        axes.bar(distinct, heights, width=0.8 * _spacing(distinct), fill=False, edgecolor=INK, linewidth=1)
    return Line2D([], [], color=INK, linewidth=1, label="outline: the same, counted by weight")


def _draw_overlaid(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Draw both over the same bins, or as pairs of bars if there are few distinct values, and their means."""
    both = np.concatenate([before, after])
    distinct = np.unique(both)
    step = _spacing(distinct)
    few = _bar_each(distinct)
    edges = [] if few else _edges(both)[0]
    for side, colour, offset in ((before, _GREY, -0.2), (after, _BLUE, 0.2)):
        counts = np.diff(_cuts(np.sort(side), distinct, edges))
        if few:
            axes.bar(distinct + offset * step, counts, width=0.4 * step, color=colour)
        else:
            axes.stairs(counts, edges, color=colour, alpha=0.45, fill=True, linewidth=0)
            axes.stairs(counts, edges, color=colour, linewidth=1.5, zorder=2)
    if few and distinct.size <= 6:
        axes.set_xticks(distinct)
    axes.axvline(before.mean(), color=INK, linestyle=":", linewidth=1.4, label="mean before")
    axes.axvline(after.mean(), color=_BLUE, linestyle="--", linewidth=1.4, label="mean after")


def _edges(values: np.ndarray, anchor: float | None = None) -> tuple[list[float], int]:
    """
    Return the edges of 20 to 60 bins, the anchor among them, and the number of values beyond the first and last edge.

    The range is that of the values, unless a few outliers would squeeze the rest into a third of it.
    """
    low, high = values.min(), values.max()
    inner_low, quarter, three_quarters, inner_high = np.percentile(values, [0.5, 25, 75, 99.5])
    if 0 < inner_high - inner_low < (high - low) / 3:
        spread = inner_high - inner_low
        low, high = max(low, inner_low - spread / 4), min(high, inner_high + spread / 4)
    width = 2 * (three_quarters - quarter) / values.size ** (1 / 3)  # Freedman and Diaconis (1981)
    span = float(high - low)
    width = min(max(width, span / 60), span / 20)
    if anchor is None or not low <= anchor <= high:
        anchor = low
    below, above = math.ceil((anchor - low) / width - 1e-9), max(math.ceil((high - anchor) / width - 1e-9), 1)
    edges = (anchor + width * np.arange(-below, above + 1)).tolist()
    # Rounding may leave the outermost edges short of the range that they cover.
    return edges, int(((values < min(low, edges[0])) | (values > max(high, edges[-1]))).sum())


def _spacing(distinct: np.ndarray) -> float:
    """Return the smallest gap between sorted distinct values, or 1 for a single value."""
    return float(np.diff(distinct).min()) if distinct.size > 1 else 1.0


def _bar_each(distinct: np.ndarray) -> bool:
    """Return whether every distinct value can have a bar of its own that is wide enough to see."""
    if distinct.size == 1:
        return True
    return distinct.size <= _MAX_BARS and _spacing(distinct) >= np.ptp(distinct) / (2 * _MAX_BARS)


def _finite(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError(f"There are no values of {name!r} to draw.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {array.size} values of {name!r} are NaN or infinite, the first at row {bad[0]}."
        )
    return array


def _complete_pairs(
    name: str, before: Sequence[float | None], after: Sequence[float | None]
) -> tuple[np.ndarray, np.ndarray]:
    if len(before) != len(after):
        raise ValueError(
            f"The score {name!r} has {len(before)} values before and {len(after)} after; they must pair up."
        )
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    array = _finite(pairs, name).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _escaped(text: str) -> str:
    """Return the text with dollar signs that matplotlib will not take for mathematics."""
    return printable(text).replace("$", r"\$")
