"""Adapters: attached neutrally, switched safely, saved so that diffusers loads exactly what was trained."""

import json
import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import IA3Config, LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import randomize
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer, adapters
from tgol_trainer.families import load_family

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def attached(**options):
    family = load_family(stable_diffusion())
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})
    adapters.attach(family.denoiser, config, seed=0, probe=family.probe)
    return family


def output(pipe, steps=2):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipe("a cat", num_inference_steps=steps, generator=generator, output_type="np").images)


VARIANTS = {
    "alpha above rank": {"lora_alpha": 16},
    "alpha below rank": {"lora_alpha": 1},
    "rank-stabilised": {"lora_alpha": 8, "use_rslora": True},
    "DoRA": {"lora_alpha": 8, "use_dora": True},
    "convolutions": {"lora_alpha": 8, "target_modules": [*TARGETS, "conv1", "conv2"]},
    "rank pattern": {"lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_load_lora_weights_gives_the_trained_model_exactly(options, tmp_path):
    trained = attached(**options)
    randomize(trained.denoiser)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path)
    fresh = stable_diffusion()
    base = load_family(stable_diffusion()).probe()
    fresh.load_lora_weights(tmp_path)
    loaded = load_family(fresh)
    difference = (loaded.probe() - trained.probe()).abs().max().item()
    assert difference == 0.0
    assert not torch.equal(loaded.probe(), base)


def test_a_generated_image_is_the_trained_pipelines_own(tmp_path):
    trained = attached(lora_alpha=8)
    randomize(trained.denoiser)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path)
    fresh = stable_diffusion()
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(fresh), output(trained.pipeline), rtol=0, atol=1e-5)


def test_without_the_metadata_alpha_would_be_lost(tmp_path, monkeypatch):
    """What the metadata is for: break the save and the loaded output is wrong."""
    trained = attached(lora_alpha=16)
    randomize(trained.denoiser)
    monkeypatch.setattr(adapters, "adapter_metadata", lambda config: None)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path)
    fresh = stable_diffusion()
    fresh.load_lora_weights(tmp_path)
    assert not torch.allclose(load_family(fresh).probe(), trained.probe(), atol=1e-4)


def test_the_metadata_names_rank_alpha_targets_and_what_differs_from_the_defaults_only(tmp_path):
    trained = attached(lora_alpha=8, use_rslora=True)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata == {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.target_modules": sorted(TARGETS),
        "unet.use_rslora": True,
    }


def test_a_new_adapter_changes_nothing_and_only_it_is_trained():
    base = load_family(stable_diffusion()).probe()
    family = attached(lora_alpha=8)
    assert torch.equal(family.probe(), base)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in family.denoiser.named_parameters())


def test_the_seed_decides_the_adapters_random_half_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, second = attached(init_lora_weights="gaussian"), attached(init_lora_weights="gaussian")
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first.denoiser.parameters(), second.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("second", [False, True], ids=["adapters off", "second adapter"])
def test_gradients_are_restored_even_if_the_reference_pass_fails(second):
    family = attached(lora_alpha=8)
    if second:
        adapters.sync_reference(family.denoiser)
    trainable = [name for name, p in family.denoiser.named_parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="boom"), adapters.reference_policy(family.denoiser):
        raise RuntimeError("boom")
    assert [name for name, p in family.denoiser.named_parameters() if p.requires_grad] == trainable
    assert all(adapters.REFERENCE not in name for name in trainable)


def test_a_synced_reference_is_the_policy_of_that_moment_and_stays_when_the_policy_moves():
    family = attached(lora_alpha=8)
    randomize(family.denoiser)
    at_sync = family.probe()
    adapters.sync_reference(family.denoiser)
    randomize(family.denoiser)
    with adapters.reference_policy(family.denoiser):
        assert torch.equal(family.probe(), at_sync)
    assert not torch.equal(family.probe(), at_sync)
    adapters.sync_reference(family.denoiser)
    moved = family.probe()
    with adapters.reference_policy(family.denoiser):
        assert torch.equal(family.probe(), moved)


REFUSED = {
    "another PEFT type": (IA3Config(target_modules=["to_k"]), TypeError, "IA3Config.*LoraConfig"),
    "trained biases": (LoraConfig(bias="all"), ValueError, r'bias="none"'),
    "full modules": (LoraConfig(modules_to_save=["conv_in"]), ValueError, "modules_to_save"),
    "PiSSA": (LoraConfig(init_lora_weights="pissa"), ValueError, "does not start as the reference"),
    "a random start": (LoraConfig(init_lora_weights=False), ValueError, "does not start as the reference"),
}


@pytest.mark.parametrize(("config", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_under_which_off_is_not_the_base_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        adapters.check_peft_config(config)


def test_dropout_is_allowed_with_a_warning(caplog):
    caplog.set_level(logging.WARNING)
    adapters.check_peft_config(LoraConfig(lora_dropout=0.1))
    assert "log-ratio carries that noise" in caplog.text


def test_a_base_that_changes_under_the_adapter_is_found_by_comparing_outputs():
    family = attached(lora_alpha=8)
    expected = family.probe()
    next(p for name, p in family.denoiser.named_parameters() if "base_layer" in name).data += 0.1
    with pytest.raises(ValueError, match="no longer gives the base model's output"):
        adapters.check_reference(family.denoiser, expected, family.probe)


def test_a_model_that_already_has_adapters_is_refused_with_the_way_out(config, dataset):
    pipe = stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(target_modules=TARGETS), "style")
    with pytest.raises(ValueError, match=r"style.*unload_lora_weights.*adapter_name_or_path"):
        TGOLTrainer(pipe, config(), dataset)


# ---- Wrapped networks, and what is read back ----


class Wrapper(torch.nn.Module):
    """Another module around a network, under the name that DistributedDataParallel, FSDP1 or DeepSpeed give it."""

    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)


WRAPPED = {
    "torch.compile": torch.compile,
    "DistributedDataParallel": lambda model: Wrapper(model, "module"),
    "both": lambda model: Wrapper(torch.compile(model), "module"),
    "FSDP1": lambda model: Wrapper(model, "_fsdp_wrapped_module"),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_an_adapter_of_a_wrapped_network_is_saved_and_loaded_as_that_of_the_bare_one(wrap, tmp_path):
    trained = attached(lora_alpha=8)
    randomize(trained.denoiser)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path / "bare")
    wrapped = wrap(trained.denoiser)
    adapters.save_adapter(StableDiffusionPipeline, "unet", wrapped, tmp_path / "wrapped")
    gathered = {f"module.{name}": tensor for name, tensor in trained.denoiser.state_dict().items()}
    adapters.save_adapter(StableDiffusionPipeline, "unet", wrapped, tmp_path / "gathered", state_dict=gathered)
    files = [load_file(tmp_path / name / adapters.WEIGHTS_NAME) for name in ("bare", "wrapped", "gathered")]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for name, tensor in files[0].items():
        assert torch.equal(tensor, files[1][name]) and torch.equal(tensor, files[2][name])
    other = attached(lora_alpha=8)
    adapters.load_adapter(wrap(other.denoiser), "unet", tmp_path / "bare" / adapters.WEIGHTS_NAME)
    assert torch.equal(other.probe(), trained.probe())


def test_layers_that_were_compiled_one_by_one_leave_no_trace_in_the_file(tmp_path):
    trained = attached(lora_alpha=8)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path / "bare")
    trained.denoiser.mid_block = torch.compile(trained.denoiser.mid_block)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path / "inner")
    bare, inner = (load_file(tmp_path / name / adapters.WEIGHTS_NAME) for name in ("bare", "inner"))
    assert bare.keys() == inner.keys()
    adapters.load_adapter(trained.denoiser, "unet", tmp_path / "bare" / adapters.WEIGHTS_NAME)


def test_a_pipeline_with_a_compiled_denoiser_starts_from_an_adapter(config, dataset, saved):
    folder, start = saved
    pipe = stable_diffusion()
    bare, pipe.unet = pipe.unet, torch.compile(pipe.unet)
    adapters.load_initial(pipe, "unet", str(folder), keep_as_reference=False)
    pipe.unet = bare
    assert torch.equal(load_family(pipe).probe(), start)


@pytest.mark.parametrize("harm", ["NaN", "a file cut by the disk", "a tensor less"])
def test_a_save_that_cannot_be_read_back_as_it_was_is_an_error(harm, tmp_path, monkeypatch):
    trained = attached(lora_alpha=8)
    if harm == "NaN":
        next(p for name, p in trained.denoiser.named_parameters() if "lora_B" in name).data[0] = torch.nan
    else:
        write = StableDiffusionPipeline.save_lora_weights

        def save(folder, weight_name, **options):
            if harm == "a tensor less":
                options["unet_lora_layers"].popitem()
            write(folder, weight_name=weight_name, **options)
            if harm == "a file cut by the disk":
                (folder / weight_name).write_bytes((folder / weight_name).read_bytes()[:-8])

        monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", save)
    with pytest.raises(OSError, match=r"is not the adapter that was trained|is not a whole safetensors file"):
        adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path)


# ---- Starting from a saved adapter ----


@pytest.fixture
def saved(tmp_path):
    trained = attached(lora_alpha=8)
    randomize(trained.denoiser)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path / "saved")
    return tmp_path / "saved", trained.probe()


@pytest.mark.parametrize("reference", ["base", "initial"])
def test_training_continues_from_a_saved_adapter_against_the_reference_asked_for(config, dataset, saved, reference):
    folder, start = saved
    args = config(adapter_name_or_path=str(folder), reference=reference)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset)
    assert torch.equal(trainer.family.probe(), start)
    with trainer.reference_policy():
        expected = start if reference == "initial" else load_family(stable_diffusion()).probe()
        assert torch.equal(trainer.family.probe(), expected)
    trainer.train()
    assert not torch.equal(trainer.family.probe(), start)
    with trainer.reference_policy():
        assert torch.equal(trainer.family.probe(), expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_on_a_bfloat16_base_policy_and_reference_start_with_the_float32_values_of_the_file(
    config, dataset, tmp_path, options
):
    trained = attached(lora_alpha=8, **options)
    randomize(trained.denoiser)
    adapters.save_adapter(StableDiffusionPipeline, "unet", trained.denoiser, tmp_path)
    file = load_file(tmp_path / adapters.WEIGHTS_NAME)
    assert any(not torch.equal(tensor.bfloat16().float(), tensor) for tensor in file.values())
    args = config(adapter_name_or_path=str(tmp_path), reference="initial")
    denoiser = TGOLTrainer(stable_diffusion().to(torch.bfloat16), args, dataset).family.denoiser
    assert {p.dtype for name, p in denoiser.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    for name in (adapters.POLICY, adapters.REFERENCE):
        found = get_peft_model_state_dict(denoiser, adapter_name=name)
        assert {f"unet.{key}" for key in found} == set(file)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor.detach(), file[f"unet.{key}"], rtol=0, atol=0)
        scalings = {module.scaling[name] for module in denoiser.modules() if hasattr(module, "scaling")}
        assert scalings == {8 / 4}


def test_what_is_published_of_a_continued_adapter_is_relative_to_the_true_base(config, dataset, saved, tmp_path):
    folder, _ = saved
    args = config(adapter_name_or_path=str(folder), reference="initial", save_strategy="steps", save_steps=2)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    fresh = stable_diffusion()
    fresh.load_lora_weights(tmp_path / "out")
    assert torch.equal(load_family(fresh).probe(), trainer.family.probe())
    assert not (tmp_path / "out" / adapters.REFERENCE_WEIGHTS_NAME).exists()
    resumed = TGOLTrainer(stable_diffusion(), args, dataset)
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert torch.equal(resumed.family.probe(), trainer.family.probe())


def test_a_file_without_weights_for_the_denoiser_is_refused(config, dataset, tmp_path):
    save_file({"transformer.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA weights for the unet"):
        TGOLTrainer(stable_diffusion(), config(adapter_name_or_path=str(tmp_path)), dataset)


def first_of(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def without(tensors, ending):
    return {name: tensor for name, tensor in tensors.items() if name != first_of(tensors, ending)}


DAMAGED = {
    "other shapes": (
        lambda t: {name: torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:]) for name, tensor in t.items()},
        "cannot be loaded.*size mismatch",
    ),
    "one tensor less": (lambda t: without(t, "lora_B.weight"), "does not fit the unet: 1 tensors are missing"),
    "a layer that is not there": (
        lambda t: {**t, "unet.no.lora_A.weight": torch.zeros(4, 4), "unet.no.lora_B.weight": torch.zeros(4, 4)},
        "does not fit the unet: 2 of its tensors belong to no layer",
    ),
    "a component that is not there": (
        lambda t: {
            **t,
            "transformer.x.lora_A.weight": torch.zeros(4, 4),
            "transformer.x.lora_B.weight": torch.zeros(4, 4),
        },
        "also holds weights for transformer, which this model lacks",
    ),
    "NaN": (lambda t: {name: tensor * torch.nan for name, tensor in t.items()}, "hold NaN or infinite"),
    "empty tensors": (lambda t: {name: tensor[:0] for name, tensor in t.items()}, "tensors are empty"),
    "no tensor": (lambda t: {}, "holds no tensors"),
    "a DoRA of kohya": (
        lambda t: {
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.zeros(4, 32),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.zeros(32, 4),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(4.0),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale": torch.ones(1, 32),
        },
        "DoRA in the format of kohya or LyCORIS",
    ),
    "cut in half": (lambda content: content[: len(content) // 2], "is not a whole safetensors file"),
    "text": (lambda content: b"not found", "is not a whole safetensors file"),
    "an empty file": (lambda content: b"", r"\(0 bytes\) is not a whole safetensors file"),
    "no file": (None, "should hold an adapter and holds none"),
    "no folder": (None, "names neither a file, a folder nor a Hub id"),
}


@pytest.mark.parametrize("road", ["train", "evaluate and generate"])
@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_an_adapter_that_would_be_another_than_its_file_is_refused_everywhere(saved, tmp_path, road, damage, message):
    folder, _ = saved
    file = folder / adapters.WEIGHTS_NAME
    if damage is None:
        file.unlink()
        folder = folder / "none" if "nor a Hub id" in message else folder
    elif "whole safetensors" in message:
        file.write_bytes(damage(file.read_bytes()))
    else:
        with safe_open(file, "pt") as read:
            metadata = read.metadata()
        save_file(damage(load_file(file)), file, metadata=metadata)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        if road == "train":
            adapters.load_initial(stable_diffusion(), "unet", str(folder), keep_as_reference=False)
        else:
            adapters.load_trained(stable_diffusion(), "unet", str(folder))
