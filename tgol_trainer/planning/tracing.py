"""Count what a computation holds in memory and how much it computes, as PyTorch's dispatcher sees it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """
    Count the bytes of every storage that is made inside the block, for as long as it lives.

    A storage counts once however many tensors share it. What was there before, such as the weights, does not count,
    nor do numbers that come from Python, nor what a kernel uses and frees by itself. Works on real tensors and on
    those of [`without_memory`].

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
        if func is _aten.lift_fresh.default:  # numbers of Python, such as tokens
            return result
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
def without_memory(shares: int = 1) -> Iterator[None]:
    """
    Make every tensor of the block one without memory: shapes, dtypes and graph are real.

    They pretend to be on a CPU. There, as on a GPU, attention is one operator that keeps no matrix of tokens by
    tokens; the meta device would have one. Whole numbers that come from constants alone, such as a prompt's tokens and
    the places of an image, are computed beside it. Other values do not exist: code that asks for one gets 1, or an
    array of zeros. transformers is kept from seeing that it is traced.

    Args:
        shares (`int`, *optional*, defaults to 1):
            Among how many masks without values the rows are shared out, such as those of experts: evenly.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _WholeNumbers(shares), _Arrays(), _as_real_to_transformers():
        yield


@contextlib.contextmanager
def _as_real_to_transformers() -> Iterator[None]:
    """Have transformers read masks, as in a run: where it sees that it is traced, it masks prompts without padding."""
    from transformers.utils import import_utils

    known = getattr(import_utils, "is_fake_tensor", None)
    if known is None:  # in a later transformers, whose encoders may be planned with a mask too many
        yield
        return
    import_utils.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = known


_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put)
_LARGE = 2**20
"""Elements from which on a tensor of whole numbers, such as a mask of tokens by tokens, is not computed."""


class _WholeNumbers(TorchDispatchMode):
    """Keep whole numbers beside tensors without memory (`whole`), and answer with them what asks for values."""

    def __init__(self, shares: int) -> None:
        super().__init__()
        self._shares = shares

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.equal.default:  # whether a prompt was cut, of which the pipeline would warn
            return True
        if func._overloadpacket in _INDEXING:
            args = args[0], [place for each in args[1] for place in self._places(each)], *args[2:]
        known = _is_known(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not _aten._local_scalar_dense.default:
                raise
            return _computed(func, args, kwargs) if known else 1
        except DynamicOutputShapeException:
            if not known and func is not _aten.bincount.default:
                raise
            whole = _computed(func, args, kwargs) if known else self._evenly(args[0].numel())
            result = torch.empty(whole.shape, dtype=whole.dtype)
            vars(result)["whole"] = whole
            return result
        made = [each for each in tree_leaves(result) if isinstance(each, FakeTensor)]
        # Masks too that are handed on as floats, such as HunyuanVideo 1.5's.
        known &= all(_is_small(each) and (_is_whole(each) or func is _aten._to_copy.default) for each in made)
        values = tree_leaves(_computed(func, args, kwargs)) if known and made else [None] * len(made)
        for each, value in zip(made, values, strict=True):
            vars(each)["whole"] = value
        return result

    def _places(self, index: Any) -> Sequence[Any]:
        """Return an index, a mask as numbers of the rows that it picks."""
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
            return [index]
        if (whole := _whole(index)) is not None:
            with _disable_current_modes():
                return whole.nonzero(as_tuple=True)
        rows = torch.zeros(index.numel() // self._shares, dtype=torch.int64)
        return [rows] * index.dim()

    def _evenly(self, rows: int) -> torch.Tensor:
        with _disable_current_modes():
            return torch.full((self._shares,), rows // self._shares)


def _is_known(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation takes known numbers alone, and makes the same of them each time."""
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    wholes = [_whole(each) for each in given]
    if any(each is None or each.is_meta or not _is_small(each) for each in wholes):
        return False
    arbitrary = torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name
    return not arbitrary and str(kwargs.get("device") or "cpu") == "cpu"


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a tensor; `None` where they are not known."""
    return vars(tensor).get("whole") if isinstance(tensor, FakeTensor) else tensor


def _is_small(value: torch.Tensor) -> bool:
    return value.numel() < _LARGE


def _is_whole(value: torch.Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call an operation on the numbers themselves."""
    args, kwargs = tree_map(lambda each: _whole(each) if isinstance(each, torch.Tensor) else each, (args, kwargs))
    with _disable_current_modes():
        return func(*args, **kwargs)


class _Arrays(TorchFunctionMode):
    """Answer `tensor.numpy()`, such as Meissonic's positions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not torch.Tensor.numpy:
            return func(*args, **(kwargs or {}))
        if (whole := _whole(args[0])) is None:
            return np.zeros(args[0].shape, str(args[0].dtype).removeprefix("torch."))
        with _disable_current_modes():
            return whole.numpy()
