"""Quantised bases: up to where a GPU is needed through diffusers, and beyond it on 4-bit layers that run on a CPU."""

import math

import pytest
import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from peft import LoraConfig

from tests.conftest import scored_dataset
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.backbones import load_backbone
from tgol_trainer.backbones.quantization import denoiser_quantization
from tgol_trainer.shapes import load_pipeline

bnb = pytest.importorskip("bitsandbytes")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def in_4_bits(pipe):
    """
    Replace attention projections of the UNet by NF4 layers, as bitsandbytes does on loading.

    On CPUs with AVX512-BF16 the first pass in eval mode repacks the weights for inference, after which no gradient
    passes (bitsandbytes/nn/modules.py, Linear4bit.forward); that is switched off, as a GPU has none of it.
    """
    for name, module in list(pipe.unet.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.endswith(ATTENTION):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            layer.support_avx512bf16_for_cpu = False
            layer.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(pipe.unet.get_submodule(parent), child, layer.to("cpu"))
    return pipe


def test_the_denoiser_and_nothing_else_is_quantised(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert denoiser_quantization(str(tmp_path), config).quant_mapping == {"unet": config}
    whole = PipelineQuantizationConfig(quant_mapping={"text_encoder": config})
    assert denoiser_quantization(str(tmp_path), whole) is whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_without_a_gpu_loading_a_quantised_base_ends_in_diffusers_own_error(config, dataset, tmp_path, options):
    stable_diffusion().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="GPU"):
        TGOLTrainer(str(tmp_path), config(), dataset, quantization_config=BitsAndBytesConfig(**options))


def test_a_loaded_pipeline_cannot_be_quantised_afterwards(config, dataset):
    with pytest.raises(ValueError, match=r"quantization_config.*already loaded"):
        TGOLTrainer(stable_diffusion(), config(), dataset, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_a_float32_adapter_trains_on_4_bit_weights_against_the_4_bit_reference(config, tmp_path):
    data = scored_dataset(32, side=32)
    trainer = TGOLTrainer(in_4_bits(load_pipeline()), config(), data, peft_config=LoraConfig(r=4, lora_alpha=8))
    assert sum(p.dtype == torch.uint8 for p in trainer.model.parameters()) > 10
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    # 4-bit kernels differ with and without gradient; 1/T = 1000 multiplies that rounding.
    assert first["loss"] == pytest.approx(first["weights/mean"] * math.log(2), rel=1e-3)
    trainer.save_model(str(tmp_path))
    trainer.model.eval()
    fresh, base = in_4_bits(load_pipeline()), load_backbone(in_4_bits(load_pipeline()))
    fresh.load_lora_weights(tmp_path)
    trained = trainer.backbone.probe()
    torch.testing.assert_close(load_backbone(fresh).probe(), trained, rtol=0, atol=1e-5)
    with trainer.reference_policy():
        torch.testing.assert_close(trainer.backbone.probe(), base.probe(), rtol=0, atol=1e-5)
    assert (trained - base.probe()).abs().max() > 1e-3
