"""Compile the blocks that a denoiser repeats, for training and not for generating."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import ModelMixin


def compile_blocks(denoiser: ModelMixin, backend: str | None = None, mode: str | None = None) -> bool:
    """
    Compile each repeated block of a denoiser in place.

    A block is compiled once for the policy and once for the reference, and for all blocks of its kind: switching the
    adapter compiles nothing again.

    Args:
        denoiser (`diffusers.ModelMixin`): Changed in place; its parameters keep their names.
        backend (`str`, *optional*): As in `torch.compile`.
        mode (`str`, *optional*): As in `torch.compile`.

    Returns:
        `bool`: `False` for a model whose class does not name its blocks, of which nothing is compiled.
    """
    # SD3's class names its blocks for placing them on devices only.
    names = denoiser._repeated_blocks or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    for block in blocks:
        block.compile(backend=backend or "inductor", mode=mode)
    return bool(blocks)


def uncompiled(denoiser: torch.nn.Module) -> AbstractContextManager[None]:
    """Run a block of code without compiling: images are drawn at sizes that no step has."""
    if all(module._compiled_call_impl is None for module in denoiser.modules()):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
