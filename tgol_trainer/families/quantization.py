"""Load the denoiser of a base model in 4 or 8 bits; the adapter on it stays float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig


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
    denoisers = [name for name in ("transformer", "transformer_2", "unet") if (index.get(name) or [None])[-1]]
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(denoisers, config))
