"""Losses on the linear part of a change of the prediction: each from predictions, by hand, and at a change of zero."""

import math

import pytest
import torch
import torch.nn.functional as F

from tgol_trainer.losses import (
    anchored_loss,
    dspo_loss,
    nft_loss,
)

TARGET = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
REFERENCE = torch.tensor([[0.5, 0.5], [0.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
POLICY = torch.tensor([[0.75, 0.5], [1.0, 1.0], [2.0, 0.0], [0.5, 1.0]])
GROUPS = torch.tensor([0, 0, 1, 1])


def passed(policy=POLICY):
    """Errors of policy and reference, and the squared change, as means over the two elements of each row."""
    return [((a - b) ** 2).mean(1) for a, b in ((policy, TARGET), (REFERENCE, TARGET), (policy, REFERENCE))]


def numbers(tensor):
    return pytest.approx(tensor.tolist(), rel=1e-6, abs=1e-7)


def inner(policy=POLICY):
    """2⟨e, D⟩ from the predictions themselves."""
    return (2 * (REFERENCE - TARGET) * (policy - REFERENCE)).mean(1)


def mistake():
    """|e|, the root of the reference's mean squared error, from the predictions: ½, √½, √½, √½."""
    return (REFERENCE - TARGET).norm(dim=1) / math.sqrt(2)


def test_the_anchored_loss_is_the_inner_product_times_the_advantage_and_the_anchor_times_the_change_over_the_mistake():
    """Row 0: e = (-½, ½), D = (¼, 0): 2⟨e, D⟩ = -⅛, |D|² = 1/32, |e| = ½. With a = 2, λ = 4: (-¼ + ⅛)/½."""
    advantage = torch.tensor([2.0, -1.0, 0.0, 0.5])
    record = anchored_loss(*passed(), advantage, anchor=4.0)
    assert record.loss[0].item() == pytest.approx(-0.25)
    assert record.loss.tolist() == numbers((advantage * inner() + 4.0 * passed()[2]) / mistake())
    assert record.implicit_reward.tolist() == numbers(-inner() / (4.0 * mistake()))
    assert record.label.tolist() == [True, False, True, True]


def test_the_anchored_loss_is_least_at_minus_a_over_lambda_times_the_references_mistake_and_convex_for_both_signs():
    """One row alone: D = -(a/λ)·e. Its second derivative is 2λ/(n|e|) whatever the sign of a."""
    for sign in (1.0, -3.0):
        policy = REFERENCE.clone().requires_grad_(True)
        errors = [((policy - TARGET) ** 2).mean(1), passed()[1], ((policy - REFERENCE) ** 2).mean(1)]
        loss = anchored_loss(*errors, torch.full((4,), sign), anchor=2.0).loss.sum()
        (slope,) = torch.autograd.grad(loss, policy)
        step = -slope / (2 * 2.0 / (2 * mistake()[:, None]))
        assert step.flatten().tolist() == numbers((-(sign / 2.0) * (REFERENCE - TARGET)).flatten())


def test_dspo_is_the_error_of_the_winners_corrected_prediction():
    """Two pairs. With B = 2, u = -(change of the winner's error - change of the loser's), the paper's code by hand."""
    scores = torch.tensor([1.0, 0.0, 3.0, 5.0])
    error, reference_error, change = passed()
    record = dspo_loss(error, reference_error, change, scores, GROUPS, strength=2.0)
    for winner, loser in ((0, 1), (3, 2)):
        gain = error - reference_error
        u = -(2.0 / 2) * (gain[winner] - gain[loser])
        corrected = (POLICY[winner] - TARGET[winner]) - 2.0 * (1 - torch.sigmoid(u)) * (
            POLICY[winner] - REFERENCE[winner]
        )
        assert record.loss[winner].item() == pytest.approx((corrected**2).mean().item(), rel=1e-6)
    assert record.loss[1].item() == record.loss[2].item() == 0
    assert record.label.tolist() == [True, False, False, True]


def test_dspo_has_no_pairs_across_groups_or_among_equal_scores():
    record = dspo_loss(*passed(), torch.tensor([1.0, 1.0, 2.0, 2.0]), GROUPS)
    assert record.loss.tolist() == [0, 0, 0, 0] and record.weight.tolist() == [0, 0, 0, 0]


def test_nft_with_a_wider_range_of_scores_clips_later():
    """Scores 1 and 7 sd above τ, range 5: r = ½ + ½·⅕ and 1. Errors 1 and 3: 3 - 2r."""
    ones, margin = torch.ones(2), torch.tensor([1.0, 7.0])
    record = nft_loss(ones, 3 * ones, torch.zeros(2), margin, 1.0, score_range=5.0)
    assert record.loss.tolist() == pytest.approx([3 - 1.2, 1.0])


def test_the_anchored_loss_is_what_nft_adds_to_the_references_error():
    """r = ½ + a/2 and v± = v_ref ± b·D: r·m⁺ + (1 - r)·m⁻ = m_ref + a·b·2⟨e, D⟩ + b²|D|²; |e| divides it here."""
    advantage, mix = torch.tensor([0.5, -0.25, 1.0, 0.0]), 0.3
    moved = [((REFERENCE + sign * mix * (POLICY - REFERENCE) - TARGET) ** 2).mean(1) for sign in (1, -1)]
    expected = nft_loss(*moved, torch.zeros(4), advantage, 1.0).loss - passed()[1]
    assert anchored_loss(*passed(), advantage * mix, anchor=mix**2).loss.tolist() == numbers(expected / mistake())
    assert F.mse_loss(POLICY, TARGET).item() == pytest.approx(passed()[0].mean().item())
