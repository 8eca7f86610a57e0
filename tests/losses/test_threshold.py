"""The loss, held against the formula in float64 and against hand-worked numbers."""

import math

import numpy as np
import pytest
import torch

from tgol_trainer.losses import threshold_guided_loss
from tgol_trainer.thresholds import confidence_weights


def reference_loss(log_ratio, scores, threshold, beta, c):
    """Eq. 10 with sigma written out, in float64: another route than logsigmoid."""
    sigma = 1 / (1 + np.exp(-beta * log_ratio))
    label = (scores >= threshold).astype(np.float64)
    weight = 1 + c * np.abs(scores - threshold)
    return -weight * (label * np.log(sigma) + (1 - label) * np.log(1 - sigma)), label, weight, sigma


def test_three_examples_by_hand():
    """
    β = 2, c = 3, τ = 1. Scores 1, 0.5, 3: labels 1, 0, 1; weights 1, 2.5, 7.
    Log-ratios ln(3)/2, ln(3)/2, 0: σ(ŝ) = 3/4, 3/4, 1/2.
    Losses -ln(3/4), -2.5·ln(1/4), -7·ln(1/2).
    """
    half_log_3 = math.log(3) / 2
    margin = torch.tensor([1.0, 0.5, 3.0]) - 1.0
    weight = confidence_weights(margin, scale=3.0)
    record = threshold_guided_loss(torch.tensor([half_log_3, half_log_3, 0.0]), margin, weight, beta=2.0)
    assert record.label.tolist() == [True, False, True]
    assert record.weight.tolist() == [1.0, 2.5, 7.0]
    expected = [math.log(4 / 3), 2.5 * math.log(4), 7 * math.log(2)]
    assert record.loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert record.implicit_reward.tolist() == pytest.approx([math.log(3), math.log(3), 0.0], rel=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_loss_and_gradient_match_the_float64_formula(beta):
    rng = np.random.default_rng(0)
    log_ratio, scores, threshold, c = rng.normal(size=200), rng.normal(size=200), 0.1, 5.0
    expected, label, weight, sigma = reference_loss(log_ratio, scores, threshold, beta, c)
    tensor = torch.tensor(log_ratio, dtype=torch.float32, requires_grad=True)
    margin = torch.tensor(scores - threshold)
    record = threshold_guided_loss(tensor, margin, confidence_weights(margin, scale=c), beta=beta)
    np.testing.assert_allclose(record.loss.detach().numpy(), expected, rtol=2e-5)
    record.loss.sum().backward()
    # d/dr of -w·(l·log σ(βr) + (1-l)·log(1-σ(βr))) is w·β·(σ - l)
    np.testing.assert_allclose(tensor.grad.numpy(), weight * beta * (sigma - label), rtol=2e-5, atol=1e-6)


def test_the_loss_at_zero_log_ratio_is_the_mean_weight_times_ln_2():
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    weights = 1 + 5 * (scores - 0.3).abs()
    record = threshold_guided_loss(torch.zeros(1000), scores - 0.3, weights)
    assert record.loss.mean().item() == pytest.approx(weights.mean().item() * math.log(2), rel=1e-6)


def test_a_score_equal_to_the_threshold_is_positive():
    tiny = torch.finfo(torch.float32).tiny
    record = threshold_guided_loss(torch.zeros(3), torch.tensor([0.0, -tiny, tiny]), torch.ones(3))
    assert record.label.tolist() == [True, False, True]


@pytest.mark.parametrize("label_side", [1.0, -1.0])
def test_a_saturated_log_ratio_keeps_a_finite_loss_and_its_gradient(label_side):
    wrong = torch.tensor([-label_side * 1e4], requires_grad=True)
    record = threshold_guided_loss(wrong, torch.tensor([label_side]), torch.ones(1))
    record.loss.sum().backward()
    assert record.loss.item() == pytest.approx(1e4)
    assert wrong.grad.item() == pytest.approx(-label_side)


def test_positives_push_the_log_ratio_up_and_negatives_down():
    log_ratio = torch.zeros(2, requires_grad=True)
    threshold_guided_loss(log_ratio, torch.tensor([1.0, -1.0]), torch.ones(2)).loss.sum().backward()
    assert log_ratio.grad[0] < 0 < log_ratio.grad[1]


def test_half_precision_log_ratios_give_a_float32_loss():
    record = threshold_guided_loss(
        torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1.0, -1.0]), torch.ones(2, dtype=torch.float64)
    )
    assert record.loss.dtype == record.weight.dtype == record.implicit_reward.dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2,), (3,), (2,)), ((2,), (2,), (3,)), ((2, 1), (2, 1), (2, 1)), ((), (), ())])
def test_shapes_other_than_one_vector_each_are_refused(shapes):
    with pytest.raises(ValueError, match=r"must all be \(B,\)"):
        threshold_guided_loss(*(torch.zeros(shape) for shape in shapes))
