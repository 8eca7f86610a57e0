"""A quantised base model: the denoiser's weights in 4 or 8 bits, the adapter in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig


def denoiser_quantization(source: str, config: Any, **hub: Any) -> PipelineQuantizationConfig:
    """
    Aim a quantisation config at a pipeline's denoiser.

    Args:
        source (`str`):
            Hub id or folder of the pipeline; its index says whether the denoiser is a `transformer` or a `unet`.
        config (`Any`):
            What diffusers takes for one model, such as `diffusers.BitsAndBytesConfig(load_in_4bit=True)`; a
            `PipelineQuantizationConfig` is returned as it is.
        hub:
            `revision`, `token`, `cache_dir`, ... for reading the index.

    Returns:
        `diffusers.PipelineQuantizationConfig`
    """
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    if isinstance(config, PipelineQuantizationConfig):
        return config
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    index = DiffusionPipeline.load_config(source, **{name: hub[name] for name in names if name in hub})
    return PipelineQuantizationConfig(quant_mapping={"transformer" if "transformer" in index else "unet": config})
