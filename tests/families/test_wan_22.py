"""What Wan 2.2 has and Wan 2.1 has not: an expert for low noise, a time for each token."""

import pytest
import torch
from peft import LoraConfig

from tests.pipelines import four_clips
from tests.tiny import stable_diffusion, wan
from tests.tiny_video import wan_22_5b, wan_22_a14b
from tgol_trainer import TGOLTrainer
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.jobs.loading import load_adapted_pipeline
from tgol_trainer.likelihoods import Draw

LOW = FamilySettings(expert="low_noise")
CALL = {"prompt": "a cat", "height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 4}


def test_each_expert_draws_only_the_times_that_generation_gives_it():
    """σ = 3·s/(1 + 2·s) with s = 1, 0.999, ...; 1000·σ from 875 on for one, below for the other."""
    s = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    times = 3000 * s / (1 + 2 * s)
    high, low = (load_family(wan_22_a14b(), settings=settings).likelihood for settings in (None, LOW))
    assert len(high.timesteps) + len(low.timesteps) == 1000
    for likelihood, own in (
        (high, times > 875.01),
        (low, times < 874.99),
    ):  # the boundary itself is a matter of rounding
        found = likelihood.timesteps.double()
        found = found[(found - 875).abs() > 0.01]
        torch.testing.assert_close(found, times[own], rtol=1e-6, atol=1e-3)
    for likelihood in (high, low):
        torch.testing.assert_close(1000 * likelihood.sigmas, likelihood.timesteps)


def test_the_expert_for_low_noise_predicts_what_the_pipeline_hands_to_its_scheduler():
    family, steps = load_family(wan_22_a14b(), settings=LOW), []
    pipe, step = family.pipeline, family.pipeline.scheduler.step

    def recorded(output, time, sample, **options):
        steps.append((output.clone(), time, sample.clone()))
        return step(output, time, sample, **options)

    pipe.scheduler.step = recorded
    pipe(**CALL, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    conditioning = family.condition(["a cat"], torch.zeros(1, 4), (16, 32))
    low = [each for each in steps if each[1] < 875]
    assert 0 < len(low) < len(steps)
    for output, time, sample in low:
        with torch.no_grad():
            found = family.predict(family.denoiser, Draw(sample, time.reshape(1), sample), conditioning)
        torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [wan, wan_22_5b, stable_diffusion])
def test_an_expert_of_a_model_without_experts_is_refused(build):
    with pytest.raises(ValueError, match=r"`expert`.*one transformer.*leave it out"):
        load_family(build(), settings=LOW)


def test_a_low_noise_adapter_is_saved_resumed_and_loaded_where_it_belongs(config, tmp_path):
    def trainer(folder):
        settings = {"resolution": "16x32", "num_frames": 5, "per_device_train_batch_size": 4, "max_steps": 3}
        args = config(output_dir=str(folder), expert="low_noise", save_strategy="steps", save_steps=2, **settings)
        return TGOLTrainer(wan_22_a14b(), args, four_clips(), peft_config=LoraConfig(r=4, lora_alpha=12))

    whole = trainer(tmp_path / "whole")
    assert whole.family.denoiser is whole.family.pipeline.transformer_2
    assert not getattr(whole.family.pipeline.transformer, "peft_config", None)
    whole.train()
    saved = tmp_path / "saved"
    whole.save_model(str(saved))
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    again = resumed.model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.model.state_dict().items())

    line = "pipe.load_lora_weights('here', load_into_transformer_2=True)"
    assert line in whole.family.usage("here", "a cat").splitlines()
    trained = whole.family.probe()
    by_hand = load_family(wan_22_a14b(), settings=LOW)
    base = by_hand.probe()
    by_hand.pipeline.load_lora_weights(saved, load_into_transformer_2=True)
    wan_22_a14b().save_pretrained(tmp_path / "model")
    pipe, _ = load_adapted_pipeline(str(tmp_path / "model"), str(saved), num_frames=5, use_cpu=True)
    assert torch.equal(by_hand.probe(), trained)
    torch.testing.assert_close(load_family(pipe, settings=LOW).probe(), trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, base, rtol=0, atol=1e-4)
    assert not getattr(pipe.transformer, "peft_config", None)


def test_the_small_model_has_its_authors_size_frames_and_rate():
    family = load_family(wan_22_5b())
    assert (family.native_size, family.num_frames) == ((704, 1280), 121)
    usage = family.usage("here", "a cat")
    assert "height=704, width=1280, num_frames=121" in usage and "fps=24" in usage


def test_the_adapters_of_both_experts_are_generated_with_from_one_folder(config, tmp_path):
    """Each in the transformer that it was trained for, as diffusers loads them; folders of wrong names are refused."""
    wan_22_a14b().save_pretrained(tmp_path / "model")
    both, by_hand = tmp_path / "both", load_family(wan_22_a14b()).pipeline
    for expert in ("high_noise", "low_noise"):
        settings = {"resolution": "16x32", "num_frames": 5, "per_device_train_batch_size": 4, "max_steps": 1}
        args = config(output_dir=str(tmp_path / f"run {expert}"), expert=expert, learning_rate=0.1, **settings)
        trainer = TGOLTrainer(wan_22_a14b(), args, four_clips(), peft_config=LoraConfig(r=4, lora_alpha=12))
        trainer.train()
        trainer.save_model(str(both / expert))
        assert "The other expert's adapter" in trainer.family.usage("here", "a cat")
        by_hand.load_lora_weights(both / expert, load_into_transformer_2=expert == "low_noise")
    pipe, _ = load_adapted_pipeline(str(tmp_path / "model"), str(both), num_frames=5, use_cpu=True)
    found, expected = (
        each(**CALL, guidance_scale=1.0, output_type="pt", generator=torch.Generator().manual_seed(0)).frames
        for each in (pipe, by_hand)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(getattr(part, "peft_config", None) for part in (pipe.transformer, pipe.transformer_2))
    (both / "high_noise").rename(both / "other")
    (both / "low_noise").rename(both / "high_noise")
    (both / "other").rename(both / "low_noise")
    with pytest.raises(ValueError, match="high_noise holds an adapter that was trained for low_noise"):
        load_adapted_pipeline(str(tmp_path / "model"), str(both), num_frames=5, use_cpu=True)
