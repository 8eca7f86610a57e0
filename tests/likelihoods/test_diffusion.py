"""Draws, errors and log-likelihoods, held against the formulas and against diffusers' own scheduler."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from tests.tiny import stable_diffusion
from tgol_trainer.families import load_family
from tgol_trainer.likelihoods import DiffusionLikelihood, RowGenerators

LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(ids=(0, 1, 2), seed=0, step=0):
    return RowGenerators(seed, step, ids)


def likelihood(prediction_type="epsilon"):
    return DiffusionLikelihood(DDPMScheduler(prediction_type=prediction_type))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_inputs_and_targets_are_those_of_diffusers_scheduler(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")
    drawn = DiffusionLikelihood(scheduler).draw(LATENTS, rows())
    noise = rows().normal("noise", LATENTS)
    torch.testing.assert_close(drawn.inputs, scheduler.add_noise(LATENTS, noise, drawn.timesteps))
    expected = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(LATENTS, noise, drawn.timesteps),
        "sample": LATENTS,
    }
    torch.testing.assert_close(drawn.target, expected[prediction_type])
    assert drawn.noise_level.tolist() == pytest.approx((drawn.timesteps / 1000).tolist())


def test_the_error_is_the_mean_squared_difference_over_all_but_the_batch():
    drawn = likelihood().draw(LATENTS, rows())
    prediction = torch.randn_like(LATENTS)
    expected = [((prediction[i] - drawn.target[i]) ** 2).sum().item() / 256 for i in range(3)]
    assert likelihood().error(prediction, drawn).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_prediction_type_is_named():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"flow_prediction.*epsilon, v_prediction, sample"):
        DiffusionLikelihood(scheduler)


@pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_training_schedule_does_not_depend_on_the_sampler_or_on_generation(sampler):
    pipe = stable_diffusion()
    expected = load_family(pipe).likelihood.alphas_cumprod
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(5)
    assert torch.equal(load_family(pipe).likelihood.alphas_cumprod, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_true_target_implies_the_clean_latents_and_no_signal_implies_nothing(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    found = DiffusionLikelihood(scheduler)
    drawn = found.draw(LATENTS, rows())
    torch.testing.assert_close(found.denoised(drawn.target, drawn), LATENTS, rtol=1e-3, atol=1e-3)
    last = torch.full((3,), 999)  # nothing but noise
    blind = dataclasses.replace(drawn, timesteps=last, inputs=torch.ones_like(LATENTS))
    expected = {"epsilon": 0.0, "v_prediction": -2.0, "sample": 2.0}[prediction_type]
    torch.testing.assert_close(
        found.denoised(torch.full_like(LATENTS, 2.0), blind), torch.full_like(LATENTS, expected)
    )
