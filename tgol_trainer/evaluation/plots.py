"""Images for a model card: scores around the threshold, scores before and after, and images side by side."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

# Blue and orange of Okabe and Ito (2008), told apart under the common forms of colour blindness; grey for "before".
_BLUE, _ORANGE, _GREY, _INK = "#0072b2", "#e69f00", "#8c8c8c", "#222222"
_DPI = 150
_MAX_BARS = 25
"""Up to this many distinct values, if they lie well apart, are drawn one bar each, as star ratings want."""

_MIN_CELL, _MAX_CELL = 128, 320
"""Sides, in pixels, between which images are brought in a grid."""


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
    Draw how the threshold divides the scores.

    Up to 25 distinct values that lie well apart get one bar each; others are binned with an edge at the threshold, so
    that no bar belongs to both sides. Values far outside the bulk are counted in the outermost bars, which the plot
    then says.

    Args:
        path (`str` or `os.PathLike`):
            PNG file; missing folders are made.
        scores (`Sequence[float]` or `numpy.ndarray`):
            Finite scores, (N,).
        threshold (`float`):
            τ, in the unit of the scores; a score equal to it is positive.
        name (`str`, *optional*, defaults to `"score"`):
            Name of the score, for the axis.
        labels (`tuple[str, str]`, *optional*, defaults to `("positive", "negative")`):
            Names in the legend of the scores from the threshold up and of those below.
        margins (`numpy.ndarray`, *optional*):
            (N,) s - τ, whose sign is the label, where rows have their own τ or were labelled in another unit; by
            default the scores less the threshold.
        weighting (`Callable`, *optional*):
            Margins to weights, elementwise, which may overwrite them; given, an outline counts the samples by weight,
            relative to the mean.

    Raises:
        ValueError: if there are no scores, or one of them or the threshold is NaN or infinite.
    """
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
            handles.append(_swatch(colour, f"{_escaped(label)} (score {sign} τ): {side.size:,} ({share:.1f} %)"))
        if weighting is not None:
            weights = weighting(values - threshold if margins is None else margins)
            np.cumsum(weights, out=weights)
            sums = np.diff(np.concatenate([[0], weights])[_cuts(values, distinct, edges)]) * values.size / weights[-1]
            handles.append(_draw_outline(axes, sums, distinct, edges))
        text = f"threshold τ = {threshold:.6g}" + (f" ({ties:,} tied with it)" if ties else "")
        handles.append(axes.axvline(threshold, color=_INK, linestyle="--", linewidth=1.5, label=text))
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
) -> None:
    """
    Draw one small panel a score with its distribution before and after, as in the paper's Figure 3.

    Args:
        path (`str` or `os.PathLike`):
            PNG file; missing folders are made.
        comparisons_data (`Mapping[str, tuple[Sequence, Sequence]]`):
            Name of a score to its values before and after; pairs in which either is `None` are left out.

    Raises:
        ValueError: if there are no scores, two sides differ in length, no pair is left, or a value is NaN or infinite.
    """
    if not comparisons_data:
        raise ValueError("There is no score to draw: `comparisons_data` is empty.")
    pairs = {name: _complete_pairs(name, *sides) for name, sides in comparisons_data.items()}
    columns = 2 if len(pairs) in (2, 4) else min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    with _figure(path, rows, columns, (max(3.2 * columns, 4.2), 2.5 * rows + 0.4)) as (figure, panels):
        for axes, (name, (before, after)) in zip(panels, pairs.items(), strict=False):
            _draw_overlaid(axes, before, after)
            axes.set_title(_escaped(_shortened(name, 34)), fontsize=10)
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        for axes in panels[: len(pairs) : columns]:
            axes.set_ylabel("images")
        handles = [_swatch(_GREY, "before"), _swatch(_BLUE, "after"), *panels[0].lines]
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)


def save_before_after_grid(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    *,
    columns: int = 2,
    scale: int | None = None,
    scores: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]] | None = None,
) -> None:
    """
    Draw pairs of images, before on the left and after on the right, below their prompt.

    Args:
        path (`str` or `os.PathLike`):
            PNG file; missing folders are made.
        prompts (`Sequence[str]`):
            One a pair; cut to two lines.
        before (`Sequence[PIL.Image.Image]`):
            Images before.
        after (`Sequence[PIL.Image.Image]`):
            Images after.
        columns (`int`, *optional*, defaults to 2):
            Pairs side by side.
        scale (`int`, *optional*):
            Whole factor by which images are enlarged, pixel by pixel. `None` takes the smallest that makes every
            image at least 128 pixels wide and high, and reduces images above 320 pixels to that size.
        scores (`Mapping[str, tuple[Sequence, Sequence]]`, *optional*):
            Name of a score to its values before and after, written below the images; `None` is written as "–".

    Raises:
        ValueError: if there are no pairs, lengths differ, or `columns` or `scale` is below 1.
    """
    _check_grid(prompts, before, after, columns, scale, scores or {})
    left, right = _resized(before, scale), _resized(after, scale)
    cell_width = max(image.width for image in (*left, *right))
    cell_height = max(image.height for image in (*left, *right))
    size = min(max(cell_width // 16, 12), 18)
    font, small, bold = _font(size), _font(size - 1), _font(size, bold=True)
    inner, margin, line = 6, 2 * size, size + 5
    pair_width = 2 * cell_width + inner
    captions = [_wrapped(prompt, font, pair_width, 2) for prompt in prompts]
    notes = [_score_lines(scores or {}, i, small, cell_width) for i in range(len(prompts))]
    columns = min(columns, len(prompts))
    row_of_pairs = [range(start, min(start + columns, len(prompts))) for start in range(0, len(prompts), columns)]
    caption_lines = [max(len(captions[i]) for i in row) for row in row_of_pairs]
    note_lines = [max(len(notes[i][0]) for i in row) for row in row_of_pairs]
    heights = [line * (top + under) + cell_height + 4 for top, under in zip(caption_lines, note_lines, strict=True)]
    width = columns * (pair_width + margin) + margin
    height = margin + line + sum(heights) + margin * len(heights)
    sheet = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(sheet)
    for column in range(columns):
        x = margin + column * (pair_width + margin)
        for k, title in enumerate(("Before", "After")):
            centre = x + k * (cell_width + inner) + cell_width / 2
            canvas.text((centre, margin // 2), title, fill=_INK, font=bold, anchor="ma")
    y = margin // 2 + line + margin // 2
    for row, top, row_height in zip(row_of_pairs, caption_lines, heights, strict=True):
        for column, i in enumerate(row):
            x = margin + column * (pair_width + margin)
            # Short captions sit on the images rather than at the top of their row.
            start = y + line * (top - len(captions[i]))
            for k, text in enumerate(captions[i]):
                canvas.text((x, start + k * line), text, fill=_INK, font=font)
            for k, image in enumerate((left[i], right[i])):
                cell = x + k * (cell_width + inner)
                sheet.paste(image, (cell + (cell_width - image.width) // 2, y + line * top + 2))
                for j, text in enumerate(notes[i][k]):
                    below = y + line * (top + j) + cell_height + 6
                    canvas.text((cell + cell_width / 2, below), text, fill="#555555", font=small, anchor="ma")
        y += row_height + margin
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name in a script that the bundled font lacks is drawn as boxes; one warning a glyph would help nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # The version of matplotlib, which it writes by default, would make equal plots differ.
        figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _swatch(colour: str, text: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=text)


def _cuts(values: np.ndarray, distinct: np.ndarray, edges: list[float]) -> np.ndarray:
    """Return where sorted values pass from one bar to the next; the outermost bars hold what lies beyond them."""
    inner = edges[1:-1] if edges else distinct[1:]
    return np.concatenate([[0], np.searchsorted(values, inner), [values.size]]).astype(np.int64)


def _draw_outline(axes: Axes, heights: np.ndarray, distinct: np.ndarray, edges: list[float]) -> Artist:
    from matplotlib.lines import Line2D

    if edges:
        axes.stairs(heights, edges, color=_INK, linewidth=1)
    else:
        axes.bar(distinct, heights, width=0.8 * _spacing(distinct), fill=False, edgecolor=_INK, linewidth=1)
    return Line2D([], [], color=_INK, linewidth=1, label="outline: the same, counted by weight")


def _draw_overlaid(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Draw both over the same bins, or as pairs of bars where there are few distinct values, and their means."""
    both = np.concatenate([before, after])
    distinct = np.unique(both)
    step = _spacing(distinct)
    few = _bar_each(distinct)
    edges = [] if few else _edges(both)[0]
    for side, colour, offset in ((before, _GREY, -0.2), (after, _BLUE, 0.2)):
        if few:
            levels, counts = np.unique(side, return_counts=True)
            axes.bar(levels + offset * step, counts, width=0.4 * step, color=colour)
        else:
            clipped = np.clip(side, edges[0], edges[-1])
            axes.hist(clipped, bins=edges, color=colour, alpha=0.45, histtype="stepfilled")
            axes.hist(clipped, bins=edges, color=colour, histtype="step", linewidth=1.5)
    if few and distinct.size <= 6:
        axes.set_xticks(distinct)
    axes.axvline(before.mean(), color=_INK, linestyle=":", linewidth=1.4, label="mean before")
    axes.axvline(after.mean(), color=_BLUE, linestyle="--", linewidth=1.4, label="mean after")


def _edges(values: np.ndarray, anchor: float | None = None) -> tuple[list[float], int]:
    """
    Return 20 to 60 bins, one of whose edges is the anchor, and the number of values beyond the first and last edge.

    The range is that of the values, unless a few outliers would squeeze the rest into a third of it.
    """
    low, high = values.min(), values.max()
    inner_low, inner_high = np.percentile(values, [0.5, 99.5])
    if 0 < inner_high - inner_low < (high - low) / 3:
        spread = inner_high - inner_low
        low, high = max(low, inner_low - spread / 4), min(high, inner_high + spread / 4)
    quartiles = np.percentile(values, [25, 75])
    # Freedman and Diaconis (1981).
    width = 2 * (quartiles[1] - quartiles[0]) / values.size ** (1 / 3)
    span = float(high - low)
    width = min(max(width, span / 60), span / 20)
    if anchor is None or not low <= anchor <= high:
        anchor = low
    below, above = math.ceil((anchor - low) / width - 1e-9), max(math.ceil((high - anchor) / width - 1e-9), 1)
    edges = (anchor + width * np.arange(-below, above + 1)).tolist()
    # By rounding, the outermost edges may fall short of the range that they were made to cover.
    return edges, int(((values < min(low, edges[0])) | (values > max(high, edges[-1]))).sum())


def _spacing(distinct: np.ndarray) -> float:
    """Return the smallest gap between sorted distinct values, 1 for a single one."""
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


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _escaped(text: str) -> str:
    """Return the text with dollar signs that matplotlib will not take for mathematics."""
    return _printable(text).replace("$", r"\$")


def _printable(text: str) -> str:
    """Return one line that can be drawn: white space collapsed, control characters and lone surrogates replaced."""
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _check_grid(
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    columns: int,
    scale: int | None,
    scores: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
) -> None:
    lengths = {"prompts": len(prompts), "before": len(before), "after": len(after)}
    for name, sides in scores.items():
        lengths[f"scores[{name!r}] before"], lengths[f"scores[{name!r}] after"] = map(len, sides)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A grid needs as many of each: {', '.join(f'{k} has {n}' for k, n in lengths.items())}.")
    if not prompts:
        raise ValueError("There are no pairs to draw.")
    if columns < 1:
        raise ValueError(f"`columns` is {columns}; it must be at least 1.")
    if scale is not None and scale < 1:
        raise ValueError(f"`scale` is {scale}; it must be at least 1.")


def _resized(images: Sequence[Image.Image], scale: int | None) -> list[Image.Image]:
    result = []
    for image in images:
        image = image.convert("RGB")
        factor = scale or math.ceil(_MIN_CELL / min(image.size))
        if factor > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        elif scale is None and max(image.size) > _MAX_CELL:
            image.thumbnail((_MAX_CELL, _MAX_CELL), Image.Resampling.LANCZOS)
        result.append(image)
    return result


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    # The other layout engine is an optional library that places glyphs differently.
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Return at most `max_lines` lines no wider than `width` pixels, broken at spaces where one is near."""
    # No glyph worth reading is narrower than a pixel, so the rest cannot be seen.
    rest = _printable(text)[: int(width) * max_lines]
    lines: list[str] = []
    while rest and len(lines) < max_lines:
        fitting = _fitting(rest, font, width)
        if fitting == len(rest):
            lines.append(rest)
            rest = ""
        elif len(lines) == max_lines - 1:
            lines.append(rest[: _fitting(rest, font, width - font.getlength("…"))].rstrip() + "…")
        else:
            space = rest.rfind(" ", 0, fitting + 1)
            cut = space if space > 0 else fitting
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Return how many characters fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _score_lines(
    scores: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    i: int,
    font: ImageFont.FreeTypeFont,
    width: float,
) -> tuple[list[str], list[str]]:
    """Return the lines below the left and the right image of pair `i`."""
    lines: tuple[list[str], list[str]] = ([], [])
    for name, sides in scores.items():
        for k, values in enumerate(sides):
            lines[k].append(_score_line(name, values[i], font, width))
    return lines


def _score_line(name: str, value: float | None, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return name and value, no wider than `width` pixels if the value alone is not."""
    text = "–" if value is None else f"{value:.4g}"
    shown = _wrapped(name, font, width - font.getlength(f" {text}"), 1)
    return f"{shown[0]} {text}" if shown else text
