"""
Losses that are quadratic in the change of the prediction.

For models that predict noise or a velocity. With `e = v_ref - v`, the reference's prediction minus the target, and
`D = v_θ - v_ref`, all as means over the elements of a sample, the errors differ by a linear and a quadratic part:

    |v_θ - v|² - |v_ref - v|² = 2⟨e, D⟩ + |D|²

Only the linear part depends on the sample's target, and so it alone carries what a score says. `|D|²`, the `change`
below, is the squared distance from the reference; its mean over samples is the drift.
"""

from __future__ import annotations

import torch

from .base import LossRecord, check_vectors


def linear_change(error: torch.Tensor, reference_error: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """
    Return `2⟨e, D⟩`, the part of the change of a sample's error that is linear in the change of its prediction.

    Args:
        error (`torch.Tensor`): (B,) the policy's mean squared error.
        reference_error (`torch.Tensor`): (B,) the reference's, on the same draw.
        change (`torch.Tensor`): (B,) mean squared difference of the two predictions, |D|².

    Returns:
        `torch.Tensor`: (B,) float32.
    """
    check_vectors(error=error, reference_error=reference_error, change=change)
    return error.float() - reference_error.float() - change.float()


def anchored_loss(
    error: torch.Tensor,
    reference_error: torch.Tensor,
    change: torch.Tensor,
    advantage: torch.Tensor,
    *,
    anchor: float = 1.0,
    value: torch.Tensor | None = None,
) -> LossRecord:
    """
    Move the prediction along the score's covariance with the target: `(2(a - V)⟨e, D⟩ + λ|D|²)/|e|`.

    It is convex for any a. Where predictions are free its minimum is `D = Cov(a, v | x_t)/λ`, for a reference that
    predicts the mean target. To first order in 1/λ that is the optimum of the reward under a KL penalty, with λ as the
    penalty's strength. The division by |e|, the root of the reference's error, evens out the times: without it the
    times whose targets are hardest to predict, the last steps of sampling, carry most of the gradient.

    V, the `value`, is what the noised latents x_t tell of a. Where the reference predicts the mean target, `V·e` is 0
    on average at every x_t: V lowers the noise of the gradient, and moves its mean only by what |e| varies there.

    For models of masked tokens, whose error is a cross-entropy, `change` is the KL divergence from the reference. What
    is left of the change of the error is then exactly linear in the logits.

    Args:
        error (`torch.Tensor`): (B,) the policy's mean squared error, with gradient.
        reference_error (`torch.Tensor`): (B,) the reference's, on the same draw.
        change (`torch.Tensor`): (B,) |D|², with gradient.
        advantage (`torch.Tensor`): (B,) a = (s - τ)/sd, in standard deviations of the scores.
        anchor (`float`, *optional*, defaults to 1.0): λ > 0.
        value (`torch.Tensor`, *optional*): (B,) V, in the unit of the advantage; by default 0.

    Returns:
        [`LossRecord`]: 0 while policy and reference agree. `implicit_reward` is `-2⟨e, D⟩/(λ|e|)`, `weight` is |a|.
    """
    linear = linear_change(error, reference_error, change)
    check_vectors(error=error, advantage=advantage)
    advantage, size = advantage.float(), reference_error.float().sqrt()
    counted = advantage if value is None else advantage - value.float()
    loss = (counted * linear + anchor * change.float()) / size
    return LossRecord(loss, -linear / (anchor * size), advantage >= 0, advantage.abs())


def dspo_loss(
    error: torch.Tensor,
    reference_error: torch.Tensor,
    change: torch.Tensor,
    scores: torch.Tensor,
    groups: torch.Tensor,
    *,
    strength: float = 0.01,
) -> LossRecord:
    """
    Direct score preference optimization on the pairs that scores make within a group.

    As in its authors' code for Stable Diffusion 1.5 (github.com/huaishengzhu/DSPO, `train.py`). For a winner w and a
    loser l, with m the mean squared error and B the strength,

        u = -(B/2)·[(m_w - m_l) - (m_ref,w - m_ref,l)]
        L = |(v_θ - v) - B(1 - σ(u))(v_θ - v_ref)|², the mean over the winner's elements

    The prediction of L is `v_ref + c·D` with `c = 1 - B(1 - σ(u))`, so that `L = m_ref + 2c⟨e, D⟩ + c²|D|²`. The
    gradient passes through u too, as it does there. A sample's loss is the mean over the pairs it wins.

    Args:
        error (`torch.Tensor`): (B,) the policy's mean squared error, with gradient.
        reference_error (`torch.Tensor`): (B,) the reference's; a pair should share noise and time.
        change (`torch.Tensor`): (B,) |D|², with gradient.
        scores (`torch.Tensor`): (B,) scores; a difference of 0 makes no pair.
        groups (`torch.Tensor`): (B,) integers; equal ones form a group.
        strength (`float`, *optional*, defaults to 0.01): B > 0; the authors use 0.001 to 0.05.

    Returns:
        [`LossRecord`]: while policy and reference agree, the loss is the reference's error where the sample wins a
        pair, else 0. `implicit_reward` is `-B/2` times the change of the error, `label` and `weight` say who wins.
    """
    linear = linear_change(error, reference_error, change)
    check_vectors(error=error, scores=scores, groups=groups)
    gain = error.float() - reference_error.float()
    wins = (groups[:, None] == groups[None, :]) & (scores[:, None] > scores[None, :])
    share = 1 - strength * torch.sigmoid(0.5 * strength * (gain[:, None] - gain[None, :]))  # 1 - σ(u) = σ(-u)
    losses = reference_error.float()[:, None] + share * linear[:, None] + share**2 * change.float()[:, None]
    count = wins.sum(1)
    loss = torch.where(wins, losses, 0.0).sum(1) / count.clamp(min=1)
    return LossRecord(loss, -0.5 * strength * gain, count > 0, (count > 0).float())
