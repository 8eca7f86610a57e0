"""
Losses that are quadratic in the change of the prediction, and a log-ratio without its quadratic part.

For models that predict noise or a velocity. With `e = v_ref - v`, the reference's prediction minus the target, and
`D = v_θ - v_ref`, all as means over the elements of a sample, the errors differ by a linear and a quadratic part:

    |v_θ - v|² - |v_ref - v|² = 2⟨e, D⟩ + |D|²

Only the linear part depends on the sample's target, and so it alone carries what a score says. `|D|²`, the `change`
below, is the squared distance from the reference; its mean over samples is the drift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


def symmetric_log_ratio(
    error: torch.Tensor, reference_error: torch.Tensor, change: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """
    Half the difference of the log-likelihoods of `v_ref + D` and `v_ref - D`: `-2⟨e, D⟩/T`.

    The log-ratio itself is `-(2⟨e, D⟩ + |D|²)/T`. Its second part is never positive, so a loss that lowers the
    log-ratio of negatives is paid for moving away in any direction. Here that part is gone, and a loss that is convex
    in the log-ratio is convex in the prediction. Nothing then holds the policy where the log-ratio does not, so add a
    multiple of `change` to the loss.

    Args:
        error (`torch.Tensor`): (B,) the policy's mean squared error.
        reference_error (`torch.Tensor`): (B,) the reference's, on the same draw.
        change (`torch.Tensor`): (B,) |D|².
        temperature (`float`): T > 0, in the unit of the error.

    Returns:
        `torch.Tensor`: (B,) float32 with gradient, to be used as `log_ratio`.
    """
    return -linear_change(error, reference_error, change) / temperature


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


def tilted_loss(
    error: torch.Tensor, reference_error: torch.Tensor, change: torch.Tensor, tilt: torch.Tensor
) -> LossRecord:
    """
    Regress on the optimum of the reward under a KL penalty, from samples of the reference: `2(w - 1)⟨e, D⟩ + w|D|²`.

    With `w = exp((s - τ*(x))/β_r)`, whose mean over samples of the reference is 1, the weighted error `w·|v_θ - v|²`
    is least at the mean target of the optimal policy. It equals `w·|e|² + 2w⟨e, D⟩ + w|D|²`. The first part is
    constant. Of the second, `2⟨e, D⟩` is 0 on average where the reference predicts the mean target of its own samples;
    it is left out, and noise with it: at w = 1 everywhere nothing moves.

    Args:
        error (`torch.Tensor`): (B,) the policy's mean squared error, with gradient.
        reference_error (`torch.Tensor`): (B,) the reference's, on the same draw.
        change (`torch.Tensor`): (B,) |D|², with gradient.
        tilt (`torch.Tensor`): (B,) w >= 0 with a mean of 1.

    Returns:
        [`LossRecord`]: 0 while policy and reference agree. `label` is true where w is at least 1, `weight` is w.
    """
    linear = linear_change(error, reference_error, change)
    check_vectors(error=error, tilt=tilt)
    tilt = tilt.float()
    return LossRecord((tilt - 1) * linear + tilt * change.float(), -linear, tilt >= 1, tilt)


def soft_label_loss(
    log_ratio: torch.Tensor,
    margin: torch.Tensor,
    weight: torch.Tensor,
    *,
    softness: float = 1.0,
    beta: float = 1.0,
) -> LossRecord:
    """
    Eq. 10 of the paper with the label `l = σ((s - τ)/b)` instead of 0 or 1: `-w·(l·log σ(ŝ) + (1 - l)·log(1 - σ(ŝ)))`.

    Its minimum is at `ŝ = (s - τ)/b`, which is finite; with hard labels the loss falls for ever. As b goes to 0 it is
    Eq. 10.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        margin (`torch.Tensor`): (B,) s - τ.
        weight (`torch.Tensor`): (B,) w >= 0.
        softness (`float`, *optional*, defaults to 1.0): b > 0, in the unit of the margin.
        beta (`float`, *optional*, defaults to 1.0): β.

    Returns:
        [`LossRecord`]: at a log-ratio of 0 the loss is `w·ln 2`; `label` is true where the margin is at least 0.
    """
    check_vectors(log_ratio=log_ratio, margin=margin, weight=weight)
    implicit_reward = beta * log_ratio.float()
    share = torch.sigmoid(margin.float() / softness)
    # -l·log σ(ŝ) - (1 - l)·log σ(-ŝ) = softplus(ŝ) - l·ŝ
    loss = weight.float() * (F.softplus(implicit_reward) - share * implicit_reward)
    return LossRecord(loss, implicit_reward, margin >= 0, weight.float())


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
