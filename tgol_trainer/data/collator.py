"""Rows to a batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tgol_trainer.thresholds import ScoreNormalization

from .images import DataError, ImageError, crop_offset, describe, open_image, to_pixels
from .videos import VideoError, video_pixels

_TINY = np.finfo(np.float32).tiny
_HUGE = np.finfo(np.float32).max
_RAW_SCORES = ScoreNormalization()


class Collator:
    """
    Makes a batch of rows. Tensors only, because `accelerate` dispatches nothing else of a stream.

    The threshold lives in shared memory: setting `collator.threshold` is seen by DataLoader workers that already run,
    for the batches they make from then on (those prefetched keep the old one).

    Args:
        resolution (`tuple[int, int]`):
            (height, width) in pixels.
        normalization ([`ScoreNormalization`], *optional*):
            Applied to the scores; by default none.
        threshold (`float`, *optional*, defaults to 0.0):
            τ, in the normalised unit of the scores.
        num_frames (`int`, *optional*):
            Frames taken of each video; `None` for images.

    Attributes:
        cut_points (`Sequence[float]`):
            Further thresholds, in the normalised unit of the scores; by default none.
        reference_scores (`numpy.ndarray`, *optional*):
            Sorted normalised scores among which each score's quantile is found.
    """

    cut_points: Sequence[float] = ()
    reference_scores: np.ndarray | None = None

    def __init__(
        self,
        resolution: tuple[int, int],
        normalization: ScoreNormalization = _RAW_SCORES,
        threshold: float = 0.0,
        num_frames: int | None = None,
    ) -> None:
        self.resolution = (int(resolution[0]), int(resolution[1]))
        self.num_frames = num_frames
        self.normalization = normalization
        self._threshold = torch.tensor(float(threshold), dtype=torch.float64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._threshold.is_shared():  # a plain pickle or copy; torch's own, for workers, keeps sharing
            self._threshold = self._threshold.share_memory_()

    @property
    def threshold(self) -> float:
        """τ, in the normalised unit of the scores."""
        return self._threshold.item()

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold.fill_(float(value))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collate rows.

        Args:
            rows (`Sequence[Mapping[str, Any]]`):
                B of them, from [`ScoredDataset`] or [`ScoredStream`].

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` (B, 3, height, width) float32 in -1..1, or (B, 3, num_frames,
            height, width) for videos; `prompt_bytes` (B, L) uint8, UTF-8 padded with zeros, and `prompt_length` (B,)
            int64 in bytes, see [`decode_prompts`]; `score` (B,) float32, normalised; `margin` (B,) float32, normalised
            score - τ, whose sign is that of the float64 difference, with the row's own τ where it has one; `row_id`
            (B,) int64; `group` (B,) int64 where rows have one; `cut_margins` (B, m) float32 where there are cut
            points; `quantile` (B,) float32 in 0..1 where there are reference scores, ties counting half; `geometry`
            (B, 4) int64, the
            image's own height and width and the top and left of the crop in the resized image (or first frame), in
            pixels.

        Raises:
            DataError: for an image or video that can no longer be opened.
        """
        texts = [row["prompt"].encode("utf-8") for row in rows]
        lengths = [len(text) for text in texts]
        padded = b"".join(text.ljust(max(lengths), b"\0") for text in texts)
        scores = self.normalization(np.array([row["score"] for row in rows], dtype=np.float64))
        visuals = [self._visual(row) for row in rows]
        tau = np.array([row.get("threshold", self.threshold) for row in rows], dtype=np.float64)
        extra: dict[str, torch.Tensor] = {}
        if rows and "group" in rows[0]:
            extra["group"] = torch.tensor([row["group"] for row in rows], dtype=torch.int64)
        if len(self.cut_points):
            extra["cut_margins"] = torch.from_numpy(_signed_float32(scores[:, None] - np.asarray(self.cut_points)))
        if self.reference_scores is not None:
            ends = [np.searchsorted(self.reference_scores, scores, side=side) for side in ("left", "right")]
            quantiles = (ends[0] + ends[1]) / (2 * len(self.reference_scores))
            extra["quantile"] = torch.from_numpy(quantiles.astype(np.float32))
        return extra | {
            "pixel_values": torch.stack([pixels for pixels, _ in visuals]),
            "geometry": torch.tensor([geometry for _, geometry in visuals]),
            "prompt_bytes": torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(rows), -1),
            "prompt_length": torch.tensor(lengths, dtype=torch.int64),
            "score": torch.from_numpy(np.clip(scores, -_HUGE, _HUGE).astype(np.float32)),
            "margin": torch.from_numpy(_signed_float32(scores - tau)),
            "row_id": torch.tensor([row["row_id"] for row in rows], dtype=torch.int64),
        }

    def _visual(self, row: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        medium = "image" if self.num_frames is None else "video"
        try:
            if self.num_frames is not None:
                return video_pixels(row[medium], self.num_frames, self.resolution)
            image = open_image(row[medium])
            geometry = image.height, image.width, *crop_offset(*image.size, self.resolution)
            return to_pixels(image, self.resolution), geometry
        except (ImageError, VideoError) as error:
            raise DataError(
                f"The {medium} of row {row['row_id']} ({describe(row[medium])}), which the check before training "
                f"opened, cannot be opened now: {error.cause}, {error}. Put the file back; {medium}s must stay in "
                "place and unchanged while a run reads them."
            ) from error


def _signed_float32(values: np.ndarray) -> np.ndarray:
    # A label is the sign of this number, so a difference that float32 rounds to 0 (or to a subnormal number, which
    # some devices flush to 0) becomes the smallest normal number of its sign; an exact tie stays 0.
    size = np.clip(np.abs(values), _TINY, _HUGE)
    return np.where(values == 0, 0.0, np.copysign(size, values)).astype(np.float32)


def decode_prompts(prompt_bytes: torch.Tensor, prompt_length: torch.Tensor) -> list[str]:
    """
    Return the prompts of a batch.

    Args:
        prompt_bytes (`torch.Tensor`):
            (B, L) uint8, UTF-8 padded with zeros, on any device.
        prompt_length (`torch.Tensor`):
            (B,) integers, in bytes.
    """
    rows = prompt_bytes.cpu().numpy()
    return [row[:length].tobytes().decode("utf-8") for row, length in zip(rows, prompt_length.tolist(), strict=True)]
