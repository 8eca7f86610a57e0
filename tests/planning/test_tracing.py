"""Counting live bytes: what counts, for how long, and that tensors without memory are counted like real ones."""

import contextlib

import pytest
import torch
from transformers.masking_utils import sdpa_mask

from tgol_trainer.planning.networks import forget_weights
from tgol_trainer.planning.tracing import LiveBytes, without_memory

both = pytest.mark.parametrize("mode", [contextlib.nullcontext, without_memory], ids=["real", "without memory"])


@both
def test_a_storage_counts_once_from_its_first_tensor_to_its_last_and_what_was_there_does_not(mode):
    """Three tensors of 1000 float32, at most two of them at once beside the one from before."""
    with mode():
        before = torch.ones(1000)
        with LiveBytes() as live:
            first = before * 2
            view, flat = first.view(10, 100), first[5:]
            assert (live.now, live.peak) == (4000, 4000)
            before.add_(1)
            tokens = torch.tensor([[7] * 1000])
            second = first + 1
            assert (live.now, live.peak) == (8000, 8000)
            del first, view
            assert live.now == 8000  # `flat` holds it
            del flat, tokens
            assert (live.now, live.peak) == (4000, 8000)
            live.restart()
            assert live.peak == 4000
            del second
    assert live.now == 0


@both
def test_a_linear_layer_keeps_its_input_for_the_backward_pass_and_makes_one_gradient(mode):
    """
    y = (2·x)·Wᵀ, x (8, 100), W (50, 100): 2·x lives on for W's gradient, 3200 bytes, until that of 20000 is made.

    Operations: 2·8·100·50 forward, as many again for W's gradient.
    """
    with mode():
        layer, inputs = torch.nn.Linear(100, 50, bias=False), torch.ones(8, 100)
        with LiveBytes() as live:
            loss = layer(2 * inputs).sum()
            assert live.now == 3200 + 4
            loss.backward()
            del loss
        assert live.now == 20000
    assert live.flops == 2 * 80_000


def test_attention_without_memory_keeps_no_matrix_of_tokens_by_tokens():
    """Queries, keys, values and output are 4 · 2 MiB, the matrix alone would be 256 MiB."""
    with without_memory():
        inputs = torch.empty(1, 8, 4096, 64, dtype=torch.bfloat16, requires_grad=True)
        with LiveBytes() as live:
            torch.nn.functional.scaled_dot_product_attention(inputs, inputs, inputs).sum().backward()
    assert live.peak < 32 * 2**20
    # 2·T²·d for each of two products of 8 heads forward and of five backward
    assert live.flops == 7 * 2 * 4096**2 * 64 * 8


def test_whole_numbers_from_constants_are_computed_and_select_what_they_do_with_memory():
    """Of masks, also as floats, `nonzero`, `repeat_interleave`, slices, and gradients through them."""

    def shapes():
        places = torch.arange(12)
        mask = places[None] >= 5
        tokens = torch.ones(12, 3, requires_grad=True)
        long = tokens.repeat_interleave(torch.where(mask, 4, 1)[0], dim=0)
        filled = torch.zeros(9, 3).index_put((torch.tensor([True] * 7 + [False] * 2),), tokens[mask[0]])
        filled.sum().backward()
        head = tokens[: int(mask.sum())]
        hidden = tokens[~mask[0].to(tokens.dtype).bool()]
        return [each.shape for each in (long, hidden, mask[0].nonzero(), filled, tokens.grad, head)]

    with without_memory():
        found = shapes()
    assert found == shapes() == [(33, 3), (5, 3), (7, 1), (9, 3), (12, 3), (7, 3)]


@pytest.mark.parametrize(("num_padded", "is_masked"), [(0, False), (1, True)])
def test_transformers_masks_tokens_by_tokens_only_where_there_is_padding_as_it_does_with_memory(num_padded, is_masked):
    def mask():
        padding = torch.arange(6)[None] < 6 - num_padded
        return sdpa_mask(batch_size=1, q_length=6, kv_length=6, attention_mask=padding)

    with without_memory():
        found = mask()
    assert (found is not None) == (mask() is not None) == is_masked


def test_a_tensor_that_is_an_attribute_of_a_layer_is_there_before_a_pass_as_its_weights_are():
    with torch.device("meta"):
        layer = torch.nn.Linear(3, 3)
        layer.table = torch.empty(5)
    with without_memory():
        forget_weights(layer)
        with LiveBytes() as live:
            layer(torch.empty(2, 3)), layer.table.to("cpu")
    assert live.peak == (2 * 3 + 2 * 3) * 4


def test_masks_without_values_share_out_the_rows():
    with without_memory(shares=4):
        expert = torch.empty(24, 5).topk(2, dim=-1).indices.view(-1)
        assert torch.empty(48, 3)[expert == 1].shape == (12, 3)
        assert expert.bincount().numpy().tolist() == [12] * 4


def test_code_that_asks_for_a_value_gets_one():
    with without_memory():
        length = torch.empty(3).sum()
        assert torch.empty(7)[: length.long()].shape == (1,)
        assert torch.empty(2, 3, dtype=torch.float64).numpy().tolist() == [[0.0] * 3] * 2
        assert torch.equal(torch.empty(3), torch.empty(5))  # such as whether a tokenizer cut a prompt: no
