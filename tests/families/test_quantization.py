"""
QLoRA for every family, in 4 bits (NF4) and 8, through diffusers' own loading.

diffusers refuses to load quantised weights without a GPU. What it does after that check runs on bitsandbytes' CPU
kernels, so without a GPU the check and the default place of the weights, and nothing else, are taken out here.
"""

import itertools
import math
import re

import pytest
import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from peft import LoraConfig
from PIL import Image

from tests.helpers import quick
from tests.meissonic_standin import as_published
from tests.pipelines import SLOW, TINY
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.cli.train import main
from tgol_trainer.families import load_family
from tgol_trainer.families.quantization import denoiser_quantization

bnb = pytest.importorskip("bitsandbytes")
GPU = torch.cuda.is_available()
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
BITS = {"4 bits": (NF4, bnb.nn.Params4bit), "8 bits": ({"load_in_8bit": True}, bnb.nn.Int8Params)}


@pytest.fixture
def no_gpu_needed(monkeypatch):
    if GPU:
        return
    for kind in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(kind, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
    # With AVX512-BF16 the first pass in eval mode repacks the weights, after which no gradient passes.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


def test_a_config_of_the_whole_pipeline_is_taken_as_it_is():
    whole = PipelineQuantizationConfig(quant_mapping={"text_encoder": BitsAndBytesConfig(load_in_4bit=True)})
    assert denoiser_quantization({"unet": []}, whole) is whole


@pytest.mark.skipif(GPU, reason="says what happens without a GPU")
@pytest.mark.parametrize("options", [NF4, {"load_in_8bit": True}], ids=BITS)
def test_without_a_gpu_a_quantised_base_is_refused_with_the_remedy_before_weights_are_read(
    config, dataset, tmp_path, options
):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]}')
    with pytest.raises(ValueError, match=r"No GPU found.*on a machine with a GPU. Without one leave it out"):
        TGOLTrainer(str(tmp_path), config(), dataset, quantization_config=BitsAndBytesConfig(**options))


@pytest.mark.skipif(GPU, reason="says what happens without a GPU")
def test_tgol_train_on_a_quantised_base_without_a_gpu_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]}')
    (tmp_path / "rows.csv").write_text("image,prompt,score\na.png,a cat,1\nb.png,a cat,2\n")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    flags = {"model_name_or_path": tmp_path, "dataset_name": tmp_path / "rows.csv", "output_dir": tmp_path / "out"}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit):
        main([*arguments, "--load_in_4bit", "true", "--use_cpu", "true"])
    assert re.search(r"^error: No GPU found.*leave it out.*\n\Z", capsys.readouterr().err, re.MULTILINE)


def test_a_loaded_pipeline_cannot_be_quantised_afterwards(config, dataset):
    with pytest.raises(ValueError, match=r"quantization_config.*already loaded"):
        TGOLTrainer(stable_diffusion(), config(), dataset, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize("options", [NF4, {"load_in_8bit": True}], ids=BITS)
def test_layers_that_are_not_quantised_are_float32_unless_a_dtype_is_given(options, tmp_path, no_gpu_needed):
    """diffusers alone would make them float16."""
    stable_diffusion().save_pretrained(tmp_path)
    pipe = load_family(tmp_path, {"quantization_config": BitsAndBytesConfig(**options)}).pipeline
    assert {p.dtype for part in (pipe.unet.conv_in, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {
        torch.float32
    }


def adapter_of(model):
    """Weights of the adapter and the factor of each layer, by name without that of the adapter."""
    found = {re.sub(r"\.default(_0)?", "", name): p.data for name, p in model.named_parameters() if ".lora_" in name}
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            found[name] = torch.tensor(list(module.scaling.values()))
    return found


LATER = (
    *("sd v", "sd3", "flux without guidance", "ltx", "ltx-2", "krea-2", "ernie-image", "sana", "lumina-2", "auraflow"),
    *("chroma", *SLOW),
)
"""Loaded and trained by the code of the others; slow tests."""
# Each other family in 4 bits; in 8, one of the usual kind and the one that needs layers left out.
# The CPU kernel of bitsandbytes for 8 bits takes no more dimensions than rows and columns, and Kandinsky 5 has a grid.
CASES = quick(
    [case for case in itertools.product(TINY, BITS) if not (case[0].startswith("kandinsky") and case[1] == "8 bits")],
    *((name, "4 bits") for name in TINY if name not in LATER),
    *((name, "8 bits") for name in ("sd", "amused")),
)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_float32_adapter_trains_on_a_quantised_base_against_it_and_loads_into_it(
    name, bits, config, tmp_path, no_gpu_needed, repository
):
    facts, (options, kind), base_folder = TINY[name], BITS[bits], tmp_path / "base"
    kwargs = {"dtype": "bfloat16"}
    if name == "meissonic":
        as_published(facts.build(), base_folder)
        kwargs |= {"meissonic_repository": str(repository), "trust_remote_code": True}
    else:
        facts.build().save_pretrained(base_folder)
    args = config(
        **{"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": not GPU, "model_init_kwargs": kwargs},
        **{"learning_rate": facts.learning_rate, "activation_checkpointing": True, **facts.settings},
    )
    if (name, bits) == ("amused", "8 bits"):
        options = {**options, "llm_int8_skip_modules": ["channelwise_linear_1", "channelwise_linear_2"]}
    if name == "krea-2":  # two weights, of which 4 bits make one byte that bitsandbytes takes for a transposed matrix
        options = {**options, "llm_int8_skip_modules": ["projector"]}
    lora, quantization = LoraConfig(r=4, lora_alpha=12), BitsAndBytesConfig(**options)
    trainer = TGOLTrainer(str(base_folder), args, facts.dataset(), None, None, lora, quantization)

    denoiser, pipe = trainer.family.denoiser, trainer.family.pipeline
    layers = [module for module in denoiser.modules() if isinstance(getattr(module, "weight", None), kind)]
    assert len(layers) >= 10
    for place, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and not place.startswith(trainer.family.denoiser_name):
            assert all(weight.is_floating_point() for weight in part.parameters())
    assert {p.dtype for p in denoiser.parameters() if p.requires_grad} == {torch.float32}

    before, codes = trainer.family.probe(), [layer.weight.data.clone() for layer in layers]
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    # The kernels may differ with and without gradient; 1/T = 1000 multiplies that rounding.
    assert logged[0]["loss"] == pytest.approx(logged[0]["weights/mean"] * math.log(2), rel=1e-3)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged)
    assert all(torch.equal(layer.weight.data, was) for layer, was in zip(layers, codes, strict=True))
    trainer.model.eval()
    after = trainer.family.probe()
    assert not torch.allclose(after, before, atol=1e-4)
    with trainer.reference_policy():
        torch.testing.assert_close(trainer.family.probe(), before, rtol=0, atol=0)

    trainer.save_model(str(tmp_path / "saved"))
    fresh = load_family(str(base_folder), {**kwargs, "quantization_config": quantization})
    facts.load(fresh.pipeline, tmp_path / "saved")
    # diffusers loads the adapter in the base's dtype, so outputs agree up to the rounding of bfloat16.
    trained, loaded = adapter_of(denoiser), adapter_of(fresh.denoiser)
    assert trained and trained.keys() == loaded.keys()
    assert all(torch.equal(loaded[key].bfloat16(), trained[key].bfloat16()) for key in trained)
    assert (fresh.probe() - after).abs().mean() < 0.5 * (after - before).abs().mean()
