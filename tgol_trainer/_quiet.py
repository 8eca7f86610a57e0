"""Upstream log lines that a user can do nothing about, filtered by their text and nothing else."""

from __future__ import annotations

import logging

_LINES = (
    # bitsandbytes without the optional package `kernels`; it then uses its own routine
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    ("bitsandbytes.cextension", "Failed to load CPU gemm_4bit_forward"),
    # 8-bit layers say so in each call of each layer; that they compute in float16 is how they are made
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast"),
    # adapters here are of the denoiser alone, so there is nothing for the text encoder
    ("diffusers.loaders.lora_base", "No LoRA keys associated to CLIPTextModel"),
    ("diffusers.loaders.peft", "No LoRA keys associated to CLIPTextModel"),
    # aMUSEd is supported here as long as diffusers ships it
    ("diffusers.pipelines.pipeline_utils", "The AmusedPipeline has been deprecated"),
    # pipelines cut prompts after they count them, and so does a plan, whose prompts are longer than any limit
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer than"),
    # the fallback to PIL is what we want: torchvision is not needed anywhere
    ("transformers.image_processing_utils_fast", "ImageProcessor` requires torchvision"),
    ("transformers.utils.import_utils", "ImageProcessor` requires torchvision"),
)


class Without(logging.Filter):
    """Drop records that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep a record."""
        return self.text not in record.getMessage()


def silence() -> None:
    """Add the filters; a logger's filters see only its own records, so each goes onto the logger that speaks."""
    for name, text in _LINES:
        logging.getLogger(name).addFilter(Without(text))
