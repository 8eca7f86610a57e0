"""Draws, errors and log-likelihoods, held against the formulas and against diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from tests.tiny import stable_diffusion
from tgol_trainer.families import load_family
from tgol_trainer.likelihoods import DiffusionLikelihood, RowGenerators, log_likelihood

LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(ids=(0, 1, 2), seed=0, step=0):
    return RowGenerators(seed, step, ids)


def likelihood(prediction_type="epsilon"):
    return DiffusionLikelihood(DDPMScheduler(prediction_type=prediction_type))


def test_a_row_draws_the_same_numbers_wherever_it_stands_in_the_batch():
    batch, alone = likelihood().draw(LATENTS, rows()), likelihood().draw(LATENTS[2:], rows([2]))
    assert torch.equal(batch.inputs[2:], alone.inputs)
    assert torch.equal(batch.timesteps[2:], alone.timesteps)
    assert torch.equal(batch.target[2:], alone.target)


@pytest.mark.parametrize("other", [rows(seed=1), rows(step=1), rows([7, 8, 9])])
def test_another_seed_step_or_row_draws_other_numbers(other):
    first, second = likelihood().draw(LATENTS, rows()), likelihood().draw(LATENTS, other)
    assert not torch.equal(first.target, second.target)


def test_purposes_do_not_share_numbers():
    assert not torch.equal(rows().uniform("flip"), rows().uniform("caption"))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    likelihood().draw(LATENTS, rows())
    assert torch.equal(before, torch.get_rng_state())


def test_negative_and_huge_row_ids_are_keys_too():
    keys = [-1, 0, 2**62, -(2**62)]
    assert len(set(rows(keys).uniform("x").tolist())) == 4


def test_timesteps_are_uniform_over_the_schedule():
    timesteps = rows(range(20_000)).integers("timestep", 1000).float()
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    # Standard error of the mean is 1000/√12/√20000 = 2.04; of the share below a tenth 0.0021.
    assert timesteps.mean().item() == pytest.approx(499.5, abs=8)
    assert (timesteps < 100).float().mean().item() == pytest.approx(0.1, abs=0.009)


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


def test_the_error_is_the_mean_squared_difference_over_all_but_the_batch():
    drawn = likelihood().draw(LATENTS, rows())
    prediction = torch.randn_like(LATENTS)
    expected = [((prediction[i] - drawn.target[i]) ** 2).sum().item() / 256 for i in range(3)]
    assert likelihood().error(prediction, drawn).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_error_of_a_bfloat16_prediction_is_computed_in_float32():
    drawn = likelihood().draw(LATENTS, rows())
    prediction = drawn.target.bfloat16()
    expected = ((prediction.float() - drawn.target) ** 2).flatten(1).mean(1)
    error = likelihood().error(prediction, drawn)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, expected, rtol=0, atol=0)


def test_the_log_likelihood_divides_by_the_temperature_only_where_it_applies():
    error = torch.tensor([0.5, 0.25])
    assert log_likelihood(likelihood(), error, 0.001).tolist() == pytest.approx([-500, -250])
    masked = type("Masked", (), {"temperature_applies": False})()
    assert log_likelihood(masked, error, 0.001).tolist() == [-0.5, -0.25]


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
