"""Weights, losses within groups and rival losses, each by hand and at a log-ratio of zero."""

import math

import numpy as np
import pytest
import torch

from tgol_trainer.losses import (
    kto_loss,
    nft_loss,
    pairwise_threshold_loss,
    preference_loss,
    quantile_regression_loss,
    regression_loss,
    supervised_loss,
    threshold_guided_loss,
)
from tgol_trainer.thresholds import confidence_weights

LN3 = math.log(3)  # σ(ln 3) = 3/4


def close(found, expected):
    assert [float(value) for value in (found.detach() if torch.is_tensor(found) else found)] == pytest.approx(
        expected, rel=1e-6, abs=1e-7
    )


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("linear", [1.0, 3.0, 9.0]),
        ("none", [1.0, 1.0, 1.0]),
        ("abs", [0.0, 1.0, 4.0]),
    ],
)
def test_weights_by_hand(kind, form, expected):
    """c = 2, margins 0, -1, 4."""
    close(confidence_weights(kind([0.0, -1.0, 4.0]), form=form, scale=2.0), expected)


def test_an_unknown_weight_form_is_refused():
    with pytest.raises(ValueError, match="linear, none, abs, got"):
        confidence_weights(np.zeros(1), form="square")


def test_a_centred_pair_under_the_threshold_loss_is_dpo():
    """Two samples of a prompt, log-ratios and scores less the other's: -log σ(β·Δ) for both rows, as DPO's."""
    log_ratio, scores, groups = torch.tensor([0.7, -0.4]), torch.tensor([2.0, 1.0]), torch.tensor([5, 5])
    centred = [values - values.flip(0) for values in (log_ratio, scores)]
    record = threshold_guided_loss(*centred, torch.ones(2), beta=1.5)
    expected = -math.log(1 / (1 + math.exp(-1.5 * 1.1)))
    close(record.loss, [expected, expected])
    close(preference_loss(log_ratio, scores, groups, beta=1.5).loss, [expected, expected])


def test_the_preference_loss_by_hand():
    """
    Group 1: scores 3, 2, 2, rewards ln 3, 0, 0; the tie makes no pair. Group 2: one row.
    Row 0 beats both: softplus(-ln 3) = ln(4/3); rows 1 and 2 lose once: the same; row 3 has no pair.
    """
    record = preference_loss(
        torch.tensor([LN3, 0.0, 0.0, 5.0]), torch.tensor([3.0, 2.0, 2.0, 9.0]), torch.tensor([1, 1, 1, 2])
    )
    close(record.loss, [math.log(4 / 3)] * 3 + [0.0])
    assert record.label.tolist() == [True, False, False, False]
    assert record.weight.tolist() == [1, 1, 1, 0]


def test_gradients_of_the_preference_loss_sum_to_zero_within_a_group():
    log_ratio = torch.randn(8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores, groups = torch.arange(8.0), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    preference_loss(log_ratio, scores, groups).loss.sum().backward()
    assert log_ratio.grad[:4].sum().item() == pytest.approx(0, abs=1e-6)
    assert log_ratio.grad.abs().min() > 0.01


def test_the_pairwise_threshold_loss_by_hand():
    """
    Group 1: scores 3, 2, 2, rewards ln 3, 0, 0. Row 0 is above both: ln(4/3), with weights 1 and 3: 2·ln(4/3).
    Rows 1 and 2 are below row 0, ln(4/3), and equal, ln 2. Row 3 is alone and at τ, which is positive: 2·ln(4/3).
    """
    margins = torch.tensor([3.0, 2.0, 2.0, 0.0])[:, None] - torch.tensor([3.0, 2.0, 2.0, 0.0])[None, :]
    weights = torch.ones(4, 4)
    weights[0, 2], weights[3, 3] = 3.0, 2.0
    record = pairwise_threshold_loss(torch.tensor([LN3, 0.0, 0.0, LN3]), margins, torch.tensor([1, 1, 1, 2]), weights)
    equal = (math.log(4 / 3) + math.log(2)) / 2
    close(record.loss, [2 * math.log(4 / 3), equal, equal, 2 * math.log(4 / 3)])
    close(record.weight, [2, 1, 1, 2])
    close(record.implicit_reward, [LN3, -LN3 / 2, -LN3 / 2, LN3])
    assert record.label.tolist() == [True, False, False, True]
    untrained = pairwise_threshold_loss(torch.zeros(4), margins, torch.tensor([1, 1, 1, 2]), weights)
    close(untrained.loss, [math.log(2) * weight for weight in (2, 1, 1, 2)])


def test_the_pairwise_threshold_loss_with_equal_weights_is_that_of_preferences():
    generator = torch.Generator().manual_seed(0)
    log_ratio, scores = torch.randn(8, generator=generator), torch.randperm(8, generator=generator).float()
    groups, margins = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), scores[:, None] - scores[None, :]
    found = pairwise_threshold_loss(log_ratio, margins, groups, torch.ones(8, 8), beta=1.5)
    close(found.loss, preference_loss(log_ratio, scores, groups, beta=1.5).loss.tolist())


@pytest.mark.parametrize("name", ["margins", "weights"])
def test_the_pairwise_threshold_loss_refuses_what_is_no_square(name):
    square = {"margins": torch.zeros(3, 3), "weights": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"must be \(3, 3\)"):
        pairwise_threshold_loss(torch.zeros(3), groups=torch.zeros(3), **(square | {name: torch.zeros(3)}))


def test_kto_by_hand():
    """
    β = 1; rewards ln 3 and -ln 3 + 2q with q = their mean: choose ln 3 and 0, Q = ln(3)/2.
    Positive: 1 - σ(ln(3)/2) = 1/(1 + √3). Negative: 1 - σ(ln(3)/2), the same. Negative mean: Q = 0.
    """
    expected = 1 / (1 + math.sqrt(3))
    close(kto_loss(torch.tensor([LN3, 0.0]), torch.tensor([0.2, -0.1])).loss, [expected, expected])
    close(kto_loss(torch.tensor([0.0, -LN3]), torch.tensor([0.2, -0.1])).loss, [0.5, 0.25])
    weight = torch.tensor([3.0, 1.0])
    close(kto_loss(torch.zeros(2), torch.tensor([0.0, -1.0]), weight).loss, [1.5, 0.5])


def test_the_reference_point_of_kto_has_no_gradient():
    log_ratio = torch.tensor([1.0, 2.0], requires_grad=True)
    kto_loss(log_ratio, torch.tensor([1.0, 1.0])).loss.sum().backward()
    sigma = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))]  # σ(r - 1.5)
    close(log_ratio.grad, [-s * (1 - s) for s in sigma])


def test_regression_by_hand_and_its_minimum():
    """½·(2·0.5 - 3)² = 2 and ½·(2·(-1) + 2)² = 0: at ŝ = s - τ the gradient vanishes."""
    log_ratio = torch.tensor([0.5, -1.0], requires_grad=True)
    record = regression_loss(log_ratio, torch.tensor([3.0, -2.0]), beta=2.0)
    close(record.loss, [2.0, 0.0])
    record.loss.sum().backward()
    close(log_ratio.grad, [-4.0, 0.0])


@pytest.mark.parametrize("beta", [0.002, 0.1, 1.0, 10.0])
def test_quantile_regression_has_the_partition_function_of_uniform_rewards(beta):
    """β·log ∫₀¹ exp(q/β) dq by the trapezoid rule on 2 million points, shifted by its largest exponent."""
    q = np.linspace(0, 1, 2_000_001)
    values = np.exp((q - 1) / beta)
    log_z = 1 + beta * math.log(((values[1:] + values[:-1]) / 2).mean())
    record = quantile_regression_loss(torch.zeros(3), torch.tensor([0.0, 0.9, 1.0]), beta=beta)
    close(record.loss, [(q - log_z) ** 2 for q in (0.0, 0.9, 1.0)])
    close(quantile_regression_loss(torch.tensor([(1 - log_z) / beta]), torch.ones(1), beta=beta).loss, [0.0])


def test_supervised_losses_by_hand():
    error, margin = torch.tensor([0.3, 0.4]), torch.tensor([0.0, -0.1])
    close(supervised_loss(error, margin).loss, [0.3, 0.0])
    close(supervised_loss(error, margin, positives_only=False).loss, [0.3, 0.4])


def test_nft_by_hand():
    """Z = 2: margins 1, -3, 0 give r = 0.75, 0 (clipped), 0.5."""
    record = nft_loss(
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([2.0, 2.0, 4.0]),
        torch.zeros(3),
        torch.tensor([1.0, -3.0, 0.0]),
        2.0,
    )
    close(record.loss, [0.75 * 1 + 0.25 * 2, 2.0, 2.5])
    close(record.weight, [0.75, 0.0, 0.5])


def test_vectors_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="`log_ratio` and `margin` must all be"):
        kto_loss(torch.zeros(2), torch.zeros(3))
