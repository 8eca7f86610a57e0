"""Load the denoiser and the text encoders of a base model in 4 or 8 bits; the adapter stays float32."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING, Any

import torch

from .inspection import parts_of_index

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig


def denoiser_quantization(index: dict[str, Any], config: Any) -> PipelineQuantizationConfig:
    """
    Apply a quantisation config of diffusers, such as `BitsAndBytesConfig`, to a pipeline's denoiser alone.

    `index` is the pipeline's `model_index.json`, which says whether the denoiser is a `transformer`, two of them, or
    a `unet`. A `PipelineQuantizationConfig` is returned as it is. Raises `ValueError` where bitsandbytes is asked for
    and cannot run here: no GPU, or bitsandbytes missing or too old.
    """
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
    from diffusers.quantizers import DiffusersAutoQuantizer

    if isinstance(config, PipelineQuantizationConfig):
        return config
    if isinstance(config, BitsAndBytesConfig):
        # Otherwise the same check comes after the download, which can be tens of gigabytes.
        try:
            DiffusersAutoQuantizer.from_config(config, pre_quantized=False).validate_environment()
        except (RuntimeError, ImportError) as error:
            raise ValueError(
                f"{error} `quantization_config` (--load_in_4bit, --load_in_8bit) works with bitsandbytes "
                "(`pip install 'tgol_trainer[quantization]'`) on a machine with a GPU. Without one leave it out; "
                "`dtype='bfloat16'` halves the memory that the base model takes."
            ) from error
    denoisers = [name for name in ("transformer", "transformer_2", "unet") if name in parts_of_index(index)]
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(denoisers, config))


def add_text_encoders(index: dict[str, Any], options: dict[str, Any]) -> None:
    """
    Add the large text encoders of a pipeline, in NF4 of bitsandbytes, to the options of `from_pretrained`.

    `index` is as in [`denoiser_quantization`], which has been applied before. Raises `ValueError` where there is none,
    where bitsandbytes is missing, and beside a `PipelineQuantizationConfig` that quantises text encoders itself.
    """
    from diffusers import PipelineQuantizationConfig
    from transformers import BitsAndBytesConfig

    names = [name for name, kind in parts_of_index(index).items() if _is_large_text_encoder(name, kind)]
    if not names:
        raise ValueError("`text_encoders_in_4bit`: this pipeline has CLIP's text encoders alone, which are small.")
    mapping = dict(options["quantization_config"].quant_mapping or {}) if "quantization_config" in options else {}
    if any(name.startswith("text_encoder") for name in mapping):
        raise ValueError("`text_encoders_in_4bit` and `quantization_config` both say how: leave one out.")
    dtype = options["dtype"].get("default", torch.float32) if isinstance(options["dtype"], dict) else options["dtype"]
    try:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    except PackageNotFoundError as error:
        raise ValueError(
            "`text_encoders_in_4bit` needs bitsandbytes: pip install 'tgol_trainer[quantization]'."
        ) from error
    mapping |= dict.fromkeys(names, config)
    options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)


def large_text_encoders(pipeline: DiffusionPipeline) -> list[str]:
    """Return the names of the text encoders that `text_encoders_in_4bit` means: all but CLIP's."""
    components = pipeline.components.items()
    return [
        name for name, each in components if each is not None and _is_large_text_encoder(name, type(each).__name__)
    ]


def _is_large_text_encoder(name: str, kind: str) -> bool:
    return name.startswith("text_encoder") and not kind.startswith("CLIP")
