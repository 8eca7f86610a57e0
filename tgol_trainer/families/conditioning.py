"""Join what prompts were encoded to, at their own lengths, to the keyword arguments of one call of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from tgol_trainer.likelihoods import to_device

Rows: TypeAlias = Mapping[str, torch.Tensor | list[torch.Tensor]]
"""N encoded prompts: for each keyword of the denoiser N tensors (L, ...), or one tensor (N, L, ...)."""

Conditioning: TypeAlias = dict[str, torch.Tensor | list[torch.Tensor]]
"""Keyword arguments of the denoiser for a batch: tensors (B, ...), or lists of B tensors."""


def join(
    rows: Rows,
    index: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    list_arguments: Sequence[str] = (),
    mask_argument: str | None = None,
) -> Conditioning:
    """
    Return the keyword arguments of a batch whose row b has the prompt `index[b]`.

    Args:
        rows (`Mapping[str, torch.Tensor | list[torch.Tensor]]`): N encoded prompts.
        index (`Sequence[int]`): B numbers of prompts.
        device (`torch.device`): Where the denoiser computes.
        dtype (`torch.dtype`): That of the denoiser. Integers and booleans keep theirs.
        list_arguments (`Sequence[str]`, *optional*):
            Keywords that stay lists. Others of different lengths are padded with zeros.
        mask_argument (`str`, *optional*):
            Keyword of the mask (B, L) bool that is true where a row is not padded; given where any row is.

    Returns:
        `dict[str, torch.Tensor | list[torch.Tensor]]`

    Raises:
        ValueError: where prompts have different lengths and there is no mask.
    """
    place = to_device(torch.tensor(index), device)
    joined: Conditioning = {}
    lengths: list[int] = []
    for name, tensors in rows.items():
        kind = dtype if tensors[0].is_floating_point() else tensors[0].dtype
        if name in list_arguments:
            moved = [to_device(tensor, device).to(kind) for tensor in tensors]
            joined[name] = [moved[number] for number in index]
            continue
        if len({len(tensor) if tensor.dim() else 0 for tensor in tensors}) > 1:
            lengths = [len(tensor) for tensor in tensors]
        joined[name] = to_device(pad(tensors), device).to(kind)[place]
    if lengths:
        if mask_argument is not None:
            mask = [torch.ones(length, dtype=torch.bool) for length in lengths]
            joined[mask_argument] = to_device(pad(mask), device)[place]
        elif all(tensors[0].is_floating_point() for tensors in rows.values()):
            raise ValueError(
                f"Prompts have different lengths ({', '.join(map(str, lengths))} tokens), and no mask tells "
                "the denoiser which tokens are padding."
            )
    return joined


def pad(rows: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack N tensors (L, ...), shorter ones with zeros at the end."""
    if isinstance(rows, torch.Tensor):
        return rows
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def real_tokens(embeddings: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return those of the tokens (L, D) of each of N prompts (N, L, D) that a mask (N, L) says are no padding."""
    return [tokens[keep] for tokens, keep in zip(embeddings, mask.bool(), strict=True)]


def tensor_of(conditioning: Conditioning, name: str) -> torch.Tensor:
    """Return a keyword argument that is one tensor (B, ...)."""
    value = conditioning[name]
    return torch.stack(value) if isinstance(value, list) else value
