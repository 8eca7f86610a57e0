"""Encode the images and prompts of a run once, and keep the result on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from tgol_trainer.data import Collator, ScoredDataset
from tgol_trainer.families import Conditioning, ModelFamily
from tgol_trainer.fingerprint import component_fingerprint

from .filling import Encoded, EncodedPrompts, Workers, fill
from .store import TensorStore, key_of, keys_of

_VERSION = 3
"""Raise it when the same image or prompt is encoded to something else."""
_MIRROR = np.frombuffer(bytearray(key_of("mirrored")), dtype=np.uint64)


class EncodingCache:
    """
    Keep what the autoencoder and the text encoders make of images and prompts in safetensors files.

    An entry is found again by the content of image or prompt, size and preprocessing, and of the networks' weights and
    the tokenizers' files, so it is never stale. Every image and every distinct prompt is encoded by itself, as
    training without a cache does, so both give the same. A job that was killed continues.

    Args:
        family ([`ModelFamily`]): The model that encodes.
        folder (`Path`): Folder of the cache. Runs may share it. It may be deleted between runs.
        collator ([`Collator`]): Turns rows into pixels.
        workers ([`Workers`], *optional*): Processes that share the work.
    """

    def __init__(
        self, family: ModelFamily, folder: Path | str, collator: Collator, workers: Workers | None = None
    ) -> None:
        self.family, self.collator, self.workers = family, collator, workers or Workers()
        self.medium = "image" if collator.num_frames is None else "video"
        pipeline, kind = family.pipeline, type(family).__name__
        autoencoder = component_fingerprint(getattr(pipeline, family.autoencoder_name))
        self.folder = Path(folder)
        self._images: dict[tuple[int, int], TensorStore] = {}
        self.image_key = key_of(_VERSION, kind, autoencoder, collator.num_frames or 0).hex()
        parts = [
            component_fingerprint(component)
            for name, component in pipeline.components.items()
            if name.startswith(("text_encoder", "tokenizer", "processor")) and component is not None
        ]
        # Settings of the pipeline itself, such as how SDXL encodes an empty prompt.
        settings = {
            name: value
            for name, value in pipeline.config.items()
            if name not in pipeline.components and not name.startswith("_")
        }
        prompts = key_of(_VERSION, kind, str(family.token_limits), str(sorted(settings.items())), *parts)
        # Prompts have lengths of their own, or are padded with zeros (Wan), which need no space.
        self.prompts = TensorStore(Path(folder) / f"prompts-{prompts.hex()}", ragged=True)

    # ---- Reading ----

    def images(self, resolution: tuple[int, int]) -> TensorStore:
        """Return the images of one (height, width)."""
        if resolution not in self._images:
            height, width = resolution
            self._images[resolution] = TensorStore(self.folder / f"{self.medium}s-{self.image_key}-{height}x{width}")
        return self._images[resolution]

    def read_images(self, keys: np.ndarray, mirrored: Sequence[bool], resolution: tuple[int, int]) -> Encoded:
        """
        Return what the autoencoder made of images, on the CPU.

        Args:
            keys (`numpy.ndarray`): (B, 2) uint64, the images' keys; see [`data.ScoredDataset`].
            mirrored (`Sequence[bool]`): B times, whether the mirror image is wanted.
            resolution (`tuple[int, int]`): Their height and width.

        Returns:
            `dict[str, torch.Tensor]`: B rows, as [`ModelFamily.encode`] returns them.
        """
        return self.images(resolution).read(np.where(np.asarray(mirrored)[:, None], keys ^ _MIRROR, keys))

    def read_prompts(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Return N rows for N prompts, as [`ModelFamily.encode_prompts`] returns them, on the CPU."""
        return self.prompts.read_rows(keys_of(prompts))

    # ---- Filling ----

    def add(self, rows: ScoredDataset, prompts: Iterable[str], *, mirrored: bool = False) -> None:
        """
        Encode the images of rows, and prompts, as far as they are missing. Every process must call it.

        Args:
            rows ([`ScoredDataset`]): Rows whose images are wanted.
            prompts (`Iterable[str]`): Every prompt that training will ask for.
            mirrored (`bool`, *optional*, defaults to `False`): Encode the mirror image of each image too.

        Raises:
            OSError: if the disk does not hold what is missing.
            DataError: for an image that can no longer be opened.
            FloatingPointError: for an image or prompt of which a network makes NaN or infinity.
        """
        family = self.family
        texts = list(dict.fromkeys(prompts))
        keys = keys_of(texts)

        def encode_prompts(wanted: np.ndarray) -> Iterator[EncodedPrompts]:
            with family.present(*family.text_encoder_names, alone=True):
                for index in wanted:
                    encoded = family.encode_prompts([texts[index]])
                    _check_finite(encoded.values(), "A text encoder", f"the prompt {texts[index]!r}")
                    yield encoded

        fill(self.prompts, keys, encode_prompts, "prompt", self.workers)

        rows = copy.copy(rows)
        rows.encoded = False
        sizes = rows.resolutions if rows.resolutions is not None else np.full((len(rows), 2), self.collator.resolution)
        for height, width in np.unique(sizes, axis=0).tolist():
            of_size = np.flatnonzero((sizes == (height, width)).all(axis=1))
            self._add_images(rows, of_size, (height, width), mirrored)

    def _add_images(
        self, rows: ScoredDataset, of_size: np.ndarray, resolution: tuple[int, int], mirrored: bool
    ) -> None:
        """Encode the images of the (M,) rows of one size."""
        family = self.family
        image_keys, first = np.unique(rows.image_keys[of_size], axis=0, return_index=True)
        order = np.argsort(first)  # in the order of the rows, which is that on the disk
        image_keys, first = image_keys[order], of_size[first[order]]

        def encode_images(wanted: np.ndarray, mirror: bool = False) -> Iterator[Encoded]:
            loader = DataLoader(
                Subset(rows, first[wanted].tolist()),
                batch_size=1,
                collate_fn=self.collator,
                num_workers=self.workers.num_loaders,
                generator=torch.Generator(),  # else filling would draw from the global one
            )
            with family.present(family.autoencoder_name, alone=True):
                for batch in loader:
                    pixels = batch["pixel_values"]
                    encoded = family.encode(pixels.flip(-1) if mirror else pixels)
                    row = f"the {self.medium} of row {batch['row_id'].item()}"
                    _check_finite(encoded.values(), "The autoencoder", row)
                    yield encoded

        store = self.images(resolution)
        fill(store, image_keys, encode_images, self.medium, self.workers)
        if mirrored:
            mirror = lambda wanted: encode_images(wanted, mirror=True)  # noqa: E731
            fill(store, image_keys ^ _MIRROR, mirror, f"mirrored {self.medium}", self.workers)


def _check_finite(made: Iterable[Iterable[torch.Tensor]], network: str, what: str) -> None:
    """Refuse what is not finite of that which a network made, row by row: a loss of NaN would not name it."""
    for values in chain.from_iterable(made):
        if values.is_floating_point() and not torch.isfinite(values).all():
            dtype = str(values.dtype).removeprefix("torch.")
            raise FloatingPointError(
                f"{network} makes NaN or infinity of {what}, in {dtype}. Load the model in another dtype: float16 "
                "overflows in some autoencoders and text encoders, bfloat16 and float32 do not. If it is this row "
                "alone, look at it and leave it out."
            )


def encode_batch(
    family: ModelFamily,
    cache: EncodingCache | None,
    inputs: dict[str, torch.Tensor],
    prompts: list[str],
    mirrored: Sequence[bool],
) -> tuple[Conditioning, Encoded]:
    """
    Return the conditioning and the encoded images of a batch, from the cache where its rows are in it.

    Args:
        family ([`ModelFamily`]): The model.
        cache ([`EncodingCache`], *optional*): The cache.
        inputs (`dict[str, torch.Tensor]`): A batch of [`data.Collator`].
        prompts (`list[str]`): B prompts.
        mirrored (`Sequence[bool]`): B times, whether the mirror image is wanted.

    Returns:
        `tuple[Conditioning, dict[str, torch.Tensor]]`: what [`ModelFamily.condition`] and
        [`ModelFamily.encode`] return.
    """
    height, width = inputs["resolution"][0].tolist()
    encoded = encode_images(family, cache, inputs, mirrored)
    read = cache.read_prompts if cache is not None and "image_key" in inputs else None
    return family.condition(prompts, inputs["geometry"], (height, width), read), encoded


def encode_images(
    family: ModelFamily, cache: EncodingCache | None, inputs: dict[str, torch.Tensor], mirrored: Sequence[bool]
) -> Encoded:
    """Return the encoded images of a batch alone; arguments as those of [`encode_batch`]."""
    if cache is not None and "image_key" in inputs:
        height, width = inputs["resolution"][0].tolist()
        return cache.read_images(inputs["image_key"].cpu().numpy().view(np.uint64), mirrored, (height, width))
    images = zip(inputs["pixel_values"], mirrored, strict=True)
    return family.encode(torch.stack([image.flip(-1) if mirror else image for image, mirror in images]))
