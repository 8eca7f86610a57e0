"""The masked-token likelihood: what is masked, and the error at masked positions, held against plain loops."""

import math

import pytest
import torch

from tgol_trainer.likelihoods import Draw, MaskedTokenLikelihood, RowGenerators

MASK, CODES = 33, 32
IDS = torch.randint(CODES, (3, 4, 5), generator=torch.Generator().manual_seed(0))
LOGITS = 3 * torch.randn(3, CODES, 4, 5, generator=torch.Generator().manual_seed(1))
LIKELIHOOD = MaskedTokenLikelihood(MASK)


def rows(ids=(0, 1, 2), seed=0, step=0):
    return RowGenerators(seed, step, ids)


def test_masked_positions_hold_the_mask_id_and_the_others_the_image():
    drawn = LIKELIHOOD.draw(IDS, rows())
    assert drawn.mask.dtype == torch.bool
    assert drawn.inputs.dtype == torch.int64
    for row in range(3):
        for y in range(4):
            for x in range(5):
                expected = MASK if drawn.mask[row, y, x] else IDS[row, y, x]
                assert drawn.inputs[row, y, x] == expected
    assert torch.equal(drawn.target, IDS)


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_the_number_of_masked_positions_is_the_rounded_share_of_the_cosine_schedule_and_at_least_one(floor):
    keys = rows(range(200))
    drawn = MaskedTokenLikelihood(MASK, min_masking_rate=floor).draw(IDS[:1].expand(200, -1, -1), keys)
    assert drawn.noise_level.tolist() == pytest.approx((drawn.timesteps / 1000).tolist())
    counts = drawn.mask.flatten(1).sum(1).tolist()
    for u, time, count in zip(keys.uniform("mask_ratio").tolist(), drawn.timesteps.tolist(), counts, strict=True):
        ratio = max(math.sin((1 - u) * math.pi / 2), floor)
        assert time == pytest.approx(1000 * ratio, abs=1e-3)
        assert abs(count - max(1, 20 * ratio)) <= 0.5 + 1e-4
    assert min(counts) == max(1, round(20 * floor)) or floor == 0.0


def test_the_mask_ratio_has_the_moments_of_a_cosine_of_a_uniform_angle():
    """E[cos(πU/2)] = 2/π, E[cos²] = 1/2; P(r < 1/2) = 1/3."""
    ratio = LIKELIHOOD.draw(IDS[:1].expand(20_000, -1, -1), rows(range(20_000))).timesteps / 1000
    assert ratio.mean().item() == pytest.approx(2 / math.pi, abs=0.009)
    assert (ratio**2).mean().item() == pytest.approx(0.5, abs=0.01)
    assert (ratio < 0.5).float().mean().item() == pytest.approx(1 / 3, abs=0.013)


def test_every_position_is_masked_equally_often():
    shares = LIKELIHOOD.draw(IDS[:1].expand(5_000, -1, -1), rows(range(5_000))).mask.float().mean(0)
    assert shares.flatten().tolist() == pytest.approx([2 / math.pi] * 20, abs=0.04)


def test_the_error_is_the_mean_negative_log_probability_of_the_true_codes_at_masked_positions():
    drawn = LIKELIHOOD.draw(IDS, rows())
    for row, error in enumerate(LIKELIHOOD.error(LOGITS, drawn).tolist()):
        surprises = []
        for y in range(4):
            for x in range(5):
                if drawn.mask[row, y, x]:
                    values = LOGITS[row, :, y, x].tolist()
                    partition = sum(math.exp(value) for value in values)
                    surprises.append(-math.log(math.exp(values[IDS[row, y, x]]) / partition))
        assert error == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)


def test_visible_positions_do_not_count_whatever_the_network_says_there():
    drawn = LIKELIHOOD.draw(IDS, rows())
    visible = ~drawn.mask[:, None].expand_as(LOGITS)
    nonsense = torch.where(visible, math.inf, LOGITS)
    assert torch.equal(LIKELIHOOD.error(nonsense, drawn), LIKELIHOOD.error(LOGITS, drawn))
    logits = LOGITS.clone().requires_grad_()
    LIKELIHOOD.error(logits, drawn).sum().backward()
    assert (logits.grad[visible] == 0).all()


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_masking_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match="min_masking_rate"):
        MaskedTokenLikelihood(MASK, min_masking_rate=rate)


def test_a_draw_of_another_likelihood_is_refused():
    with pytest.raises(ValueError, match="no mask"):
        LIKELIHOOD.error(LOGITS, Draw(IDS, torch.zeros(3), IDS))


def test_the_change_is_the_mean_divergence_of_the_references_codes_at_masked_positions():
    drawn = LIKELIHOOD.draw(IDS, rows())
    reference = LOGITS.flip(0)
    codes = [torch.distributions.Categorical(logits=each.movedim(1, -1)) for each in (reference, LOGITS)]
    divergence = torch.distributions.kl_divergence(*codes)
    expected = [divergence[row][drawn.mask[row]].mean().item() for row in range(3)]
    assert LIKELIHOOD.change(LOGITS, reference, drawn).tolist() == pytest.approx(expected, rel=1e-5)
    assert LIKELIHOOD.change(LOGITS, LOGITS, drawn).tolist() == [0, 0, 0]
