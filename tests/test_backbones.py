"""Every supported pipeline: likelihoods against the formulas, training, saving for diffusers, resuming, dtypes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from diffusers import EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig
from PIL import Image as PictureFile

from tests.conftest import scored_dataset
from tests.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tgol_trainer import TGOLConfig, TGOLTrainer, adapters
from tgol_trainer.backbones import BACKBONES, BackboneSettings, load_backbone
from tgol_trainer.families import RowGenerators, log_likelihood
from tgol_trainer.metrics import RECORD

LORA = LoraConfig(r=4, lora_alpha=12)
PROMPTS = ["a cat", "two dogs"]
GEOMETRY = torch.tensor([[24, 20, 2, 0], [16, 32, 0, 8]])

# ---- The families: each likelihood once more, from the formula and the raw components ----


def clip(tokenizer, encoder, prompts):
    tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return encoder(tokens, output_hidden_states=True)


def t5(tokenizer, encoder, prompts, length):
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids)[0]


def mean_square(difference):
    return (difference**2).flatten(1).mean(1)


def noised_by_ddpm(z, keys):
    """√ā·z + √(1-ā)·ε at t uniform on 0..999, with the β of Stable Diffusion."""
    t, noise = keys.integers("timestep", 1000), keys.normal("noise", z)
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].view(-1, 1, 1, 1)
    return alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, noise


def sd_error(pipe, pixels, keys):
    x, t, noise = noised_by_ddpm(pipe.vae.encode(pixels).latent_dist.mode() * 0.18215, keys)
    text = clip(pipe.tokenizer, pipe.text_encoder, PROMPTS).last_hidden_state
    return mean_square(pipe.unet(x, t, text).sample - noise)


def sdxl_error(pipe, pixels, keys):
    x, t, noise = noised_by_ddpm(pipe.vae.encode(pixels).latent_dist.mode() * 0.13025, keys)
    first = clip(pipe.tokenizer, pipe.text_encoder, PROMPTS)
    second = clip(pipe.tokenizer_2, pipe.text_encoder_2, PROMPTS)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    times = torch.tensor([[24, 20, 2, 0, 16, 16], [16, 32, 0, 8, 16, 16]]).float()
    added = {"text_embeds": second.text_embeds, "time_ids": times}
    return mean_square(pipe.unet(x, t, text, added_cond_kwargs=added).sample - noise)


def sd3_error(pipe, pixels, keys):
    z = (pipe.vae.encode(pixels).latent_dist.mode() - 0.0609) * 1.5305
    first = clip(pipe.tokenizer, pipe.text_encoder, PROMPTS)
    second = clip(pipe.tokenizer_2, pipe.text_encoder_2, PROMPTS)
    third = torch.zeros(2, 256, 64)
    if pipe.text_encoder_3 is not None:
        third = t5(pipe.tokenizer_3, pipe.text_encoder_3, PROMPTS, 256)
    text = torch.cat([torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), third], 1)
    pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
    u = 1 / (1 + torch.exp(-keys.normal("timestep", torch.zeros(2))))
    linear = 1 - (1000 * u).floor() / 1000
    sigma, noise = (3 * linear / (1 + 2 * linear)).view(-1, 1, 1, 1), keys.normal("noise", z)
    x = (1 - sigma) * z + sigma * noise
    output = pipe.transformer(x, text, pooled, 1000 * sigma.flatten()).sample
    return mean_square(output - (noise - z))


def flux_error(pipe, pixels, keys):
    z = (pipe.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    sigma = (1 - (1000 * keys.uniform("timestep")).floor() / 1000).view(-1, 1, 1, 1)
    noise = keys.normal("noise", z)
    shape = z.shape
    output = pipe.transformer(
        FluxPipeline._pack_latents((1 - sigma) * z + sigma * noise, *shape),
        t5(pipe.tokenizer_2, pipe.text_encoder_2, PROMPTS, 512),
        clip(pipe.tokenizer, pipe.text_encoder, PROMPTS).pooler_output,
        sigma.flatten(),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, shape[2] // 2, shape[3] // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(512, 3),
        guidance=torch.tensor([3.5, 3.5]) if pipe.transformer.config.guidance_embeds else None,
    ).sample
    return mean_square(output - FluxPipeline._pack_latents(noise - z, *shape))


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipe("a cat", num_inference_steps=2, generator=generator, output_type="np").images)


def eight_rows():
    return scored_dataset(num_rows=8)


def decode_kl(pipe, latents):
    """By the pipelines' own formula, `latents / scale + shift`."""
    config = pipe.vae.config
    return pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample


def load_lora(pipe, folder):
    pipe.load_lora_weights(folder)


@dataclass(frozen=True)
class Facts:
    """What differs between families. `error` scores two pictures and PROMPTS, (2,) float32, whatever the code does."""

    error: Callable
    latents: tuple[int, ...] = (4, 8, 8)
    dataset: Callable = eight_rows
    pixels: tuple[int, ...] = (3, 16, 16)
    temperature: float = 0.001
    decode: Callable = decode_kl
    autoencoder: str = "vae"
    generate: Callable = picture
    load: Callable = load_lora
    learning_rate: float = 1e-3
    """Of the eight steps on one batch."""


PIPELINES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3.5": partial(stable_diffusion_3, "3.5"),
    "sd3 without T5": partial(stable_diffusion_3, t5=False),
    "flux": flux,
    "flux without guidance": partial(flux, guidance_embeds=False),
}
"""A new family adds its tiny pipelines here and what differs to FACTS."""

FACTS = {
    "sd": Facts(sd_error),
    "sdxl": Facts(sdxl_error),
    "sd3": Facts(sd3_error),
    "sd3.5": Facts(sd3_error),
    "sd3 without T5": Facts(sd3_error),
    "flux": Facts(flux_error),
    "flux without guidance": Facts(flux_error),
}

every_pipeline = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"backbone {name}")) for name in PIPELINES]
)


OTHER_FILES = {
    "AmusedPipeline": "test_masked_backbones.py",
    "Pipeline": "test_masked_backbones.py",  # Meissonic
    "WanPipeline": "test_wan.py",
}
"""Pipelines whose adapters, data or likelihoods are of another kind."""


def test_every_backbone_is_tested_here_or_in_the_file_named():
    assert {type(build()).__name__ for build in PIPELINES.values()} == set(BACKBONES) - set(OTHER_FILES)
    assert all((Path(__file__).parent / file).exists() for file in OTHER_FILES.values())
    assert list(FACTS) == list(PIPELINES)


# ---- Likelihoods ----


def pixels_of(name):
    return torch.rand(2, *FACTS[name].pixels, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prediction_of(backbone, name, prompts=PROMPTS, keys=None, model=None):
    keys = keys or RowGenerators(0, 0, [5, 6])
    conditioning = backbone.condition(prompts, GEOMETRY, FACTS[name].pixels[-2:])
    draw = backbone.family.draw(backbone.encode_images(pixels_of(name), keys, sample=False), keys)
    return backbone.predict(model or backbone.denoiser, draw, conditioning), draw


@every_pipeline
def test_the_log_likelihood_is_that_of_a_direct_computation_from_the_formula(name):
    pipe, facts, keys = PIPELINES[name](), FACTS[name], RowGenerators(0, 0, [5, 6])
    backbone = load_backbone(pipe)
    with torch.no_grad():
        prediction, draw = prediction_of(backbone, name, keys=keys)
        ours = log_likelihood(backbone.family, backbone.family.error(prediction, draw), facts.temperature)
        direct = -facts.error(pipe, pixels_of(name), keys) / facts.temperature
    torch.testing.assert_close(ours, direct, rtol=1e-4, atol=1e-2)


@every_pipeline
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_untrained_adapter_gives_a_log_ratio_of_exactly_zero(name, dtype):
    backbone = load_backbone(PIPELINES[name]().to(dtype))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(backbone.default_target_modules))
    adapters.attach(backbone.denoiser, config, seed=0, probe=backbone.probe)
    with torch.no_grad():
        policy, draw = prediction_of(backbone, name)
        with adapters.reference_policy(backbone.denoiser):
            reference, _ = prediction_of(backbone, name)
    assert policy.dtype == dtype
    difference = backbone.family.error(policy, draw) - backbone.family.error(reference, draw)
    assert difference.tolist() == [0.0, 0.0]


@every_pipeline
def test_encoding_gives_latents_of_the_denoisers_shape_sampled_by_row_or_the_mode(name):
    backbone, pixels = load_backbone(PIPELINES[name]()), pixels_of(name)
    rows = RowGenerators(0, 0, [5, 6])
    mode = backbone.encode_images(pixels, rows, sample=False)
    assert mode.shape == (2, *FACTS[name].latents)
    assert prediction_of(backbone, name)[0].shape == mode.shape
    sampled, alone = (
        backbone.encode_images(pixels, rows, sample=True),
        backbone.encode_images(pixels[1:], RowGenerators(0, 0, [6]), sample=True),
    )
    assert not torch.equal(sampled, mode)
    torch.testing.assert_close(sampled[1:], alone, rtol=1e-4, atol=1e-5)


@every_pipeline
def test_decoding_what_was_encoded_is_the_autoencoders_own_reconstruction(name):
    pipe, pixels, facts = PIPELINES[name](), pixels_of(name), FACTS[name]
    latents = load_backbone(pipe).encode_images(pixels, RowGenerators(0, 0, [5, 6]), sample=False)
    with torch.no_grad():
        decoded, own = facts.decode(pipe, latents), getattr(pipe, facts.autoencoder)(pixels).sample
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, own, rtol=1e-3, atol=1e-4)


@every_pipeline
def test_prompts_change_the_prediction_and_each_keyword_of_the_conditioning_does(name):
    backbone = load_backbone(PIPELINES[name]())
    both, draw = prediction_of(backbone, name)
    assert not torch.allclose(both, prediction_of(backbone, name, ["a cat", "a cat"])[0], atol=1e-6)
    conditioning = backbone.condition(PROMPTS, GEOMETRY, (16, 16))
    for key, value in conditioning.items():
        changed = backbone.predict(backbone.denoiser, draw, {**conditioning, key: value.flip(0)})
        assert not torch.allclose(both, changed, atol=1e-7), key


@every_pipeline
def test_the_default_adapter_reaches_every_kind_of_module_it_names(name):
    backbone = load_backbone(PIPELINES[name]())
    names = [module for module, _ in backbone.denoiser.named_modules()]
    for target in backbone.default_target_modules:
        assert any(module.endswith(f".{target}") for module in names), target


@every_pipeline
def test_a_pipeline_without_a_component_is_refused_by_its_name(name):
    for component in load_backbone(PIPELINES[name]()).required_components:
        pipe = PIPELINES[name]()
        setattr(pipe, component, None)
        with pytest.raises(ValueError, match=f"has no {component}, which training needs"):
            load_backbone(pipe)


# ---- Training ----


def trainer_of(name, folder, dtype=torch.float32, pipe=None, dataset=None, **overrides):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **overrides,
    }
    pipe = pipe if pipe is not None else PIPELINES[name]().to(dtype)
    dataset = dataset if dataset is not None else FACTS[name].dataset()
    return TGOLTrainer(pipe, TGOLConfig(**settings), dataset, peft_config=LORA)


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def losses(trainer):
    return [line["loss"] for line in lines(trainer)]


_TRAINED = {}


@pytest.fixture
def trained(name, tmp_path_factory):
    """Four steps, a checkpoint after the second, and what is published; once for each pipeline."""
    if name not in _TRAINED:
        folder = tmp_path_factory.mktemp("trained")
        trainer = trainer_of(name, folder / "run", save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model(str(folder / "saved"))
        _TRAINED[name] = SimpleNamespace(
            trainer=trainer, saved=folder / "saved", checkpoint=folder / "run/checkpoint-2"
        )
    return _TRAINED[name]


@every_pipeline
def test_the_first_logged_loss_is_the_mean_weight_times_ln_2(name, trained):
    """All eight rows are in the batch: weights 1 + 5·|s - median| from the raw column."""
    scores = np.asarray(FACTS[name].dataset()["score"])
    weights = 1 + 5 * np.abs(scores - np.median(scores))
    assert losses(trained.trainer)[0] == pytest.approx(weights.mean() * math.log(2), rel=1e-6)


@every_pipeline
def test_a_fresh_pipeline_loads_exactly_what_was_trained(name, trained):
    base = load_backbone(PIPELINES[name]()).probe()
    fresh = PIPELINES[name]()
    FACTS[name].load(fresh, trained.saved)
    loaded = load_backbone(fresh).probe()
    assert (loaded - trained.trainer.backbone.probe()).abs().max().item() == 0.0
    assert not torch.equal(loaded, base)


@every_pipeline
def test_a_fresh_pipeline_draws_what_the_trained_one_draws(name, trained):
    fresh, generate = PIPELINES[name](), FACTS[name].generate
    before = generate(fresh)
    FACTS[name].load(fresh, trained.saved)
    after = generate(fresh)
    torch.testing.assert_close(after, generate(trained.trainer.backbone.pipeline), rtol=0, atol=1e-5)
    assert not torch.allclose(after, before, rtol=0, atol=1e-5)


@every_pipeline
def test_stopping_and_resuming_equals_never_having_stopped(name, trained, tmp_path):
    torch.manual_seed(12345)  # whatever happened to the global generator in between
    resumed = trainer_of(name, tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(trained.checkpoint))
    assert losses(resumed) == losses(trained.trainer)
    assert torch.equal(resumed.backbone.probe(), trained.trainer.backbone.probe())


@every_pipeline
def test_gradient_checkpointing_does_not_change_the_losses(name, trained, tmp_path):
    checkpointed = trainer_of(name, tmp_path, gradient_checkpointing=True)
    assert checkpointed.model.is_gradient_checkpointing
    checkpointed.train()
    assert losses(checkpointed) == losses(trained.trainer)


@every_pipeline
def test_steps_on_one_batch_lower_the_loss_pull_positives_nearer_and_push_negatives_away(name, tmp_path):
    trainer = trainer_of(name, tmp_path)
    optimizer = torch.optim.Adam(
        [p for p in trainer.model.parameters() if p.requires_grad], lr=FACTS[name].learning_rate
    )
    trainer.model.train()
    batch, history, record = trainer.collator([trainer.train_dataset[row] for row in range(8)]), [], None
    for _ in range(9):
        loss, record = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    last = dict(zip(RECORD, record.T, strict=True))
    change, positive = last["error"] - last["reference_error"], last["label"] > 0.5
    assert history[-1] < 0.9 * history[0]
    assert change[positive].mean() < 0 < change[~positive].mean()


@every_pipeline
def test_a_bfloat16_base_trains_a_float32_adapter_and_still_generates(name, tmp_path):
    trainer = trainer_of(name, tmp_path, torch.bfloat16, max_steps=2)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    kinds = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    first, second = losses(trainer)
    assert first == pytest.approx(lines(trainer)[0]["weights/mean"] * math.log(2), rel=1e-6)
    assert math.isfinite(second) and second != first
    assert torch.isfinite(FACTS[name].generate(trainer.backbone.pipeline)).all()


def test_density_and_guidance_of_the_run_reach_the_backbone(tmp_path):
    backbone = trainer_of("flux", tmp_path, timestep_sampling="logit_normal", train_guidance=2.0).backbone
    assert backbone.settings == BackboneSettings("logit_normal", 2.0)
    assert trainer_of("flux", tmp_path).backbone.settings == BackboneSettings(None, 3.5)


# ---- Stable Diffusion XL ----


def test_sdxl_is_told_the_true_size_and_crop_of_each_picture(tmp_path):
    """20×24 and 32×16 cut to 16×16: offsets of (24-20)/2·16/20 = 1.6 and (32-16)/2 = 8 pixels after resizing."""
    sizes = [(20, 24), (32, 16), (16, 16), (40, 40)]
    dataset = Dataset.from_dict(
        {
            "prompt": ["a", "b", "c", "d"],
            "image": [PictureFile.new("RGB", size, (200, 50, 0)) for size in sizes],
            "score": [1.0, 2.0, 3.0, 4.0],
        }
    ).cast_column("image", Image())
    trainer = trainer_of("sdxl", tmp_path, dataset=dataset, per_device_train_batch_size=4)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, trainer.collator([trainer.train_dataset[row] for row in range(4)]))
    expected = [[24, 20, 2, 0, 16, 16], [16, 32, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16], [40, 40, 0, 0, 16, 16]]
    assert [times.tolist() for times in seen] == [expected, expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sdxl_encodes_in_float32_where_its_autoencoder_asks_for_it(dtype):
    pixels, rows = pixels_of("sdxl"), RowGenerators(0, 0, [5, 6])
    expected = load_backbone(stable_diffusion_xl()).encode_images(pixels, rows, sample=False)
    half = stable_diffusion_xl()
    half.unet.to(dtype)
    half.vae.to(dtype)
    weights = {name: weight.float() for name, weight in half.vae.state_dict().items()}
    backbone = load_backbone(half)
    assert half.vae.dtype == torch.float32
    assert all(torch.equal(weight, weights[name]) for name, weight in half.vae.state_dict().items())
    latents = backbone.encode_images(pixels, rows, sample=False)
    assert latents.dtype == dtype
    torch.testing.assert_close(latents.float(), expected, rtol=0.05, atol=0.01)
    kept = stable_diffusion_xl().to(dtype)
    kept.vae.register_to_config(force_upcast=False)
    assert load_backbone(kept).pipeline.vae.dtype == dtype


def test_sdxl_honours_mean_and_deviation_of_the_latents():
    """Inverse of the pipeline's own `latents * std / scaling_factor + mean`."""
    pipe, pixels, rows = stable_diffusion_xl(), pixels_of("sdxl"), RowGenerators(0, 0, [5, 6])
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    latents = load_backbone(pipe).encode_images(pixels, rows, sample=False)
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
    conditioning = load_backbone(pipe).condition(["a cat", ""], GEOMETRY, (16, 16))
    torch.testing.assert_close(conditioning["encoder_hidden_states"][1:], text)
    torch.testing.assert_close(conditioning["text_embeds"][1:], pooled)
    assert (text.abs().max() == 0) == zeros
    assert conditioning["encoder_hidden_states"][0].abs().max() > 0


def test_sdxl_predicts_what_its_scheduler_says():
    assert load_backbone(stable_diffusion_xl("v_prediction")).family.prediction_type == "v_prediction"


@pytest.mark.parametrize("scheduler", [EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_without_ddpm_noise_levels_is_refused(scheduler):
    """Such as that of Playground v2.5, an SDXL pipeline in another parameterisation."""
    pipe = stable_diffusion_xl()
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=rf"{scheduler.__name__}.*beta_schedule"):
        load_backbone(pipe)


# ---- Long prompts and sizes ----

SHORT, LONG, LONGER = "a " * 30, "abc " * 75, "abc " * 200
LIMITS = {"sd": (2, 77), "sdxl": (2, 77), "sd3": (2, 256), "sd3 without T5": (2, 77), "flux": (1, 512)}


@pytest.mark.parametrize(("name", "counted"), LIMITS.items(), ids=LIMITS)
def test_prompts_are_long_where_the_encoder_that_reads_furthest_cuts_them(name, counted):
    """In tokens of the tiny tokenizers: CLIP 32, 227, 602, or T5 61, 301, 801."""
    assert load_backbone(PIPELINES[name]()).count_long_prompts([SHORT, LONG, LONGER]) == counted


def test_a_prompt_that_only_the_second_encoder_of_sdxl_cuts_is_long():
    pipe = stable_diffusion_xl()
    pipe.tokenizer.model_max_length = 400
    assert load_backbone(pipe).count_long_prompts([SHORT, LONG]) == (1, 77)


SIZES = {"sd": (16, 2), "sdxl": (16, 2), "sd3": (16, 2), "flux": (16, 4)}


@pytest.mark.parametrize(("name", "sizes"), SIZES.items(), ids=SIZES)
def test_sizes_come_from_the_components(name, sizes):
    backbone = load_backbone(PIPELINES[name]())
    assert (backbone.native_resolution, backbone.resolution_multiple) == sizes


def test_the_patches_of_sd3_count_in_the_multiple_of_the_resolution():
    pipe = stable_diffusion_3()
    pipe.transformer.register_to_config(patch_size=2)
    assert load_backbone(pipe).resolution_multiple == 4
