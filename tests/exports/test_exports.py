"""Exports: every format of every family read back by someone else's code, and what was not trained is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file

from tests import tiny, tiny_language, tiny_ltx, tiny_qwen
from tests.helpers import quick, randomize
from tests.meissonic_standin import as_published
from tgol_trainer import adapters
from tgol_trainer.cli import main
from tgol_trainer.exports import ExportError, export
from tgol_trainer.families import FluxFamily, ModelOrigin, load_family, wrap_pipeline
from tgol_trainer.families.flux2 import Flux2Family
from tgol_trainer.families.qwen_image import QwenImageFamily
from tgol_trainer.families.z_image import ZImageFamily
from tgol_trainer.saving.card import CardFacts, CardImage, EvaluationRow, Hyperparameter, read_facts, write_card
from tgol_trainer.saving.comfyui import LAYOUTS, apply_as_comfyui, from_comfyui
from tgol_trainer.saving.sharing import in_other_program
from tgol_trainer.shapes import EMBEDDED, load_pipeline

FAMILIES = {
    "sd": tiny.stable_diffusion,
    "sdxl": tiny.stable_diffusion_xl,
    "sd3": lambda: tiny.stable_diffusion_3("3.5"),
    "flux": tiny.flux,
    "flux2": tiny_language.flux2,
    "flux2-klein": tiny_language.flux2_klein,
    "z-image": tiny_language.z_image,
    "qwen-image": tiny_qwen.qwen_image,
    "wan": tiny.wan,
    "ltx": tiny_ltx.ltx,
    "ltx condition": tiny_ltx.ltx_condition,
    "ltx-2": tiny_ltx.ltx2,
    "amused": tiny.amused,
}
VARIANTS = {
    "alpha": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 3, "lora_alpha": 8, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 2, "use_dora": True},
}
# Every variant on one family, the one that needs most on the others.
CASES = [("sd", name) for name in VARIANTS] + [(family, "DoRA") for family in FAMILIES if family != "sd"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    # A pipeline that was loaded from a folder forgets the size that the tests' own makers set.
    for family in (FluxFamily, Flux2Family, QwenImageFamily, ZImageFamily):
        monkeypatch.setattr(family, "native_size", (16, 16))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of each family's base model, made when it is asked for."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family):
        if not (root / family).exists():
            FAMILIES[family]().save_pretrained(root / family)
        return root / family

    return folder


def adapter_run(folder, base, options=VARIANTS["alpha"], facts=None, targets=None):
    """What a run leaves: an adapter that changes the output, and a card. Returns the trained family."""
    family = load_family(str(base))
    config = LoraConfig(target_modules=targets or list(family.default_target_modules), **options)
    adapters.attach(family.denoiser, config, seed=0, probe=family.probe)
    randomize(family.denoiser)
    adapters.save_adapter(type(family.pipeline), family.denoiser_name, family.denoiser, folder)
    write_card(facts or CardFacts(model_name="a run", base_model_note="a local folder"), folder)
    return family


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- Read back by others ----


def with_peft(pipe, name, folder):
    from peft import PeftModel

    setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), str(folder)))
    return pipe


@pytest.mark.parametrize("family", quick(FAMILIES, "sd", "flux", "wan", "amused"))
def test_adapters_come_back_bit_for_bit_and_with_the_trained_output(family, bases, tmp_path):
    trained = adapter_run(tmp_path / "run", bases(family), VARIANTS["rank-stabilised"])
    output = trained.probe()
    for export_format in ("diffusers", "peft"):
        out = tmp_path / export_format
        row = export(tmp_path / "run", out, export_format, model_name_or_path=str(bases(family)))
        assert row.weights_equal is True
        assert (row.difference, row.image_difference) == (0, 0)
        assert row.effect > 1e-3
        # The same once more without our reading code.
        pipe = DiffusionPipeline.from_pretrained(bases(family))
        if export_format == "peft":
            with_peft(pipe, trained.denoiser_name, out)
        elif family == "amused":
            name = "pytorch_lora_weights.safetensors"
            pipe.transformer.load_lora_adapter(str(out), prefix="transformer", weight_name=name)
        else:
            pipe.load_lora_weights(out)
        assert torch.equal(wrap_pipeline(pipe).probe(), output)


@pytest.mark.parametrize(
    "family", quick([each for each in FAMILIES if each != "amused"], "sd", "wan", "z-image", "ltx")
)
def test_diffusers_own_converters_read_the_file_for_comfyui_as_trained_where_the_card_says_so(family, bases, tmp_path):
    """Their readers of other programs' files know nothing of ours: names and alpha must be as those write them."""
    trained = adapter_run(tmp_path / "run", bases(family), VARIANTS["rank-stabilised"])
    row = export(tmp_path / "run", tmp_path / "out", "comfyui", model_name_or_path=str(bases(family)))
    assert row.weights_equal is True
    assert row.difference < 1e-5 < row.effect
    file = tmp_path / "out" / "a-run_comfyui.safetensors"
    assert row.files == [file.name]
    assert file.stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode  # not for its owner alone
    pipe = DiffusionPipeline.from_pretrained(bases(family))
    said = in_other_program(trained, "comfyui")
    if said == "diffusers does not read this file.":
        with pytest.raises(ValueError, match="Invalid"):
            pipe.load_lora_weights(load_file(file))
        return
    assert said == "diffusers reads this file too."
    pipe.load_lora_weights(load_file(file))
    difference = (wrap_pipeline(pipe).probe() - trained.probe()).abs().max().item()
    assert difference < 1e-5


# Names that ComfyUI's loader has for real models, worked out by hand from its source.
LAYOUT = LAYOUTS["StableDiffusionPipeline"]
COMFYUI_NAMES = {
    "sd": ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight"],
    "sdxl": ["lora_unet_up_blocks_0_attentions_0_transformer_blocks_1_attn1_to_q.lora_up.weight"],
    "sd3": ["transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"],
    "flux": [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight",
        "transformer.transformer_blocks.0.ff_context.net.0.proj.alpha",
    ],
    "flux2": [
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight",
        "transformer.single_transformer_blocks.0.attn.to_out.alpha",
    ],
    "flux2-klein": ["transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight"],
    "z-image": [
        "diffusion_model.layers.0.attention.to_out.0.lora_A.weight",
        "diffusion_model.noise_refiner.0.attention.to_k.alpha",
    ],
    "qwen-image": ["diffusion_model.transformer_blocks.1.attn.to_out.0.lora_A.weight"],
    "ltx": ["diffusion_model.transformer_blocks.1.attn2.to_out.0.lora_A.weight"],
    "ltx condition": ["diffusion_model.transformer_blocks.0.attn2.to_k.lora_B.weight"],
    "ltx-2": ["diffusion_model.transformer_blocks.0.attn1.to_q.alpha"],
    "wan": ["diffusion_model.blocks.1.cross_attn.o.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.alpha"],
}


@pytest.mark.parametrize(
    ("family", "variant"),
    quick([case for case in CASES if case[0] in COMFYUI_NAMES], ("sd", "DoRA"), ("sd3", "DoRA"), ("wan", "DoRA")),
)
def test_comfyui_files_have_the_loaders_names_and_give_the_trained_output(family, variant, bases, tmp_path):
    options, targets = VARIANTS[variant], None
    if family == "flux":
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff_context.net.0.proj"]
    adapter_run(tmp_path / "run", bases(family), options, targets=targets)
    row = export(tmp_path / "run", tmp_path / "out", "comfyui", model_name_or_path=str(bases(family)))
    tensors = load_file(tmp_path / "out" / row.files[0])
    assert set(COMFYUI_NAMES[family]) <= set(tensors)
    assert len(tensors) == row.num_tensors
    assert row.difference < 1e-5 < row.effect
    alphas = [tensors[key].item() for key in tensors if key.endswith(".alpha")]
    expected = 8 * 3**0.5 if "use_rslora" in options else options["lora_alpha"]
    assert alphas == pytest.approx([expected] * len(alphas), rel=1e-12)


def test_the_magnitudes_of_dora_give_pefts_weight_in_comfyuis_formula(bases, tmp_path):
    """ComfyUI: (W + ΔW)·scale / |W|; PEFT, merged: (W + ΔW)·m / |W + ΔW|, norms by row."""
    trained = adapter_run(tmp_path / "run", bases("sd"), VARIANTS["DoRA"])
    export(tmp_path / "run", tmp_path / "out", "comfyui", model_name_or_path=str(bases("sd")))
    tensors = load_file(tmp_path / "out" / "a-run_comfyui.safetensors")
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "lora_unet_" + path.replace(".", "_")
    layer = trained.denoiser.get_submodule(path)
    base = layer.get_base_layer().weight.detach().double()
    update = tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double()
    update *= tensors[f"{name}.alpha"].item() / 4
    scale = tensors[f"{name}.dora_scale"].double()
    assert scale.shape == (len(base), 1)  # the shape that ComfyUI takes for the output axis
    comfyui = (base + update) * scale / base.norm(dim=1, keepdim=True)
    layer.merge()
    torch.testing.assert_close(comfyui, layer.get_base_layer().weight.detach().double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant"), quick(CASES, ("sd", "DoRA"), ("amused", "DoRA"), ("wan", "DoRA")))
def test_merged_pipelines_hold_no_adapter_and_give_the_trained_output(family, variant, bases, tmp_path):
    trained = adapter_run(tmp_path / "run", bases(family), VARIANTS[variant])
    row = export(tmp_path / "run", tmp_path / "out", "merged", model_name_or_path=str(bases(family)))
    assert row.difference < 1e-5 < row.effect
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in getattr(fresh, trained.denoiser_name).named_parameters() if "lora" in name]
    torch.testing.assert_close(wrap_pipeline(fresh).probe(), trained.probe(), atol=1e-5, rtol=0)
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(bases(family)) not in file.read_text(), file


def test_a_merged_pipeline_runs_where_peft_cannot_be_imported(bases, tmp_path):
    trained = adapter_run(tmp_path / "run", bases("sd"), VARIANTS["DoRA"])
    export(tmp_path / "run", tmp_path / "out", "merged", model_name_or_path=str(bases("sd")))
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "import numpy, torch; torch.set_num_threads(1)\n"
        "from diffusers import DiffusionPipeline\n"
        "from diffusers.utils import is_peft_available\n"
        "assert not is_peft_available()\n"
        "pipe = DiffusionPipeline.from_pretrained('out')\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "image = pipe('a cat', num_inference_steps=2, generator=generator, output_type='np').images\n"
        "numpy.save('image.npy', image)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)
    generator = torch.Generator().manual_seed(0)
    image = quiet(trained.pipeline)("a cat", num_inference_steps=2, generator=generator, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), image, atol=1e-4)


def test_weights_of_a_full_fine_tune_are_merged_exactly_and_have_no_other_format(bases, tmp_path):
    tuned = load_family(str(bases("sd")))
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.mul_(1.1)
    tuned.denoiser.save_pretrained(tmp_path / "run" / "unet")
    row = export(tmp_path / "run", tmp_path / "out", "merged", model_name_or_path=str(bases("sd")))
    assert row.difference == 0 < row.effect
    assert torch.equal(wrap_pipeline(DiffusionPipeline.from_pretrained(tmp_path / "out")).probe(), tuned.probe())
    with pytest.raises(ValueError, match="only be exported with `format='merged'` and `weight=1`"):
        export(tmp_path / "run", tmp_path / "other", "diffusers", model_name_or_path=str(bases("sd")))
    with pytest.raises(ValueError, match=r"trains its transformer.*no folder of that name"):
        export(tmp_path / "run", tmp_path / "other", "merged", model_name_or_path=str(bases("sd3")))


def test_meissonic_is_exported_with_its_authors_code_and_the_merged_snippet_runs(tmp_path, repository, monkeypatch):
    base = as_published(tiny.meissonic(), tmp_path / "base")
    options = {"meissonic_repository": str(repository), "trust_remote_code": True}
    trained = load_family(str(base), options)
    config = LoraConfig(target_modules=list(trained.default_target_modules), r=4, lora_alpha=8)
    adapters.attach(trained.denoiser, config, seed=0, probe=trained.probe)
    randomize(trained.denoiser)
    adapters.save_adapter(type(trained.pipeline), "transformer", trained.denoiser, tmp_path / "run")
    for export_format in ("diffusers", "peft", "merged"):
        out = tmp_path / export_format
        row = export(tmp_path / "run", out, export_format, model_name_or_path=str(base), model_init_kwargs=options)
        assert row.difference < 1e-5 < row.effect
    monkeypatch.chdir(tmp_path / "merged")
    scope = {}
    exec(code_of(tmp_path / "merged").replace("path/to/Meissonic", str(repository)), scope)
    torch.testing.assert_close(wrap_pipeline(scope["pipe"]).probe(), trained.probe(), atol=1e-5, rtol=0)
    assert Path("sample.png").is_file()


# ---- Strength and precision ----


@pytest.mark.parametrize("export_format", ["diffusers", "peft", "comfyui", "merged"])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 3}},
        pytest.param(VARIANTS["DoRA"], marks=pytest.mark.slow),
    ],
)
def test_a_weight_is_that_of_set_adapters(export_format, options, bases, tmp_path):
    adapter_run(tmp_path / "run", bases("sd"), options)
    row = export(tmp_path / "run", tmp_path / "out", export_format, model_name_or_path=str(bases("sd")), weight=0.5)
    expected = DiffusionPipeline.from_pretrained(bases("sd"))
    expected.load_lora_weights(tmp_path / "run", adapter_name="x")
    expected.set_adapters("x", 0.5)
    output = wrap_pipeline(expected).probe()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" if export_format == "merged" else bases("sd"))
    if export_format == "comfyui":
        # diffusers reads neither magnitudes nor an alpha a module from such files.
        apply_as_comfyui(from_comfyui(load_file(tmp_path / "out" / row.files[0]), pipe.unet, LAYOUT), pipe.unet)
    elif export_format == "diffusers":
        pipe.load_lora_weights(tmp_path / "out")
    elif export_format == "peft":
        with_peft(pipe, "unet", tmp_path / "out")
    torch.testing.assert_close(wrap_pipeline(pipe).probe(), output, atol=1e-5, rtol=0)
    assert row.weight == 0.5


@pytest.mark.parametrize("export_format", quick(["diffusers", "comfyui", "merged"], "comfyui", "merged"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_written_and_said(export_format, dtype, bases, tmp_path):
    adapter_run(tmp_path / "run", bases("sd"))
    row = export(tmp_path / "run", tmp_path / "out", export_format, model_name_or_path=str(bases("sd")), dtype=dtype)
    file = next((tmp_path / "out").rglob("unet/*.safetensors" if export_format == "merged" else "*.safetensors"))
    assert {tensor.dtype for name, tensor in load_file(file).items() if "alpha" not in name} == {dtype}
    assert 0 < row.difference < (0.2 if export_format == "merged" else 0.02) * row.effect
    assert not row.weights_equal
    assert f"| {str(dtype).removeprefix('torch.')} |" in (tmp_path / "out" / "README.md").read_text()


def test_an_update_that_half_precision_swallows_is_reported(bases, tmp_path, caplog):
    """An update far below the step of bfloat16 at the weights' size is gone after merging, and not in the adapter."""
    caplog.set_level("WARNING", logger="tgol_trainer")
    trained = adapter_run(tmp_path / "run", bases("sd"))
    for name, parameter in trained.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-4
    adapters.save_adapter(type(trained.pipeline), "unet", trained.denoiser, tmp_path / "run")
    settings = {"model_name_or_path": str(bases("sd")), "dtype": torch.bfloat16}
    row = export(tmp_path / "run", tmp_path / "a", "diffusers", **settings)
    assert row.difference < 0.1 * row.effect
    assert "Rounding" not in caplog.text
    row = export(tmp_path / "run", tmp_path / "b", "merged", **settings)
    assert row.difference > 0.3 * row.effect
    assert "Rounding to bfloat16 moved the output" in caplog.text


# ---- What is not as trained, or cannot be ----


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda tensors: {k: v * 2 if k.endswith("alpha") else v for k, v in tensors.items()}, "another output"),
        (lambda tensors: dict(list(tensors.items())[3:]), r"modules, where \d+ were trained; 1 do not match"),
        (lambda tensors: {k.replace("attn2", "attn3"): v for k, v in tensors.items()}, "match no module"),
    ],
    ids=["alpha", "a module less", "names"],
)
def test_a_wrong_file_is_found_and_leaves_nothing_behind(broken, message, bases, tmp_path, monkeypatch):
    from tgol_trainer.saving import sharing

    adapter_run(tmp_path / "run", bases("sd"))
    right = sharing.to_comfyui
    monkeypatch.setattr(sharing, "to_comfyui", lambda *arguments: broken(right(*arguments)))
    with pytest.raises(ValueError, match=message) as error:
        export(tmp_path / "run", tmp_path / "out", "comfyui", model_name_or_path=str(bases("sd")))
    assert message == "match no module" or isinstance(error.value, ExportError)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("family", "arguments", "error", "message"),
    [
        ("amused", {"export_format": "comfyui"}, ValueError, "The names of AmusedPipeline in ComfyUI"),
        ("sd", {"export_format": "a1111"}, ValueError, "must be one of diffusers, peft, comfyui, merged"),
        ("sd", {"model_name_or_path": None}, ValueError, "does not record the name of its base.*model_name_or_path"),
        ("sd", {"dtype": torch.float64}, ValueError, "torch.float32, torch.float16 or torch.bfloat16"),
        ("sd", {"output_dir": "run"}, FileExistsError, "exists and is not empty"),
        ("sd", {"directory": "nothing"}, FileNotFoundError, "neither pytorch_lora_weights.safetensors nor"),
        ("sd", {"directory": "base"}, FileNotFoundError, "is a complete pipeline already"),
        ("sd3", {"model_name_or_path": "base"}, ValueError, "holds no LoRA weights for the unet"),
        ("sdxl", {"model_name_or_path": "base"}, ValueError, r"another model than base.* 64 inputs.* has one of 32"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    family, arguments, error, message, bases, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    adapter_run(Path("run"), bases(family))
    Path("base").symlink_to(bases("sd"))
    settings = {"directory": "run", "output_dir": "out", "export_format": "diffusers"}
    settings = {**settings, "model_name_or_path": str(bases(family)), **arguments}
    with pytest.raises(error, match=message):
        export(**settings)
    assert not Path("out").exists()


def test_a_module_that_comfyuis_loader_has_no_name_for_is_named(bases, tmp_path):
    adapter_run(tmp_path / "run", bases("sd3"), targets=["norm_out.linear", "to_q"])
    with pytest.raises(ValueError, match=r"2?1 of 4 trained modules \(such as norm_out.linear\) have no name"):
        export(tmp_path / "run", tmp_path / "out", "comfyui", model_name_or_path=str(bases("sd3")))


def test_every_family_that_is_supported_has_a_layout_or_is_known_to_have_none():
    from tgol_trainer.families import FAMILIES

    none = {"AmusedPipeline", "Pipeline", "QwenImage21Pipeline", "SkyReelsV2Pipeline", "HunyuanVideoPipeline"}
    none |= {"Krea2Pipeline", "ErnieImagePipeline"}
    none |= {"SanaPipeline", "Lumina2Pipeline", "AuraFlowPipeline", "ChromaPipeline", "CogView4Pipeline"}
    none |= {"Kandinsky5T2IPipeline", "Kandinsky5T2VPipeline", "CogVideoXPipeline", "MochiPipeline"}
    none |= {"SanaVideoPipeline", "HiDreamImagePipeline", "BriaFiboPipeline", "Ideogram4Pipeline"}
    none |= {"HunyuanVideo15Pipeline", "KolorsPipeline"}
    assert set(FAMILIES) - set(LAYOUTS) == none


# ---- The card of an export, and the command ----


def code_of(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("export_format", quick(["diffusers", "peft", "merged"], "peft", "merged"))
def test_the_command_exports_a_run_on_its_recorded_base_and_the_snippet_of_the_card_runs(
    export_format, tmp_path, monkeypatch, capsys
):
    from PIL import Image

    load_pipeline().save_pretrained(tmp_path / "base")
    facts = CardFacts(
        model_name="me/dark",
        base_model_note=EMBEDDED["shapes"][1],
        example_prompt="a red circle",
        evaluations=[EvaluationRow("darkness", True, 0.9)],
        pictures=[CardImage("images/grid.png", "grid"), CardImage("gone.png")],
        license="mit",
    )
    adapter_run(tmp_path / "run", tmp_path / "base", facts=facts)
    (tmp_path / "run" / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "run" / "images" / "grid.png")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--format", export_format]) == 0
    assert "Largest difference from the trained output" in capsys.readouterr().out
    folder = tmp_path / f"run-{export_format}"
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "mit"
    assert ("lora" in data["tags"]) == (export_format != "merged")
    assert f"| `{export_format}` |" in text
    assert "| darkness | **yes** | 90.0% |" in text
    assert (folder / "images" / "grid.png").is_file()
    assert "gone.png" not in text
    assert str(tmp_path) not in text + (folder / "card_facts.json").read_text()
    monkeypatch.chdir(folder)
    exec(compile(code_of(folder), "card", "exec"), {})
    assert Image.open("sample.png").size == (32, 32)


def test_a_file_for_comfyui_can_lie_beside_the_adapter_and_its_row_joins_the_card(bases, tmp_path):
    adapter_run(tmp_path / "run", bases("sd"), facts=CardFacts(model_name="x", usage="run_me()"))
    for _ in range(2):
        export(tmp_path / "run", tmp_path / "run", "comfyui", model_name_or_path=str(bases("sd")))
    text = (tmp_path / "run" / "README.md").read_text()
    assert text.count("| `comfyui` | `x_comfyui.safetensors` | float32 |") == 1
    assert "models/loras" in text
    assert "ComfyUI itself was not run" in text
    assert "run_me()" in text
    assert len(read_facts(tmp_path / "run").exports) == 1
    pipe = DiffusionPipeline.from_pretrained(bases("sd"))
    pipe.load_lora_weights(tmp_path / "run")  # still finds the adapter, not the other file
    assert pipe.unet.peft_config["default_0"].lora_alpha == 8


def test_the_recorded_revision_is_loaded_unless_another_is_asked_for(monkeypatch):
    from tgol_trainer.exports.source import find_base

    facts = CardFacts(base_model="owner/base", base_model_revision="0123abc")
    assert find_base(Path("run"), facts, None, {}) == ("owner/base", {"revision": "0123abc"})
    assert find_base(Path("run"), facts, "owner/base", {"revision": "main"}) == ("owner/base", {"revision": "main"})
    assert find_base(Path("run"), facts, "owner/other", {}) == ("owner/other", {})


def test_an_adapter_in_pefts_format_names_its_base_only_by_hub_id(bases, tmp_path, monkeypatch):
    adapter_run(tmp_path / "run", bases("sd"))
    export(tmp_path / "run", tmp_path / "a", "peft", model_name_or_path=str(bases("sd")))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    monkeypatch.setattr("tgol_trainer.families.base.ModelOrigin.of_source", lambda *_, **__: ModelOrigin("o/b", "1"))
    export(tmp_path / "run", tmp_path / "b", "peft", model_name_or_path=str(bases("sd")))
    fields = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("o/b", "1")


def test_the_snippet_of_an_export_draws_at_the_size_that_its_run_set(bases, tmp_path):
    facts = CardFacts(model_name="x", hyperparameters=[Hyperparameter("resolution", "16x32")])
    adapter_run(tmp_path / "run", bases("sd"), facts=facts)
    export(tmp_path / "run", tmp_path / "out", "merged", model_name_or_path=str(bases("sd")))
    assert ", height=16, width=32)" in read_facts(tmp_path / "out").usage
