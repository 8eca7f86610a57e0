"""aMUSEd and Meissonic where they differ from other families: time and size, files, workarounds, what is refused."""

import json

import pytest
import torch
from datasets import Dataset
from diffusers import AmusedPipeline, UVit2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

from tests import meissonic_standin
from tests.helpers import randomize
from tests.tiny import amused, meissonic
from tgol_trainer import TGOLTrainer, adapters
from tgol_trainer.evaluation import compare_scores, generate_images
from tgol_trainer.families import load_family
from tgol_trainer.likelihoods import RowGenerators
from tgol_trainer.shapes import (
    MASKED_PIPELINE_DIR,
    PROMPTS,
    background_darkness,
    colour_faithfulness,
    load_masked_pipeline,
)

LORA = LoraConfig(r=4, lora_alpha=16)
BUILDERS = {"aMUSEd": amused, "Meissonic": meissonic}
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
GEOMETRY = torch.tensor([[16, 16, 0, 0], [40, 30, 2, 1], [1023, 700, 0, 5]])
KEYS = RowGenerators(0, 0, [5, 6, 7])
both = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def trained(build, **options):
    """A family with a random adapter, as after training."""
    family = load_family(build())
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(family.default_target_modules), **options)
    adapters.attach(family.denoiser, config, seed=0, probe=family.probe)
    randomize(family.denoiser)
    return family


def save(family, folder):
    adapters.save_adapter(type(family.pipeline), "transformer", family.denoiser, folder)


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if "loss" in line]


@both
def test_the_mask_ratio_reaches_meissonic_only_and_sizes_reach_both(build):
    family = load_family(build())
    drawn = family.likelihood.draw(family.encode_images(PIXELS, KEYS, sample=False), KEYS)
    later = type(drawn)(drawn.inputs, drawn.timesteps / 2, drawn.target, drawn.mask)
    with torch.no_grad():
        conditioning = family.condition(["a"] * 3, GEOMETRY, (16, 16))
        output = family.predict(family.denoiser, drawn, conditioning)
        assert torch.equal(output, family.predict(family.denoiser, later, conditioning)) == (build is amused)
        other = family.condition(["a"] * 3, GEOMETRY + 100, (16, 16))
        assert not torch.equal(output, family.predict(family.denoiser, drawn, other))


# ---- Training ----


@both
def test_neither_temperature_nor_latent_sampling_has_an_effect(build, config, dataset):
    losses = []
    for options in ({}, {"temperature": 10.0}, {"latent_sampling": "mode"}):
        trainer = TGOLTrainer(build(), config(max_steps=3, **options), dataset, peft_config=LORA)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == losses[1] == losses[2]


def test_checkpointing_twice_wraps_once_and_costs_nothing_without_gradients():
    family = load_family(amused())
    family.enable_gradient_checkpointing()
    once = [layer.forward for layer in family.denoiser.transformer_layers]
    family.enable_gradient_checkpointing()
    assert [layer.forward for layer in family.denoiser.transformer_layers] == once
    assert torch.equal(family.probe(), load_family(amused()).probe())


def test_diffusers_own_switch_still_fails_so_the_workarounds_are_still_needed():
    """When this fails, huggingface/diffusers#11214 is fixed: drop `AmusedFamily.enable_gradient_checkpointing`."""
    family = load_family(amused())
    family.denoiser.enable_gradient_checkpointing()
    with torch.no_grad():
        family.probe()
    drawn = family.likelihood.draw(family.encode_images(PIXELS, KEYS, sample=False), KEYS)
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        family.predict(family.denoiser, drawn, family.condition(["a"] * 3, GEOMETRY, (16, 16)))


@both
def test_full_finetuning_is_saved_as_the_transformers_own_folder(build, config, dataset, tmp_path):
    trainer = TGOLTrainer(build(), config(full_finetuning=True, max_steps=2), dataset)
    trainer.train()
    trainer.save_model(str(tmp_path / "full"))
    kind = UVit2DModel if build is amused else meissonic_standin.Transformer2DModel
    loaded = kind.from_pretrained(tmp_path / "full" / "transformer").state_dict()
    moved, base = trainer.model.state_dict(), build().transformer.state_dict()
    assert all(torch.equal(loaded[name], moved[name]) for name in moved)
    assert not all(torch.equal(base[name], moved[name]) for name in moved)


# ---- Saving and loading ----


@both
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_load_lora_adapter_gives_the_trained_model_exactly(build, options, tmp_path):
    family, fresh = trained(build, **options), build()
    save(family, tmp_path)
    base = load_family(build()).probe()
    fresh.transformer.load_lora_adapter(tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    loaded = load_family(fresh).probe()
    assert (loaded - family.probe()).abs().max().item() == 0.0
    assert not torch.allclose(loaded, base)


@both
def test_the_file_has_the_form_of_those_that_diffusers_writes(build, tmp_path):
    """The same adapter through diffusers' own private writer: equal keys, tensors and header."""
    from diffusers.loaders import AmusedLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    family = trained(build)
    save(family, tmp_path / "ours")
    AmusedLoraLoaderMixin._save_lora_weights(
        tmp_path / "theirs",
        lora_layers={"transformer": get_peft_model_state_dict(family.denoiser)},
        lora_metadata={"transformer": adapters.adapter_metadata(family.denoiser.peft_config["default"])},
    )
    contents = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "pytorch_lora_weights.safetensors", "pt") as file:
            contents.append(({name: file.get_tensor(name) for name in file.keys()}, file.metadata()))  # noqa: SIM118
    (ours, our_header), (theirs, their_header) = contents
    assert our_header == their_header
    assert json.loads(our_header["lora_adapter_metadata"])["transformer.lora_alpha"] == 16
    assert set(ours) == set(theirs)
    assert all(name.startswith("transformer.") and torch.equal(ours[name], theirs[name]) for name in ours)


@both
@pytest.mark.parametrize("reference", ["base", "initial"])
def test_training_continues_from_a_saved_adapter_against_the_reference_asked_for(
    build, reference, config, dataset, tmp_path
):
    family = trained(build)
    save(family, tmp_path / "saved")
    start, base = family.probe(), load_family(build()).probe()
    args = config(adapter_name_or_path=str(tmp_path / "saved"), reference=reference, max_steps=2)
    trainer = TGOLTrainer(build(), args, dataset)
    assert torch.equal(trainer.family.probe(), start)
    trainer.train()
    assert not torch.equal(trainer.family.probe(), start)
    with trainer.reference_policy():
        assert torch.equal(trainer.family.probe(), start if reference == "initial" else base)


@both
def test_a_file_without_weights_for_the_transformer_is_refused(build, config, dataset, tmp_path):
    save_file({"unet.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA weights for the transformer"):
        TGOLTrainer(build(), config(adapter_name_or_path=str(tmp_path)), dataset)


# ---- Generation and the card ----


@both
def test_images_depend_on_prompt_and_seed_and_not_on_the_batch_size(build):
    pipe = load_family(build()).pipeline  # with the head_dim that Meissonic lacks
    options = {"num_inference_steps": 3, "progress": False}
    one = generate_images(pipe, ["a cat", "a dog", "a cat"], [0, 1, 2], batch_size=1, **options)
    many = generate_images(pipe, ["a cat", "a dog", "a cat"], [0, 1, 2], batch_size=3, **options)
    assert [image.tobytes() for image in one] == [image.tobytes() for image in many]
    assert len({image.tobytes() for image in one}) == 3
    plain = pipe(["a dog"], num_inference_steps=3, generator=torch.Generator().manual_seed(1)).images[0]
    assert plain.tobytes() == one[1].tobytes()


# ---- What does not fit ----


@both
def test_a_mask_that_is_not_the_last_id_is_refused(build):
    pipe = build()
    pipe.scheduler = type(pipe.scheduler)(mask_token_id=32)
    with pytest.raises(ValueError, match=r"mask_token_id is 32.*vocab_size 34.*mask_token_id=33"):
        load_family(pipe)


@both
def test_an_autoencoder_with_more_codes_than_the_transformer_predicts_is_refused(build):
    pipe = build()
    pipe.vqvae.register_to_config(num_vq_embeddings=64)
    with pytest.raises(ValueError, match=r"64 codes.*codebook_size=32"):
        load_family(pipe)


def test_amused_loads_from_a_folder_like_any_pipeline(tmp_path):
    amused().save_pretrained(tmp_path)
    family = load_family(tmp_path)
    assert isinstance(family.pipeline, AmusedPipeline)
    torch.testing.assert_close(family.probe(), load_family(amused()).probe(), rtol=0, atol=1e-5)


# ---- The embedded twin of the shapes model ----


def test_the_masked_twin_ships_with_the_package_and_draws_the_colours_it_is_asked_for():
    pipe = load_masked_pipeline()
    assert sum(path.stat().st_size for path in MASKED_PIPELINE_DIR.rglob("*")) <= 3_000_000
    settings = {"num_inference_steps": 12, "guidance_scale": 2.0, "batch_size": 24, "progress": False}
    prompts = PROMPTS[::2]
    faithful = colour_faithfulness(generate_images(pipe, prompts, range(12), **settings), prompts)
    swapped = colour_faithfulness(generate_images(pipe, prompts[::-1], range(12), **settings), prompts)
    assert sum(faithful) / 12 > 0.9 > sum(swapped) / 12 + 0.1


@pytest.mark.slow
def test_the_papers_protocol_raises_the_win_rate_of_a_masked_token_model(config, tmp_path):
    """480 images, 60 updates of 64, the paper's loss settings; the trained score wins, the colours do not suffer."""
    settings = {"num_inference_steps": 12, "guidance_scale": 2.0, "batch_size": 48, "progress": False}
    pipe, prompts, tests = load_masked_pipeline(), list(PROMPTS) * 20, list(PROMPTS) * 6
    seeds = range(10**6, 10**6 + len(tests))
    images = generate_images(pipe, prompts, range(len(prompts)), **settings)
    before = generate_images(pipe, tests, seeds, **settings)
    data = Dataset.from_dict({"prompt": prompts, "image": images, "score": background_darkness(images, prompts)})
    options = {"max_steps": 60, "per_device_train_batch_size": 64, "lr_scheduler_type": "constant", "seed": 0}
    trainer = TGOLTrainer("shapes-masked", config(**options, output_dir=str(tmp_path)), data)
    trainer.train()
    after = generate_images(trainer.family.pipeline, tests, seeds, **settings)
    darkness, colours = (
        compare_scores(score.__name__, score(before, tests), score(after, tests), tests, trained=True)
        for score in (background_darkness, colour_faithfulness)
    )
    assert darkness.interval[0] > 0.6
    assert colours.interval[1] >= 0.5
