"""Keep the frozen weights of a denoiser's blocks off the device, or in 8 bits, except while the block runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from diffusers import ModelMixin


class Weight(NamedTuple):
    """A weight of a block: where it belongs, and what is kept of it."""

    module: torch.nn.Module
    name: str
    kept: torch.Tensor
    dtype: torch.dtype
    absent: Parameter


class StoredBlocks:
    """
    Swap the weights of a network's blocks in while a block runs, and out again.

    A block is what gradient checkpointing recomputes, so the recomputation in the backward pass brings the weights
    again. A block gets new tensors for each pass, so what autograd keeps of them stays what it was. The block that
    followed the last time is copied ahead, on a CUDA stream of its own.

    diffusers' group offloading does not serve: it moves the adapter and its gradients' place with the block, and its
    prefetch goes on in forward order in the backward pass, which leaves every block on the device.

    While a block does not run, NaN of no size stands in for each of its weights, so nothing else can use them unseen;
    `state_dict` has what is kept.

    Args:
        network (`diffusers.ModelMixin`): The denoiser, without adapters; changed in place.
        device (`torch.device`): Where it computes.
        offload (`bool`): Keep the weights on the CPU, in pinned memory where the device is a GPU.
        storage_dtype (`str`, *optional*):
            Keep matrices in it, as diffusers' layerwise casting does, with the same layers left out; they are cast to
            their own dtype for each pass.

    Raises:
        ValueError: for a quantised network, and for one without blocks that can be recomputed.
    """

    def __init__(
        self, network: ModelMixin, device: torch.device, offload: bool, storage_dtype: str | None = None
    ) -> None:
        self.network, self.device, self.offload = network, device, offload
        self.stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None
        if getattr(network, "hf_quantizer", None) is not None:
            raise ValueError("`group_offload` and `storage_dtype` do not go with a quantised denoiser: leave one out.")
        blocks = _blocks(network)
        if not blocks:
            raise ValueError(
                f"`group_offload` and `storage_dtype` need blocks that are recomputed in the backward pass, and "
                f"{type(network).__name__} has none: leave them out."
            )
        skip, storage = skipped_layers(network), getattr(torch, storage_dtype) if storage_dtype else None
        self.weights = [
            [
                self._keep(module, name, parameter, None if skip.search(f"{prefix}.{inner}") else storage)
                for inner, module in block.named_modules()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]
            for prefix, block in blocks.items()
        ]
        self._ahead: tuple[int, list[torch.Tensor]] | None = None
        self._last = (-1, -1)
        self._following: dict[tuple[int, int], int] = {}
        for number, block in enumerate(blocks.values()):
            block.forward = functools.partial(self._run, number, block.forward)

    @property
    def bytes_saved(self) -> int:
        """Bytes that the device holds less while no block runs."""
        whole = sum(map(_size, self.weights))
        return whole if self.offload else whole - sum(each.kept.nbytes for block in self.weights for each in block)

    @property
    def bytes_ahead(self) -> int:
        """Bytes of the block that is copied ahead, at most."""
        return max(map(_size, self.weights)) if self.offload and len(self.weights) > 1 else 0

    def leave_to_this_process(self) -> None:
        """
        Have `DistributedDataParallel` leave the blocks' weights alone, which every process has loaded for itself.

        It would write into what stands in for them. To be called when the network has its adapters, which rename them.
        """
        absent = {id(weight.absent) for block in self.weights for weight in block}
        names = [name for name, parameter in self.network.named_parameters() if id(parameter) in absent]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.network, names)

    def replace_kept(self, make: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Keep other tensors instead, and compute on another device."""
        self.device = device
        self.weights = [[weight._replace(kept=make(weight.kept)) for weight in block] for block in self.weights]

    def _keep(
        self, module: torch.nn.Module, name: str, parameter: Parameter, storage_dtype: torch.dtype | None
    ) -> Weight:
        kept, dtype = parameter.detach(), parameter.dtype
        # HiDream's gate has a `weight` of its own, which diffusers' layerwise casting leaves alone.
        layers = torch.nn.Linear | torch.nn.Embedding | torch.nn.modules.conv._ConvNd
        matrix = name == "weight" and isinstance(module, layers)
        if storage_dtype is not None and matrix and dtype.itemsize > storage_dtype.itemsize:
            kept = kept.to(storage_dtype)
        if not self.offload:
            kept = kept.to(self.device)
        elif self.stream is not None:
            kept = kept.cpu().pin_memory()
        nothing = torch.full((), torch.nan, dtype=dtype, device=self.device)
        absent = Parameter(nothing.expand(parameter.shape), requires_grad=False)
        module._parameters[name] = absent

        def add(module: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
            state_dict[prefix + name] = kept

        module.register_state_dict_post_hook(add)
        return Weight(module, name, kept, dtype, absent)

    def _run(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors = self._fetched(number)
        for weight, tensor in zip(self.weights[number], tensors, strict=True):
            weight.module._parameters[weight.name] = Parameter(tensor, requires_grad=False)
        del tensors
        if self.offload:
            self._fetch_ahead(number)
        try:
            return forward(*args, **kwargs)
        finally:  # also when the recomputation stops early, by an exception
            for weight in self.weights[number]:
                weight.module._parameters[weight.name] = weight.absent

    def _fetch(self, number: int) -> list[torch.Tensor]:
        with torch.cuda.stream(self.stream):  # None: the current one
            return [
                each.kept.to(self.device, non_blocking=True, copy=self.offload).to(each.dtype)
                for each in self.weights[number]
            ]

    def _fetched(self, number: int) -> list[torch.Tensor]:
        ahead, self._ahead = self._ahead, None
        tensors = ahead[1] if ahead is not None and ahead[0] == number else self._fetch(number)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in tensors:
                tensor.record_stream(current)
        return tensors

    def _fetch_ahead(self, number: int) -> None:
        """Copy the block that came next when these two followed each other before, forward or backward."""
        before, last = self._last
        self._following[before, last] = number
        self._last = (last, number)
        following = self._following.get(self._last)
        if following is not None and following != number:
            self._ahead = following, self._fetch(following)


def _size(block: list[Weight]) -> int:
    return sum(each.kept.numel() * each.dtype.itemsize for each in block)


def skipped_layers(network: ModelMixin) -> re.Pattern[str]:
    """Return what the names of layers contain that keep their dtype under diffusers' layerwise casting."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    own = (*(network._keep_in_fp32_modules or ()), *(network._skip_layerwise_casting_patterns or ()))
    return re.compile("|".join((*DEFAULT_SKIP_MODULES_PATTERN, *own)))


def _blocks(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the items of lists in modules that checkpoint, unless an item has such a module inside, by name."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in network.named_modules():
        if not hasattr(module, "gradient_checkpointing"):
            continue
        for child, blocks in module.named_children():
            if isinstance(blocks, torch.nn.ModuleList):
                found |= {f"{name}.{child}.{number}".lstrip("."): block for number, block in enumerate(blocks)}
    return {
        name: block
        for name, block in found.items()
        if not any(hasattr(module, "gradient_checkpointing") for module in block.modules())
    }
