"""What a family hands to the denoiser, and noises, is what the diffusers pipeline itself does."""

import functools
import inspect
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import pytest
import torch
from packaging.version import Version

from tests.helpers import over
from tests.pipelines import KEYS, SLOW, VARIANTS
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.families.flow import FlowFamily
from tgol_trainer.likelihoods import DiffusionLikelihood, Draw

every_variant = over(VARIANTS, [name for name in VARIANTS if name not in SLOW])
NOISED = [name for name in VARIANTS if "amused" not in name and "meissonic" not in name]


def steps_of(name, pipe, prompt):
    """Call the pipeline for two steps without guidance: what goes into and out of `scheduler.step`, and the images."""
    facts, steps, kind = VARIANTS[name], [], type(pipe.scheduler)
    height, width = facts.pixels[-2:]
    step = kind.step

    @functools.wraps(step)
    def recorded(scheduler, *args, **kwargs):
        if scheduler is not pipe.scheduler:  # LTX-2's copy, for the sound
            return step(scheduler, *args, **kwargs)
        given = inspect.signature(step).bind(scheduler, *args, **kwargs).arguments
        scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        values = [scale(given["sample"], given["timestep"]).clone(), given["model_output"].clone()]
        made = step(scheduler, *args, **kwargs)
        inputs, output, after = (facts.unpack(pipe, value, height, width) for value in (*values, made[0].clone()))
        time, output = (1000 - given["timestep"], -output) if facts.inverted else (given["timestep"], output)
        output = -output if facts.negated else output
        steps.append(SimpleNamespace(time=time, inputs=inputs, output=output, after=after))
        return made

    if "guider" in pipe.components:  # HunyuanVideo 1.5
        pipe.guider = type(pipe.guider)(guidance_scale=1.0)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    with patch.object(kind, "step", recorded):
        made = pipe(prompt=prompt, generator=generator, **{**options, **facts.call, **facts.unguided})
    return steps, made[0]


@over(VARIANTS, VARIANTS)
def test_the_prediction_is_what_the_pipeline_hands_to_its_scheduler(name):
    """The same latents, time and prompt; a wrong sign, scale of time, template, mask, packing or size would show."""
    family = load_family(VARIANTS[name].build())
    size = VARIANTS[name].pixels[-2:]
    for prompt in ("a cat", "two dogs on a red sofa"):
        steps, _ = steps_of(name, family.pipeline, prompt)
        assert len(steps) >= 2
        conditioning = family.condition([prompt], torch.tensor([[*size, 0, 0]]), size)
        for step in steps:
            time = torch.as_tensor(step.time).reshape(1)
            times = family.network_times(time) if isinstance(family, FlowFamily) else time
            if name == "wan 2.2 a14b" and time < 875:  # the other expert's
                continue
            with torch.no_grad():
                found = family.predict(family.denoiser, Draw(step.inputs, times, step.inputs), conditioning)
            torch.testing.assert_close(found.float(), step.output.float(), rtol=1e-5, atol=1e-5)


@every_variant
def test_latents_are_decoded_as_the_pipeline_decodes_them(name):
    """With the unit of the latents in the denoiser; encoding undoes it, as `test_families.py` shows."""
    family = load_family(VARIANTS[name].build())
    steps, images = steps_of(name, family.pipeline, "a cat")
    pixels = family.decode_images(steps[-1].after)
    if family.autoencoder_name == "vae":
        pixels = pixels / 2 + 0.5
    last = pixels.clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(last, torch.tensor(images), rtol=1e-4, atol=1e-5)
    assert last.std() > 1e-3


def noised_by(scheduler, sample, noise, time):
    """Noise one row with the scheduler, and scale it as the pipeline does before it calls the denoiser."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(sample, time, noise)
    noised = scheduler.add_noise(sample, noise, time)
    return scheduler.scale_model_input(noised, time[0])


@over(NOISED, [name for name in NOISED if name not in SLOW])
def test_latents_are_noised_as_the_pipelines_scheduler_noises_them(name):
    facts = VARIANTS[name]
    family = load_family(facts.build())
    pipe, likelihood = family.pipeline, family.likelihood
    clean = torch.randn(2, *facts.latents, generator=torch.Generator().manual_seed(2))
    noise = KEYS.normal("noise", clean)
    config, kind = pipe.scheduler.config, type(pipe.scheduler)
    schedule = {}
    if not isinstance(likelihood, DiffusionLikelihood):
        steps_of(name, pipe, "a cat")
        used, times = pipe.scheduler.sigmas, pipe.scheduler.timesteps
        if facts.inverted:
            used, times = 1 - used, 1000 - times
        schedule, levels = {"sigmas": used, "timesteps": times}, (used[: len(times)], times)
        torch.testing.assert_close(likelihood.timesteps, family.network_times(family.schedule()[1]))
        apart = likelihood.sampled_levels is not None  # CogView4's times are those before the shift
        for sigma, time in (family.schedule(), *([] if apart else [levels])):
            torch.testing.assert_close(1000 * sigma, time.float(), rtol=0, atol=1.0)  # UniPC has whole times
        # The levels of these two steps instead of all that are trained on.
        likelihood.sigmas, likelihood.timesteps = levels
        likelihood.sampled_levels = (lambda latents: levels) if apart else None
    draw = likelihood.draw(clean, KEYS)
    for row in range(2):
        scheduler = kind.from_config(config)
        vars(scheduler).update(schedule)
        found = noised_by(scheduler, clean[row : row + 1], noise[row : row + 1], draw.timesteps[row : row + 1])
        torch.testing.assert_close(draw.inputs[row : row + 1], found.float(), rtol=1e-5, atol=1e-5)


@every_variant
def test_a_rows_prediction_does_not_depend_on_the_other_rows(name):
    """Whose prompts are shorter and longer: nothing of their padding is seen."""
    facts, prompts = VARIANTS[name], ["a cat", "two dogs on a red sofa", ""]
    family = load_family(facts.build())
    size, geometry = facts.pixels[-2:], torch.tensor([[24, 20, 2, 0], [16, 32, 0, 8], [16, 16, 0, 0]])
    clean = torch.randn(3, *facts.latents, generator=torch.Generator().manual_seed(2))
    if not family.encode_images(torch.zeros(1, *facts.pixels), KEYS, sample=False).is_floating_point():
        clean = torch.randint(32, clean.shape, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([300.0, 500.0, 900.0])
    times = family.network_times(times) if isinstance(family, FlowFamily) else times

    def predicted(*rows):
        rows = list(rows)
        conditioning = family.condition([prompts[row] for row in rows], geometry[rows], size)
        with torch.no_grad():
            return family.predict(family.denoiser, Draw(clean[rows], times[rows], clean[rows]), conditioning)

    together = predicted(0, 1, 2)
    for row in range(3):
        torch.testing.assert_close(predicted(row)[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drops", [False, True])
def test_a_scheduler_that_drops_the_times_of_cogview4_is_warned_of(drops, monkeypatch, caplog):
    """As that of diffusers 0.41 does, which samples at 1000·σ whatever times it is given."""

    def set_timesteps(scheduler, sigmas, timesteps):
        scheduler.timesteps = 1000 * torch.tensor(sigmas) if drops else torch.tensor(timesteps)

    pipe = VARIANTS["cogview4"].build()
    monkeypatch.setattr(type(pipe.scheduler), "set_timesteps", set_timesteps)
    load_family(pipe)
    assert ("samples CogView4 at shifted times" in caplog.text) == drops


def test_prompts_of_different_lengths_without_a_mask_are_refused():
    family = load_family(VARIANTS["sd"].build())
    rows = {"encoder_hidden_states": [torch.zeros(length, 32) for length in (3, 5)]}
    with pytest.raises(ValueError, match=r"different lengths \(3, 5 tokens\), and no mask"):
        family.condition(["a", "b"], torch.zeros(2, 4), (16, 16), lambda prompts: rows)


@pytest.mark.parametrize("name", ["flux", "flux.2", "flux.2 klein", "z-image", "cogview4"])
def test_shifted_times_are_those_that_the_pipeline_samples_with_at_this_size(name, monkeypatch):
    """The two levels of its schedule at the places 1 and 1/2 (CogView4: 1/1000), as it shifts them for its tokens."""
    places = [0, 999 if name == "cogview4" else 500]
    monkeypatch.setattr("tgol_trainer.families.flux2._STEPS", 2)
    family = load_family(VARIANTS[name].build(), settings=FamilySettings("shifted"))
    steps_of(name, family.pipeline, "a cat")
    sampler = family.pipeline.scheduler
    sigmas, times = family.likelihood.sampled_levels(torch.zeros(1, *VARIANTS[name].latents))
    assert len(sigmas) == len(times) == 1000
    torch.testing.assert_close(sigmas[places], sampler.sigmas[:2], rtol=1e-5, atol=1e-6)
    if name == "cogview4":  # whole times, as its pipeline makes them; those of diffusers 0.41 are others
        sampled = torch.tensor([1000.0, 1.0])
        assert sampler.timesteps.tolist() == sampled.tolist() or Version(diffusers.__version__) < Version("0.42")
    else:
        sampled = sampler.timesteps
    torch.testing.assert_close(times[places], family.network_times(sampled), rtol=1e-5, atol=1e-6)
    latents = torch.randn(2, *VARIANTS[name].latents)
    draw = family.likelihood.draw(latents, KEYS)
    index = KEYS.uniform("timestep").mul(1000).long()
    assert torch.equal(draw.timesteps, times[index])
    sigma = sigmas[index].view(2, 1, 1, 1)
    torch.testing.assert_close(draw.inputs, (1 - sigma) * latents + sigma * KEYS.normal("noise", latents))
