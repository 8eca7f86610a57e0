"""Levers of memory beside the blocks: an autoencoder in tiles, text encoders in 4 bits, a denoiser by torchao."""

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig

from tests.helpers import quick
from tests.pipelines import TINY
from tgol_trainer import TGOLTrainer
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.families.skeleton import load_skeleton
from tgol_trainer.fingerprint import component_fingerprint
from tgol_trainer.planning import Quantization, Setup
from tgol_trainer.planning.memory import predict
from tgol_trainer.planning.networks import prepare, weight_bytes

TILED, FOUR_BITS = FamilySettings(vae_tiling=True), FamilySettings(text_encoders_in_4bit=True)


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# ---- Tiles ----


def test_latents_of_tiles_are_those_of_diffusers_and_others_than_those_of_the_whole_image():
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipe = TINY["sd"].build()
    whole = load_family(TINY["sd"].build()).encode(pixels)["mean"]
    tiles = load_family(TINY["sd"].build(), settings=TILED).encode(pixels)["mean"]
    pipe.vae.enable_tiling()
    with torch.no_grad():
        assert torch.equal(tiles, pipe.vae.encode(pixels).latent_dist.mean)
    assert not torch.allclose(tiles, whole)


def test_a_plan_of_encoding_in_tiles_holds_a_tile(tmp_path):
    TINY["sd"].build().save_pretrained(tmp_path)
    setup = Setup(str(tmp_path), lora=LoraConfig(r=4), batch_size=1, resolution=(128, 128), sampling_batch=0)
    whole, tiles = (predict(dataclasses.replace(setup, vae_tiling=tiling)) for tiling in (False, True))
    assert tiles.encoding.working < whole.encoding.working / 3  # a quarter of the area, and what the tiles leave
    assert tiles.step == whole.step


def test_an_autoencoder_without_tiles_is_refused():
    with pytest.raises(ValueError, match=r"`vae_tiling`: VQModel knows no tiles. Leave it out."):
        load_family(TINY["amused"].build(), settings=TILED)


def test_latents_of_tiles_have_a_cache_of_their_own():
    whole, tiles = (load_family(TINY["sd"].build(), settings=each) for each in (None, TILED))
    assert component_fingerprint(whole.pipeline.vae) != component_fingerprint(tiles.pipeline.vae)


# ---- Text encoders ----

bnb = pytest.importorskip("bitsandbytes")


def held(network):
    """Bytes of weights and of what bitsandbytes keeps beside them."""
    tensors = {id(each): each for each in [*network.parameters(), *network.buffers()]}
    states = [each.quant_state for each in tensors.values() if getattr(each, "quant_state", None) is not None]
    beside = [part for state in states for part in (state.absmax, state.code, state.offset)]
    beside += [part for state in states for part in (state.state2.absmax, state.state2.code)]
    return sum(each.nbytes for each in [*tensors.values(), *beside])


@pytest.mark.parametrize("name", quick(["flux", "wan", "sana", "qwen-image", "flux.2"], "flux"))
def test_large_text_encoders_are_in_4_bits_and_a_plan_knows_their_bytes(name, tmp_path):
    TINY[name].build().save_pretrained(tmp_path)
    family = load_family(tmp_path, {"dtype": "bfloat16"}, FOUR_BITS)
    planned = load_skeleton(tmp_path, dtype="bfloat16")
    prepare(planned, Setup(str(tmp_path), lora=LoraConfig(), text_encoders_in_4bit=True))
    for part in (part for part in family.pipeline.components if part.startswith("text_encoder")):
        network, clip = getattr(family.pipeline, part), part == "text_encoder" and name == "flux"
        kinds = {type(weight) for weight in network.parameters()}
        assert (bnb.nn.Params4bit in kinds) == (not clip)
        assert network.device.type == "cpu"
        assert weight_bytes(getattr(planned.pipeline, part)) == pytest.approx(held(network), rel=0.001)
    assert bnb.nn.Params4bit not in {type(weight) for weight in family.denoiser.parameters()}


@pytest.mark.slow
def test_training_on_rounded_embeddings_begins_at_ln_2_and_its_cache_is_not_that_of_others(config, tmp_path):
    facts, model = TINY["flux"], tmp_path / "model"
    facts.build().save_pretrained(model)
    settings = {"cache_dir": str(tmp_path / "cache"), "max_steps": 2, "per_device_train_batch_size": 4}
    found = []
    for quantised in (False, True):
        args = config(text_encoders_in_4bit=quantised, **settings, **facts.settings)
        trainer = TGOLTrainer(str(model), args, facts.dataset())
        found.append(losses(trainer))
        weight = trainer.state.log_history[0]["weights/mean"]
        assert found[-1][0] == pytest.approx(weight * math.log(2), rel=1e-6)
    assert found[0][1] != found[1][1]
    assert len(list((tmp_path / "cache").glob("images-*"))) == 1
    assert len(list((tmp_path / "cache").glob("prompts-*"))) == 2


def test_text_encoders_that_cannot_be_quantised_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="is for a Hub id or a folder"):
        load_family(TINY["flux"].build(), settings=FOUR_BITS)
    TINY["sd"].build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CLIP's text encoders alone, which are small"):
        load_family(tmp_path, settings=FOUR_BITS)
    with pytest.raises(ValueError, match="CLIP's text encoders alone: leave it out"):
        predict(Setup(str(tmp_path), lora=LoraConfig(), text_encoders_in_4bit=True))


def test_a_config_that_quantises_text_encoders_itself_is_not_overruled(tmp_path):
    from diffusers import PipelineQuantizationConfig
    from transformers import BitsAndBytesConfig

    TINY["flux"].build().save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder_2": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(ValueError, match="both say how: leave one out"):
        load_family(tmp_path, {"quantization_config": config}, FOUR_BITS)
    loaded = load_family(tmp_path, {"quantization_config": config})
    assert bnb.nn.Int8Params in {type(weight) for weight in loaded.pipeline.text_encoder_2.parameters()}


# ---- torchao ----


def parts(tensor):
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("name", quick(["flux", "sd", "wan"], "flux"))
def test_a_denoiser_by_torchao_trains_from_ln_2_and_a_plan_knows_its_bytes(name, kind, config, tmp_path):
    pytest.importorskip("torchao")
    from tgol_trainer.cli.model import ModelArguments, quantization_config

    facts, model = TINY[name], tmp_path / "model"
    facts.build().save_pretrained(model)
    args = config(
        **{"max_steps": 2, "per_device_train_batch_size": 4, "model_init_kwargs": {"dtype": "bfloat16"}},
        **facts.settings,
    )
    quantization = quantization_config(ModelArguments(torchao=kind))
    trainer = TGOLTrainer(str(model), args, facts.dataset(), quantization_config=quantization)
    weights = [part for each in trainer.family.denoiser.parameters() for part in parts(each.detach())]
    weights += trainer.family.denoiser.buffers()
    first, second = losses(trainer)
    assert first == pytest.approx(trainer.state.log_history[0]["weights/mean"] * math.log(2), rel=1e-6)
    assert math.isfinite(second) and second != first
    planned = load_skeleton(model, dtype="bfloat16")
    lora = LoraConfig(r=16, lora_alpha=16)
    prepare(planned, Setup(str(model), lora=lora, quantization=Quantization(8, torchao=kind)))
    assert weight_bytes(planned.denoiser) == sum(each.nbytes for each in weights)
