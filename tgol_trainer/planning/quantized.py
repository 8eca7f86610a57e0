"""Stand-ins without weights for what bitsandbytes and torchao make of linear layers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

_BLOCK, _BLOCK_OF_BLOCKS = 64, 256
"""Weights that share a scale, and scales that share one where they are quantised too (bitsandbytes' defaults)."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """
    How linear layers are quantised, in the words of `diffusers.BitsAndBytesConfig`.

    Args:
        bits (`int`): 4 or 8.
        double (`bool`, *optional*, defaults to `False`): Quantise the scales of 4-bit weights too.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): What 4-bit layers compute in.
        torchao (`str`, *optional*): `"int8"` or `"float8"`: by torchao, weights alone, and not by bitsandbytes.
    """

    bits: int
    double: bool = False
    compute_dtype: torch.dtype = torch.float32
    torchao: str | None = None


class QuantizedLinear(torch.nn.Linear):
    """
    A linear layer that takes the memory of `bnb.nn.Linear4bit`, `bnb.nn.Linear8bitLt` or a weight of torchao.

    Args:
        layer (`torch.nn.Linear`): The layer that it stands for; on the meta device.
        quantization ([`Quantization`]): How.
    """

    def __init__(self, layer: torch.nn.Linear, quantization: Quantization) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.quantization = layer.in_features, layer.out_features, quantization
        numel = layer.weight.numel()
        if quantization.bits == 8:
            self.weight = _frozen(numel, torch.int8)
            sizes = {"scales": (self.out_features, torch.float32)}
            if quantization.torchao == "int8":
                sizes |= {"zero_points": (self.out_features, torch.int8)}
        else:
            self.weight = _frozen((numel + 1) // 2, torch.uint8)
            blocks = math.ceil(numel / _BLOCK)
            sizes = {"code": (16, torch.float32), "scales": (blocks, torch.float32)}
            if quantization.double:
                scales = {"scales": (blocks, torch.uint8), "offset": (1, torch.float32)}
                above = {"code_of_scales": (256, torch.float32)}
                above |= {"scales_of_scales": (math.ceil(blocks / _BLOCK_OF_BLOCKS), torch.float32)}
                sizes |= scales | above
        for name, (length, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(length, dtype=dtype, device="meta"))
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply; the weights exist in full only for as long as a pass of this layer takes."""
        if self.quantization.torchao:  # of which autograd keeps the small ones
            return _ProductOfFullWeights.apply(inputs, self.out_features, self.bias)
        if self.quantization.bits == 8:
            return _Product8Bit.apply(inputs, self.out_features, self.bias)
        dtype, given = self.quantization.compute_dtype, inputs.dtype
        bias = self.bias.to(dtype) if self.bias is not None else None
        product = _ProductOfFullWeights.apply(inputs.to(dtype), self.out_features, bias).to(given)
        return product.clone()  # as PEFT's layer does


class _ProductOfFullWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.shape = out_features, inputs.shape[-1]
        return functional.linear(inputs, inputs.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


class _Product8Bit(torch.autograd.Function):
    """Inputs are rounded to 8 bits by way of float16 and kept; the product is an int32 before it is scaled."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.shape = out_features, inputs.shape[-1]
        ctx.save_for_backward(inputs)
        rounded = inputs.to(torch.float16).to(torch.int8)
        product = functional.linear(inputs, inputs.new_empty(1).expand(ctx.shape))
        whole = torch.empty_like(product, dtype=torch.int32)
        del rounded, whole
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


def quantize(network: ModelMixin | PreTrainedModel, quantization: Quantization) -> None:
    """Replace the linear layers of a network on the meta device that diffusers or transformers would quantise."""
    kept = {*(network._keep_in_fp32_modules or ()), "lm_head"}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not kept.intersection(name.split(".")):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, QuantizedLinear(layer, quantization))


def _frozen(length: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(length, dtype=dtype, device="meta"), requires_grad=False)
