"""Count what a computation holds in memory and how much it computes, as PyTorch's dispatcher sees it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """
    Count the bytes of every storage that is made inside the block, for as long as it lives.

    A storage counts once however many tensors share it. What was there before, such as the weights, does not count,
    nor does what a kernel uses and frees by itself. Works on real tensors and on those of [`without_memory`].

    Attributes:
        now (`int`): Bytes that are alive.
        peak (`int`): Most bytes that were alive at once, since the block or [`~LiveBytes.restart`] began.
        flops (`int`): Floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given: set[int] | None = None
        for storage in _storages(result):
            if storage._cdata in self._known:
                continue
            if given is None:  # what was there before comes back from operations in place
                given = {each._cdata for each in _storages((args, kwargs))}
            if storage._cdata not in given:
                self._count(storage)
        self.flops += _flops(func, args, kwargs, result)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    return (each.untyped_storage() for each in tree_leaves(value) if isinstance(each, torch.Tensor))


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    # PyTorch has formulas for attention on a GPU. The operators of the CPU have the same first arguments.
    packet = func._overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(each.shape for each in args[:3]))
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(each.shape for each in args[:4]))
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula else 0


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """
    Make every tensor of the block one without memory: shapes, dtypes and graph are real, values do not exist.

    They pretend to be on a CPU. There, as on a GPU, attention is one operator that keeps no matrix of tokens by
    tokens; the meta device would have one. Code that asks for a value gets 1, or an array of zeros; one that
    picks rows by a mask gets all.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _AnyNumber(), _AnyArray():
        yield


class _AnyNumber(TorchDispatchMode):
    """Answer `tensor.item()`, such as the length of a prompt in Wan's pipeline, and whether a prompt was cut: no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func not in (_aten._local_scalar_dense.default, _aten.equal.default):
                raise
            return 1


class _AnyArray(TorchFunctionMode):
    """
    Answer `tensor.numpy()`, such as Meissonic's positions, and `torch.split` by the lengths of Qwen's prompts.

    A mask lets every row through.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.numpy:
            return np.zeros(args[0].shape, dtype=str(args[0].dtype).removeprefix("torch."))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].dim() - 1)
        if func is torch.split and isinstance(args[1], list):
            return args[0].chunk(len(args[1]), **(kwargs or {}))
        return func(*args, **(kwargs or {}))
