"""What all likelihoods share: draws, random numbers keyed by row, and the protocol of a likelihood."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Draw:
    """
    One random choice of noise and time (or mask), made once and used for policy and reference alike.

    Args:
        inputs (`torch.Tensor`):
            (B, ...) what the network sees: the noised latents in the latents' dtype, or token ids.
        timesteps (`torch.Tensor`): (B,) times as the network takes them.
        target (`torch.Tensor`): (B, ...) what the network should predict: float32, or token ids.
        mask (`torch.Tensor`, *optional*): (B, ...) bool, the positions that count; `None` for all.
        noise_level (`torch.Tensor`, *optional*):
            (B,) float32 from 0 to 1: t/T, σ or the share of masked tokens; it is only logged.
    """

    inputs: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor | None = None
    noise_level: torch.Tensor | None = None


class RowGenerators:
    """
    One random generator for each row, keyed by (seed, purpose, step, row id).

    Nothing is drawn from the global generator, so the numbers a row gets do not depend on its place in the batch, on
    the batch size, the number of processes or workers, or on what else drew before: resuming, splitting a batch and
    adding processes leave them as they are. Numbers are drawn on the CPU in float32 and moved, so they also agree
    between devices.

    Args:
        seed (`int`): The run's seed.
        step (`int`): The optimizer step; any fixed number for evaluation.
        row_ids (`Sequence[int]`): B ids, each in [-2^63, 2^63).
    """

    def __init__(self, seed: int, step: int, row_ids: Sequence[int]) -> None:
        self.seed, self.step, self.row_ids = seed, step, tuple(row_ids)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return B fresh CPU generators; the same purpose gives the same numbers again."""
        keys = [f"{self.seed}|{purpose}|{self.step}|{row_id}".encode() for row_id in self.row_ids]
        digests = [hashlib.blake2b(key, digest_size=8).digest() for key in keys]
        return [torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1) for digest in digests]

    def normal(self, purpose: str, like: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers in the shape (B, ...) and on the device of `like`, float32."""
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators(purpose)]
        return to_device(torch.stack(drawn), like.device)

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """(B,) int64 numbers, uniform on 0 .. high - 1, on the CPU."""
        return torch.stack([torch.randint(high, (), generator=generator) for generator in self.generators(purpose)])

    def uniform(self, purpose: str) -> torch.Tensor:
        """(B,) float32 numbers, uniform on [0, 1), on the CPU."""
        return torch.stack([torch.rand((), generator=generator) for generator in self.generators(purpose)])


class Likelihood(Protocol):
    """
    How one kind of generative model scores a sample.

    A likelihood is a value without parameters. `error` is what the paper calls the surrogate: smaller is likelier.
    """

    temperature_applies: bool
    """Whether the log-likelihood is the error over T (continuous models) or the error alone (masked tokens)."""

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Draw noise and time, or masked positions, once for policy and reference alike.

        Args:
            latents (`torch.Tensor`): (B, ...) scaled latents, or token ids.
            rows ([`RowGenerators`]): Source of every random number.

        Returns:
            [`Draw`]
        """
        ...

    def error(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Return the (B,) float32 error of a prediction (B, ...) of any dtype."""
        ...

    def targets(self, latents: torch.Tensor, rows: RowGenerators) -> dict[str, torch.Tensor]:
        """
        Return what networks of this kind predict on the draw of the same arguments, this one's own target first.

        Each (B, ...) float32, by a name for a message. Empty where there is one kind of target only.
        """
        ...

    def change(self, prediction: torch.Tensor, reference: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Return how far a prediction is from the reference's on the same draw: (B,) float32, 0 where they agree."""
        ...

    def denoised(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """
        Return the clean latents that a prediction (B, ...) implies: float32, of the same shape.

        Raises:
            ValueError: for models of masked tokens.
        """
        ...


class SquaredError:
    """The error of models that predict noise, velocity or clean latents."""

    temperature_applies = True

    def error(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Mean squared error over all dimensions but the first: (B,) float32, computed in float32."""
        return ((prediction.float() - draw.target) ** 2).flatten(1).mean(1)

    def change(self, prediction: torch.Tensor, reference: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Mean squared difference of two predictions: (B,) float32."""
        return ((prediction.float() - reference.float()) ** 2).flatten(1).mean(1)


def per_row(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Give values (B,) the device and the number of dimensions of latents (B, ...)."""
    return to_device(values, latents.device).view(-1, *[1] * (latents.dim() - 1))


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    Copy a tensor to a device without waiting for what the device computes.

    A copy to a GPU waits for all work before it, unless it starts from pinned memory. A step that waits for nothing
    prepares the next pass while the device is busy with the last one.
    """
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type not in ("cpu", "mps"))


def log_likelihood(likelihood: Likelihood, error: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Surrogate log-likelihood from an error (paper, Sec. 3.5): `-error / T`, or `-error` where T does not apply.

    Args:
        likelihood ([`Likelihood`]): The likelihood that computed the error.
        error (`torch.Tensor`): (B,) float32.
        temperature (`float`): T > 0, in the unit of the error.

    Returns:
        `torch.Tensor`: (B,) float32.
    """
    return -error / temperature if likelihood.temperature_applies else -error
