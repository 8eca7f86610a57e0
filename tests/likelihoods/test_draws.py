"""What all likelihoods share: draws keyed by row, errors in float32, and the temperature."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tgol_trainer.likelihoods import (
    DiffusionLikelihood,
    FlowLikelihood,
    MaskedTokenLikelihood,
    RowGenerators,
    log_likelihood,
)

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
LIKELIHOODS = {
    "diffusion": DiffusionLikelihood(DDPMScheduler()),
    "flow, uniform": FlowLikelihood(FLOW.sigmas, FLOW.timesteps),
    "flow, logit-normal": FlowLikelihood(FLOW.sigmas, FLOW.timesteps, "logit_normal"),
    "masked tokens": MaskedTokenLikelihood(33),
}
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(32, (3, 4, 5), generator=torch.Generator().manual_seed(0))
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)


def rows(ids=(0, 1, 2), seed=0, step=0):
    return RowGenerators(seed, step, ids)


def latents_of(likelihood):
    return IDS if isinstance(likelihood, MaskedTokenLikelihood) else LATENTS


def tensors(drawn):
    return [value for value in vars(drawn).values() if value is not None]


@every_likelihood
def test_a_row_draws_the_same_numbers_wherever_it_stands_in_the_batch(likelihood):
    latents = latents_of(likelihood)
    batch, alone = likelihood.draw(latents, rows()), likelihood.draw(latents[2:], rows([2]))
    assert all(torch.equal(value[2:], other) for value, other in zip(tensors(batch), tensors(alone), strict=True))


@every_likelihood
@pytest.mark.parametrize("other", [rows(seed=1), rows(step=1), rows([7, 8, 9])], ids=["seed", "step", "rows"])
def test_another_seed_step_or_row_draws_other_numbers(likelihood, other):
    latents = latents_of(likelihood)
    first, second = likelihood.draw(latents, rows()), likelihood.draw(latents, other)
    assert not torch.equal(first.inputs, second.inputs)
    assert not torch.equal(first.timesteps, second.timesteps)


@every_likelihood
def test_drawing_leaves_the_global_generator_alone(likelihood):
    before = torch.get_rng_state()
    likelihood.draw(latents_of(likelihood), rows())
    assert torch.equal(before, torch.get_rng_state())


@every_likelihood
def test_the_error_of_a_bfloat16_prediction_is_computed_in_float32(likelihood):
    drawn = likelihood.draw(latents_of(likelihood), rows())
    shape = (3, 32, 4, 5) if drawn.mask is not None else drawn.target.shape
    prediction = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = likelihood.error(prediction, drawn)
    assert error.dtype == torch.float32
    assert torch.equal(error, likelihood.error(prediction.float(), drawn))


@every_likelihood
def test_the_log_likelihood_divides_by_the_temperature_except_for_masked_tokens(likelihood):
    expected = [-0.5, -0.25] if isinstance(likelihood, MaskedTokenLikelihood) else [-500, -250]
    assert log_likelihood(likelihood, torch.tensor([0.5, 0.25]), 0.001).tolist() == pytest.approx(expected)


def test_purposes_do_not_share_numbers():
    assert not torch.equal(rows().uniform("flip"), rows().uniform("caption"))


def test_negative_and_huge_row_ids_are_keys_too():
    keys = [-1, 0, 2**62, -(2**62)]
    assert len(set(rows(keys).uniform("x").tolist())) == 4


def test_timesteps_are_uniform_over_the_schedule():
    timesteps = rows(range(20_000)).integers("timestep", 1000).float()
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    # Standard error of the mean is 1000/√12/√20000 = 2.04; of the share below a tenth 0.0021.
    assert timesteps.mean().item() == pytest.approx(499.5, abs=8)
    assert (timesteps < 100).float().mean().item() == pytest.approx(0.1, abs=0.009)
