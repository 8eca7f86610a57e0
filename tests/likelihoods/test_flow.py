"""Flow matching: draws, targets and errors against the formulas and diffusers' scheduler; what SD3 and FLUX add."""

import math
import statistics

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, UniPCMultistepScheduler
from peft import LoraConfig

from tests.tiny import flux, stable_diffusion, stable_diffusion_3
from tgol_trainer import TGOLTrainer, adapters
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.families.flow import flow_schedule
from tgol_trainer.likelihoods import FlowLikelihood, RowGenerators, log_likelihood

LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
VIDEO = torch.randn(3, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0))


def rows(ids=(0, 1, 2), seed=0, step=0):
    return RowGenerators(seed, step, ids)


def likelihood(density="uniform", shift=3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return FlowLikelihood(scheduler.sigmas, scheduler.timesteps, density)


def shares_below(density, levels, count=20_000):
    drawn = likelihood(density, shift=1.0).draw(torch.zeros(count, 1), rows(range(count)))
    return [(drawn.timesteps < 1000 * level).float().mean().item() for level in levels]


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("latents", [LATENTS, VIDEO], ids=["image", "video"])
def test_inputs_are_those_of_diffusers_scheduler_and_the_target_is_noise_minus_latents(density, latents):
    drawn = likelihood(density).draw(latents, rows())
    noise = rows().normal("noise", latents)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(drawn.inputs, scheduler.scale_noise(latents, drawn.timesteps, noise))
    torch.testing.assert_close(drawn.target, noise - latents, rtol=0, atol=0)
    torch.testing.assert_close(likelihood(density).denoised(drawn.target, drawn), latents)
    assert len(set(drawn.timesteps.tolist())) == 3
    assert drawn.noise_level.tolist() == pytest.approx((drawn.timesteps / 1000).tolist())


def test_following_the_target_from_the_noised_latents_leads_to_the_clean_ones():
    """x_t - σ·(ε - x0) = (1-σ)·x0 + σ·ε - σ·ε + σ·x0 = x0, with σ = t/1000."""
    drawn = likelihood().draw(LATENTS, rows())
    sigma = (drawn.timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(drawn.inputs - sigma * drawn.target, LATENTS, rtol=0, atol=1e-5)


def test_the_place_in_the_schedule_is_u_rounded_down_from_the_noisiest_time_on():
    """Shift 1: place i holds the time 1000 - i, so t = 1000 - floor(1000·u)."""
    u = rows().uniform("timestep").tolist()
    drawn = likelihood(shift=1.0).draw(LATENTS, rows())
    assert drawn.timesteps.tolist() == pytest.approx([1000 - math.floor(1000 * value) for value in u])


def test_uniform_times_fall_below_each_level_as_often_as_the_level_says():
    # Standard error of a share of 20,000 is at most 0.0035.
    levels = [0.1, 0.25, 0.5, 0.9]
    assert shares_below("uniform", levels) == pytest.approx(levels, abs=0.012)


def test_logit_normal_times_have_the_distribution_of_a_sigmoid_of_a_normal_number():
    """P(sigmoid(n) < q) = Φ(ln(q / (1 - q)))."""
    levels = [0.1, 0.25, 0.5, 0.9]
    expected = [statistics.NormalDist().cdf(math.log(level / (1 - level))) for level in levels]
    assert shares_below("logit_normal", levels) == pytest.approx(expected, abs=0.012)
    assert expected[0] < 0.02  # far from the uniform 0.1


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_schedule_is_the_shift_of_a_linear_one(shift):
    pipe = stable_diffusion_3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas, timesteps = flow_schedule(pipe)
    linear = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    expected = shift * linear / (1 + (shift - 1) * linear)
    torch.testing.assert_close(sigmas.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(timesteps.double(), 1000 * expected, rtol=1e-6, atol=0)


def test_a_shift_that_depends_on_the_resolution_is_left_out():
    sigmas, _ = flow_schedule(flux())
    torch.testing.assert_close(sigmas, torch.arange(1000, 0, -1) / 1000)


SWAPPED = {
    "UniPC of Wan": lambda flow: UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
    "UniPC made from the flow scheduler": lambda flow: UniPCMultistepScheduler.from_config(flow.config),
    "flow scheduler made from UniPC": lambda flow: FlowMatchEulerDiscreteScheduler.from_config(
        UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0).config
    ),
}


@pytest.mark.parametrize("swap", SWAPPED.values(), ids=SWAPPED)
def test_the_schedule_does_not_depend_on_generation_or_on_the_sampler(swap):
    pipe = stable_diffusion_3()
    expected, _ = flow_schedule(pipe)
    pipe.scheduler.set_timesteps(5)
    assert torch.equal(flow_schedule(pipe)[0], expected)
    pipe.scheduler = swap(pipe.scheduler)
    assert torch.equal(flow_schedule(pipe)[0], expected)


def test_a_scheduler_that_knows_nothing_of_flows_is_refused():
    pipe = stable_diffusion_3()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"DDIMScheduler is not a scheduler for flow matching.*pipe\.scheduler"):
        flow_schedule(pipe)


def test_the_error_is_the_mean_squared_difference_of_velocities_over_all_but_the_batch():
    drawn = likelihood().draw(VIDEO, rows())
    prediction = torch.randn_like(VIDEO)
    expected = [((prediction[i] - drawn.target[i]) ** 2).sum().item() / 80 for i in range(3)]
    assert likelihood().error(prediction, drawn).tolist() == pytest.approx(expected, rel=1e-5)
    assert log_likelihood(likelihood(), torch.tensor([0.5]), 0.001).tolist() == pytest.approx([-500])


def test_bfloat16_latents_stay_so_while_target_and_error_are_float32():
    drawn = likelihood().draw(LATENTS.bfloat16(), rows())
    assert (drawn.inputs.dtype, drawn.target.dtype) == (torch.bfloat16, torch.float32)
    prediction = drawn.target.bfloat16()
    expected = ((prediction.float() - drawn.target) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(likelihood().error(prediction, drawn), expected, rtol=0, atol=0)


def test_an_unknown_density_is_named():
    with pytest.raises(ValueError, match=r"'cosine'.*uniform, logit_normal"):
        likelihood("cosine")


# ---- Stable Diffusion 3 and FLUX ----


def test_the_default_adapter_of_sd3_leaves_the_second_attention_and_that_of_flux_reaches_single_blocks():
    def adapted(family):
        config = LoraConfig(r=4, target_modules=list(family.default_target_modules))
        adapters.attach(family.denoiser, config, seed=0, probe=family.probe)
        return {name.split(".lora_A")[0] for name, _ in family.denoiser.named_parameters() if ".lora_A" in name}

    medium = adapted(load_family(stable_diffusion_3("3.5")))
    assert len(medium) == 15  # the last block has no output for the text
    assert not any("attn2" in name for name in medium)
    single = {name for name in adapted(load_family(flux())) if name.startswith("single_")}
    assert {name.split("attn.")[1] for name in single} == {"to_q", "to_k", "to_v"}


@pytest.mark.parametrize(("build", "default"), [(stable_diffusion_3, "logit_normal"), (flux, "uniform")])
@pytest.mark.parametrize("setting", ["uniform", "logit_normal"])
def test_the_density_of_times_is_the_familys_own_unless_the_run_sets_one(build, default, setting):
    assert load_family(build()).likelihood.density == default
    assert load_family(build(), settings=FamilySettings(setting)).likelihood.density == setting


def test_the_networks_times_run_to_1000_for_sd3_and_to_1_for_flux():
    assert load_family(stable_diffusion_3()).likelihood.timesteps.max() == 1000
    likelihood = load_family(flux()).likelihood
    torch.testing.assert_close(likelihood.timesteps, likelihood.sigmas)


def test_flux_is_given_the_guidance_of_the_run_where_it_takes_any():
    settings = [FamilySettings(guidance=guidance) for guidance in (1.0, 3.5, None)]
    low, *own = (load_family(flux(), settings=each).probe() for each in settings)
    assert torch.equal(*own) and not torch.allclose(low, own[0], atol=1e-4)
    schnell = [load_family(flux(guidance_embeds=False), settings=each).probe() for each in settings[:2]]
    assert torch.equal(*schnell)


def test_flux_cuts_images_that_are_not_square_as_the_pipeline_does():
    family, captured = load_family(flux()), {}
    family.denoiser.register_forward_pre_hook(lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True)
    keys = RowGenerators(0, 0, [0])
    draw = family.likelihood.draw(torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0)), keys)
    output = family.predict(family.denoiser, draw, family.condition(["a"], torch.zeros(1, 4), (12, 20)))
    assert torch.equal(captured["hidden_states"], FluxPipeline._pack_latents(draw.inputs, 1, 4, 6, 10))
    positions = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(captured["img_ids"], positions)
    packed = family.denoiser(**captured)[0]
    assert torch.equal(output, FluxPipeline._unpack_latents(packed, 12, 20, 2))


def test_density_and_guidance_of_the_run_reach_the_family(config, dataset):
    family = TGOLTrainer(flux(), config(timestep_sampling="logit_normal", train_guidance=2.0), dataset).family
    assert family.settings == FamilySettings("logit_normal", 2.0)
    assert TGOLTrainer(flux(), config(), dataset).family.settings == FamilySettings()


def test_the_patches_of_sd3_count_in_the_multiple_of_the_resolution():
    pipe = stable_diffusion_3()
    pipe.transformer.register_to_config(patch_size=2)
    assert load_family(pipe).resolution_multiple == 4


def test_settings_that_have_no_effect_on_the_family_are_warned_about(caplog):
    both = FamilySettings("uniform", 2.0)
    load_family(flux(), settings=both)
    assert caplog.text == ""
    load_family(flux(guidance_embeds=False), settings=both)
    assert "`train_guidance` is for models distilled" in caplog.text
    assert "timestep_sampling" not in caplog.text
    load_family(stable_diffusion(), settings=both)
    assert "`timestep_sampling` is for models of flow matching and has no effect on this Stable" in caplog.text
