"""What is said of pipelines without a family, and of bases that are distilled to few steps."""

import inspect
import json
import logging
from pathlib import Path

import diffusers
import pytest

from tests.tiny import flux, stable_diffusion, stable_diffusion_xl
from tests.tiny_images import ernie_image, krea2
from tests.tiny_language import flux2_klein, z_image
from tgol_trainer.families import FAMILIES, read_index, wrap_pipeline
from tgol_trainer.families.inspection import inspect_pipeline, parts_of_index
from tgol_trainer.families.unsupported import REASONS, reason_for

DISTILLED = {
    "Z-Image-Turbo": (z_image, "Tongyi-MAI/Z-Image"),
    "FLUX.1-schnell": (flux, "black-forest-labs/FLUX.1-dev"),
    "FLUX.2-klein-4B": (flux2_klein, "black-forest-labs/FLUX.2-klein-base-4B"),
    "Krea-2-Turbo": (krea2, "krea/Krea-2-Raw"),
    "ERNIE-Image-Turbo": (ernie_image, "baidu/ERNIE-Image"),
    "sdxl-turbo": (stable_diffusion_xl, "stabilityai/stable-diffusion-xl-base-1.0"),
    "SDXL-Lightning": (stable_diffusion_xl, "stabilityai/stable-diffusion-xl-base-1.0"),
    "my-model-4-step": (stable_diffusion, "the model that it was distilled from"),
    "LCM_Dreamshaper_v7": (stable_diffusion, "the model that it was distilled from"),
}
WHOLE = {
    "Z-Image": z_image,
    "FLUX.2-klein-base-4B": flux2_klein,
    "stable-diffusion-v1-5": stable_diffusion,
    "sprinting-dogs": stable_diffusion,
    "FLUX.1-dev": flux,
    "flux-dev-de-distill": lambda: flux(guidance_embeds=False),
}


def warnings_of(pipeline, name, caplog):
    pipeline.register_to_config(_name_or_path=f"/models/{name}")
    with caplog.at_level(logging.WARNING, "tgol_trainer"):
        wrap_pipeline(pipeline)
    return caplog.text


@pytest.mark.parametrize("name", DISTILLED)
def test_a_base_distilled_to_few_steps_is_named_with_the_model_to_train_instead(name, caplog):
    build, base = DISTILLED[name]
    text = warnings_of(build(), name, caplog)
    assert "distilled to few steps, as its name or config says. Training undoes that" in text
    assert f"Train {base} instead" in caplog.text


def test_a_config_that_says_it_is_distilled_is_believed(caplog):
    klein = flux2_klein()
    klein.register_to_config(is_distilled=True)
    assert "Train the `FLUX.2-klein-base` model of its size instead" in warnings_of(klein, "mine", caplog)
    schnell = flux(guidance_embeds=False)
    schnell.scheduler.register_to_config(use_dynamic_shifting=False, shift=1.0)
    assert "Train black-forest-labs/FLUX.1-dev instead" in warnings_of(schnell, "mine", caplog)


@pytest.mark.parametrize("name", WHOLE)
def test_other_bases_are_not_called_distilled(name, caplog):
    assert "distilled to few steps" not in warnings_of(WHOLE[name](), name, caplog)


def test_the_error_for_an_unknown_pipeline_says_what_was_found_and_what_was_not(tmp_path):
    parts = {
        "scheduler": ["diffusers", "DDPMScheduler"],
        "transformer": ["diffusers", "HunyuanDiT2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanDiTPipeline", **parts}))
    with pytest.raises(ValueError, match="HunyuanDiTPipeline is not supported yet") as error:
        read_index(str(tmp_path), {})
    text = str(error.value)
    found, missing = text.split("Not found")
    assert all(fact in found for fact in ("levels of DDPM", "AutoencoderKL: scaling_factor", "encode_prompt"))
    assert all(fact in missing for fact in ("HunyuanDiT2DModel has no `add_adapter`", "load_lora_weights"))
    assert "CONTRIBUTING.md, 'A new model family'" in text
    values = {"_class_name": "x", "text_encoder_select_layers": [2, 5], "sizes": [1], "image_encoder": [None, None]}
    assert parts_of_index({**values, **parts}).keys() == {"scheduler", "transformer", "vae"}


def test_pipelines_that_cannot_be_inspected_say_why():
    assert "modular pipeline has no components" in inspect_pipeline("AnimaModularPipeline", {})
    assert "has no such class" in inspect_pipeline("NoSuchPipeline", {})
    assert "only beside torch, transformers, onnx" in inspect_pipeline("OnnxStableDiffusionPipeline", {})


def test_a_pipeline_that_needs_another_package_says_which(tmp_path, monkeypatch):
    class Absent:
        _backends = ("torch", "sentencepiece_of_nobody")

    monkeypatch.setattr(diffusers, "KolorsPipeline", Absent)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(ValueError, match="KolorsPipeline needs sentencepiece_of_nobody: pip install"):
        read_index(str(tmp_path), {})


def pipelines_with_lora():
    """Names of the installed pipelines that take a prompt and load LoRA adapters, without the deprecated ones."""
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            continue
        loads = any(base.__name__.endswith("LoraLoaderMixin") for base in kind.__mro__)
        if loads and ".deprecated." not in kind.__module__ and "prompt" in inspect.signature(kind.__call__).parameters:
            yield name


def test_every_pipeline_that_loads_lora_is_supported_or_named_with_the_reason():
    names = set(pipelines_with_lora())
    assert len(names) > 100
    reasons = {name: reason_for(name, FAMILIES) for name in names - FAMILIES.keys()}
    assert [name for name, reason in reasons.items() if reason is None] == []
    told = {name for name, reason in reasons.items() if "takes an image or a video" not in reason}
    told -= {f"{name.removesuffix('Pipeline')}PAGPipeline" for name in FAMILIES}
    # Of another package, or of a later diffusers.
    absent = {
        name for name in REASONS if ".dummy_" in getattr(getattr(diffusers, name, None), "__module__", ".dummy_")
    }
    assert told | absent == REASONS.keys()


def test_the_error_and_the_page_say_why_a_pipeline_has_no_family(tmp_path):
    page = Path("docs/families.md").read_text(encoding="utf-8")
    for name, reason in REASONS.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=f"{name} is not supported") as error:
            read_index(str(tmp_path), {})
        assert reason in str(error.value)
        assert f"| `{name}` | {reason} |" in page


def test_a_pipeline_that_takes_an_image_names_the_plain_one():
    assert "load them with that class" in reason_for("WanVideoToVideoPipeline", FAMILIES)
    assert "those of StableDiffusionXLPipeline" in reason_for("StableDiffusionXLInpaintPipeline", FAMILIES)
    assert "modular blocks alone" in reason_for("AnimaModularPipeline", FAMILIES)
    assert "deprecated" in reason_for("TextToVideoSDPipeline", FAMILIES)
    assert "diffusers.SanaPipeline.from_pretrained" in reason_for("SanaPAGPipeline", FAMILIES)
    assert "takes no `prompt`" in reason_for("LEditsPPPipelineStableDiffusionXL", FAMILIES)
    assert reason_for("OnnxStableDiffusionPipeline", FAMILIES) is None
    assert reason_for("HunyuanDiTPipeline", FAMILIES) is None


def test_a_folder_of_a_modular_pipeline_is_called_so(tmp_path):
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a modular pipeline of diffusers"):
        read_index(str(tmp_path), {})
