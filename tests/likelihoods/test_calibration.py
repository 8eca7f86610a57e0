"""Log-ratios in units of the reference's error, by hand, and unchanged by the unit of the prediction."""

import math

import pytest
import torch

from tgol_trainer.likelihoods import ErrorProfile, calibrated_log_ratio, relative_log_ratio


def test_a_profile_is_the_mean_error_in_equal_bins_of_time_and_the_mean_of_all_where_a_bin_is_empty():
    """Times 0 to 100 in four bins: 1 and 3 in the first, 8 in the last one with time 100; the mean of all is 4."""
    profile = ErrorProfile.measure(torch.tensor([0, 24, 100]), torch.tensor([1.0, 3.0, 8.0]), 100, num_bins=4)
    assert profile.means.tolist() == [2, 4, 4, 8]
    assert profile.scale(torch.tensor([10.0, 30.0, 99.0])).tolist() == [2, 4, 8]
    assert profile.scale(torch.tensor([10.0, 99.0]), power=0).tolist() == [4.5, 4.5]
    assert profile.scale(torch.tensor([99.0]), power=0.5).item() == pytest.approx(math.sqrt(8 * 4.5))


def test_calibrated_log_ratios_by_hand_and_the_same_in_any_unit():
    """(3 - 1)/(0.5·2) = 2. Predictions ten times larger have errors a hundred times larger, and so has the scale."""
    error, reference_error, scale = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0])
    for unit in (1.0, 100.0):
        found = calibrated_log_ratio(unit * error, unit * reference_error, unit * scale, 0.5)
        assert found.item() == pytest.approx(2.0)
        assert relative_log_ratio(unit * error, unit * reference_error, 0.5).item() == pytest.approx(2 * math.log(3))


def test_the_relative_log_ratio_at_two_over_n_is_that_of_gaussians_with_fitted_variance():
    """n = 8 elements, log-densities at each model's best variance, from torch's own normal distribution."""
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(2, 8, generator=generator) * torch.tensor([[1.0], [2.0]])
    densities = [
        torch.distributions.Normal(0.0, row.square().mean().sqrt()).log_prob(row).sum().item() for row in residuals
    ]
    errors = residuals.square().mean(1)
    found = relative_log_ratio(errors[:1], errors[1:], 2 / 8)
    assert found.item() == pytest.approx(densities[0] - densities[1], rel=1e-5)
