"""Stack rows to a batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .images import DataError, ImageError, content_key, crop_offset, describe, open_image, to_pixels
from .videos import VideoError, video_pixels

LABELS = ("score", "margin", "weight")
"""Values of [`labels.RowLabels`] that a batch stacks, where rows have them."""


class Collator:
    """
    Stack rows to a batch. The batch holds tensors only, because `accelerate` dispatches nothing else of a stream.

    Args:
        resolution (`tuple[int, int]`): (height, width) in pixels.
        num_frames (`int`, *optional*): Number of frames taken of each video; `None` for images.
    """

    def __init__(self, resolution: tuple[int, int], num_frames: int | None = None) -> None:
        self.resolution = (int(resolution[0]), int(resolution[1]))
        self.num_frames = num_frames

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collate rows.

        Args:
            rows (`Sequence[Mapping[str, Any]]`): B rows of [`ScoredDataset`] or [`ScoredStream`].

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` (B, 3, height, width) float32 in -1..1, or (B, 3, num_frames,
            height, width) for videos, or `image_key` (B, 2) int64 of rows that are encoded already; `prompt_bytes`
            (B, L) uint8, UTF-8 padded with zeros, and `prompt_length` (B,) int64 in bytes, see [`decode_prompts`];
            `row_id` (B,) int64; `geometry` (B, 4) int64: the image's own height and width, and the top and left of the
            crop in the resized image or first frame, in pixels; `resolution` (B, 2) int64, height and width of the
            pixels, the same for all rows; `group` (B,) int64 where rows have one; and what rows have of `LABELS`,
            stacked, float32.

        Raises:
            DataError: for an image or video that can no longer be opened.
        """
        texts = [row["prompt"].encode("utf-8") for row in rows]
        lengths = [len(text) for text in texts]
        padded = b"".join(text.ljust(max(lengths), b"\0") for text in texts)
        batch = {
            **self._visuals(rows),
            "prompt_bytes": torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(rows), -1),
            "prompt_length": torch.tensor(lengths, dtype=torch.int64),
            "row_id": torch.tensor([row["row_id"] for row in rows], dtype=torch.int64),
        }
        if "group" in rows[0]:
            batch["group"] = torch.tensor([row["group"] for row in rows], dtype=torch.int64)
        labels = [name for name in LABELS if name in rows[0]]
        return batch | {
            name: torch.tensor(np.stack([row[name] for row in rows]), dtype=torch.float32) for name in labels
        }

    def _visuals(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        resolution, *others = {row.get("resolution", self.resolution) for row in rows}
        if others:
            raise ValueError(f"A batch holds images of one size, and this one has {[resolution, *others]}.")
        batch = {"resolution": torch.tensor([resolution] * len(rows))}
        if "size" in rows[0]:
            keys = np.frombuffer(bytearray(b"".join(row["image_key"] for row in rows)), dtype=np.int64).reshape(-1, 2)
            sizes = [row["size"] for row in rows]
            geometry = [(height, width, *crop_offset(width, height, resolution)) for width, height in sizes]
            return {**batch, "image_key": torch.from_numpy(keys), "geometry": torch.tensor(geometry)}
        pixels, geometries = zip(*(self._visual(row, resolution) for row in rows), strict=True)
        return {**batch, "pixel_values": torch.stack(pixels), "geometry": torch.tensor(geometries)}

    def _visual(
        self, row: Mapping[str, Any], resolution: tuple[int, int]
    ) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
        medium = "image" if self.num_frames is None else "video"
        try:
            if self.num_frames is not None:
                pixels, geometry, digest = video_pixels(row[medium], self.num_frames, resolution)
                key = content_key((geometry[1], geometry[0]), digest)
            else:
                image = open_image(row[medium])
                pixels, key = to_pixels(image, resolution), content_key(image.size, image.tobytes())
                geometry = (image.height, image.width, *crop_offset(*image.size, resolution))
        except (ImageError, VideoError) as error:
            raise DataError(
                f"The {medium} of row {row['row_id']} ({describe(row[medium])}), which the check before training "
                f"opened, cannot be opened now: {error.cause}, {error}. Put the file back; {medium}s must stay in "
                "place and unchanged while a run reads them."
            ) from error
        if row.get("image_key", key) != key:
            raise DataError(
                f"The {medium} of row {row['row_id']} ({describe(row[medium])}) is another one than the check before "
                "training saw, and the score may not be this one's. Start again: what changed is checked anew. A file "
                "must stay as it is while a run reads it."
            )
        return pixels, geometry


def decode_prompts(prompt_bytes: torch.Tensor, prompt_length: torch.Tensor) -> list[str]:
    """
    Return the prompts of a batch.

    Args:
        prompt_bytes (`torch.Tensor`): (B, L) uint8, UTF-8 padded with zeros, on any device.
        prompt_length (`torch.Tensor`): (B,) integers, in bytes.
    """
    rows = prompt_bytes.cpu().numpy()
    return [row[:length].tobytes().decode("utf-8") for row, length in zip(rows, prompt_length.tolist(), strict=True)]
