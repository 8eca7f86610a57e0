"""Stable Diffusion XL: sizes and crops, the float32 autoencoder, empty prompts, what its scheduler must be."""

import pytest
import torch
from datasets import Dataset, Image
from diffusers import EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image as ImageFile

from tests.pipelines import GEOMETRY, KEYS
from tests.tiny import stable_diffusion_xl
from tgol_trainer import TGOLTrainer
from tgol_trainer.families import load_family

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_sdxl_is_told_the_true_size_and_crop_of_each_image(config):
    """20×24 and 32×16 cut to 16×16: offsets of (24-20)/2·16/20 = 1.6 and (32-16)/2 = 8 pixels after resizing."""
    sizes = [(20, 24), (32, 16), (16, 16), (40, 40)]
    dataset = Dataset.from_dict(
        {
            "prompt": ["a", "b", "c", "d"],
            "image": [ImageFile.new("RGB", size, (200, 50, 0)) for size in sizes],
            "score": [1.0, 2.0, 3.0, 4.0],
        }
    ).cast_column("image", Image())
    trainer = TGOLTrainer(stable_diffusion_xl(), config(per_device_train_batch_size=4), dataset)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, trainer.collator([trainer.train_dataset[row] for row in range(4)]))
    expected = [[24, 20, 2, 0, 16, 16], [16, 32, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16], [40, 40, 0, 0, 16, 16]]
    assert [times.tolist() for times in seen] == [expected, expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sdxl_encodes_in_float32_where_its_autoencoder_asks_for_it(dtype):
    pixels, rows = PIXELS, KEYS
    expected = load_family(stable_diffusion_xl()).encode_images(pixels, rows, sample=False)
    half = stable_diffusion_xl()
    half.unet.to(dtype)
    half.vae.to(dtype)
    weights = {name: weight.float() for name, weight in half.vae.state_dict().items()}
    family = load_family(half)
    assert half.vae.dtype == torch.float32
    assert all(torch.equal(weight, weights[name]) for name, weight in half.vae.state_dict().items())
    latents = family.encode_images(pixels, rows, sample=False)
    assert latents.dtype == dtype
    torch.testing.assert_close(latents.float(), expected, rtol=0.05, atol=0.01)
    kept = stable_diffusion_xl().to(dtype)
    kept.vae.register_to_config(force_upcast=False)
    assert load_family(kept).pipeline.vae.dtype == dtype


def test_sizes_are_exact_on_a_bfloat16_base():
    """bfloat16 has eight bits: 1333 would become 1336, 1001 would become 1000."""
    geometry = torch.tensor([[1001, 1333, 0, 166]])
    times = load_family(stable_diffusion_xl().to(torch.bfloat16)).condition(["a"], geometry, (1024, 1024))["time_ids"]
    assert times.tolist() == [[1001, 1333, 0, 166, 1024, 1024]]


def test_sdxl_honours_mean_and_deviation_of_the_latents():
    """Inverse of the pipeline's own `latents * std / scaling_factor + mean`."""
    pipe, pixels, rows = stable_diffusion_xl(), PIXELS, KEYS
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    latents = load_family(pipe).encode_images(pixels, rows, sample=False)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    with torch.no_grad():
        mode = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents * std / 0.13025 + mean, mode, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_is_conditioned_on_an_empty_prompt_as_the_pipeline_generates_without_one(zeros):
    pipe = stable_diffusion_xl()
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    with torch.no_grad():
        _, text, _, pooled = pipe.encode_prompt(["a cat"], do_classifier_free_guidance=True, device="cpu")
    conditioning = load_family(pipe).condition(["a cat", ""], GEOMETRY, (16, 16))
    torch.testing.assert_close(conditioning["encoder_hidden_states"][1:], text)
    torch.testing.assert_close(conditioning["text_embeds"][1:], pooled)
    assert (text.abs().max() == 0) == zeros
    assert conditioning["encoder_hidden_states"][0].abs().max() > 0


def test_sdxl_predicts_what_its_scheduler_says():
    assert load_family(stable_diffusion_xl("v_prediction")).likelihood.prediction_type == "v_prediction"


@pytest.mark.parametrize("scheduler", [EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_without_ddpm_noise_levels_is_refused(scheduler):
    """Such as that of Playground v2.5, an SDXL pipeline in another parameterisation."""
    pipe = stable_diffusion_xl()
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=rf"{scheduler.__name__}.*beta_schedule"):
        load_family(pipe)


def test_a_prompt_that_only_the_second_encoder_of_sdxl_cuts_is_long():
    pipe = stable_diffusion_xl()
    pipe.tokenizer.model_max_length = 400
    assert load_family(pipe).count_long_prompts(["a " * 30, "abc " * 75]) == (1, 77)
