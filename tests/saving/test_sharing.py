"""The adapter's twin for ComfyUI: written at the end of a run, the trained weights, and never a wrong one."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

from tests import tiny
from tests.helpers import randomize
from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.families import wrap_pipeline
from tgol_trainer.saving import sharing
from tgol_trainer.saving.card import read_facts
from tgol_trainer.saving.comfyui import LAYOUTS, apply_as_comfyui, from_comfyui

MAKE = {
    "sd": tiny.stable_diffusion,
    "sd3": lambda: tiny.stable_diffusion_3("3.5"),
    "wan": tiny.wan,
    "amused": tiny.amused,
}


@pytest.fixture
def run(config, dataset, tmp_path):
    """A trainer whose policy has moved, as after training, and its base model's folder."""

    def make(family="sd", dtype=torch.float32, **options):
        MAKE[family]().save_pretrained(tmp_path / "base")
        lora = options.pop("lora", {"r": 4, "lora_alpha": 8})
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=dtype)
        denoiser = wrap_pipeline(pipeline)
        peft = LoraConfig(target_modules=options.pop("targets", list(denoiser.default_target_modules)), **lora)
        trainer = TGOLTrainer(pipeline, config(max_steps=1, **options), dataset, peft_config=peft)
        randomize(trainer.family.denoiser)
        return trainer

    return make


def twin(folder):
    return folder / f"{folder.name}_comfyui.safetensors"


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2, "use_dora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_gives_the_trained_output_in_comfyuis_formula(run, tmp_path, lora, dtype):
    trainer = run(lora=lora, dtype=dtype)
    trainer.save_model()
    folder = tmp_path / "run"
    base = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=dtype)  # the base's rounded weights
    base.unet.float()
    fresh = wrap_pipeline(base)
    layout = LAYOUTS["StableDiffusionPipeline"]
    apply_as_comfyui(from_comfyui(load_file(twin(folder)), fresh.denoiser, layout), fresh.denoiser)
    trainer.family.denoiser.float()
    torch.testing.assert_close(fresh.probe(), wrap_pipeline(trainer.family.pipeline).probe(), atol=1e-5, rtol=0)
    text = (folder / "README.md").read_text()
    assert "## Which file is for whom" in text and "ComfyUI loads nothing of this file" in text
    assert ("without the magnitudes of DoRA" in text) == ("use_dora" in lora)
    assert [item.program for item in read_facts(folder).files] == ["diffusers", "ComfyUI"]
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "base")
    fresh.load_lora_weights(folder)  # finds the adapter, not its twin
    assert fresh.unet.peft_config["default_0"].lora_alpha == lora["lora_alpha"]


@pytest.mark.parametrize(
    ("alpha", "said"), [(8, "at 0.5 times its strength"), (4, "ComfyUI loads this file as trained")]
)
def test_the_card_says_what_comfyui_makes_of_the_adapters_own_file(run, tmp_path, alpha, said):
    trainer = run("sd3", lora={"r": 4, "lora_alpha": alpha})
    trainer.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    assert said in text and "diffusers does not read this file" in text


def test_a_checkpoint_holds_the_adapter_alone(run, tmp_path):
    trainer = run(save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert twin(tmp_path / "run").is_file()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not list(checkpoint.glob("*comfyui*")) and "for whom" not in (checkpoint / "README.md").read_text()


def test_without_the_format_there_is_none_and_an_older_one_goes(run, tmp_path):
    trainer = run(share_formats=["diffusers"])
    twin(tmp_path / "run").parent.mkdir(exist_ok=True)
    twin(tmp_path / "run").write_bytes(b"of an adapter before")
    trainer.save_model()
    assert not twin(tmp_path / "run").exists() and not read_facts(tmp_path / "run").files


def test_a_model_that_comfyui_has_no_names_for_has_no_twin_unless_asked_and_then_an_error_before_training(
    run, tmp_path
):
    run("amused").save_model()
    assert not list((tmp_path / "run").glob("*comfyui*"))
    with pytest.raises(ValueError, match="`share_formats` names 'comfyui': the names of AmusedPipeline in"):
        run("amused", share_formats=["diffusers", "comfyui"]).train()


def test_a_module_without_a_name_is_an_error_if_asked_and_else_a_warning(run, tmp_path, caplog):
    targets = ["norm_out.linear", "to_q"]
    with pytest.raises(ValueError, match=r"no name for 1 trained modules \(such as norm_out.linear\)"):
        run("sd3", targets=targets, share_formats=["diffusers", "comfyui"]).train()
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        run("sd3", targets=targets).save_model()
    assert "No file for ComfyUI: 1 of 4 trained modules (such as norm_out.linear)" in caplog.text
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert not list((tmp_path / "run").glob("*comfyui*"))


@pytest.mark.parametrize(
    "broken",
    [
        lambda tensors: {k: v * 2 if k.endswith("alpha") else v for k, v in tensors.items()},
        lambda tensors: dict(list(tensors.items())[3:]),
        lambda tensors: {k.replace("attn2", "attn3"): v for k, v in tensors.items()},
    ],
    ids=["alpha", "a module less", "names"],
)
def test_a_wrong_twin_is_not_left_and_the_adapter_is_saved(run, tmp_path, caplog, monkeypatch, broken):
    right = sharing.to_comfyui
    monkeypatch.setattr(sharing, "to_comfyui", lambda *arguments: broken(right(*arguments)))
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        run().save_model()
    assert "No file for ComfyUI" in caplog.text and "The adapter itself is saved." in caplog.text
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "pytorch_lora_weights.safetensors" in names and not [name for name in names if "comfyui" in name]


@pytest.mark.parametrize("formats", [["comfyui"], ["diffusers", "a1111"], []])
def test_formats_are_checked(tmp_path, formats):
    with pytest.raises(ValueError, match="`share_formats` must be diffusers, or diffusers and comfyui"):
        TGOLConfig(output_dir=str(tmp_path), share_formats=formats, use_cpu=True)
