"""Say why a pipeline of diffusers has no model family, and what to train instead."""

from __future__ import annotations

import inspect
from collections.abc import Collection

_SAME_WEIGHTS = (
    "Its weights are those of {plain}: load them with `diffusers.{plain}.from_pretrained(...)` and pass the object."
)
_DISTILLED = "It is distilled to few steps, which training by the error of many undoes. Train {base} instead."
_MOTION = "Its UNet is put together from one of images and a motion module, and nobody has written a family for it."
_HISTORY = "It draws a video in parts, each from those before it, and a training clip has no such parts."

REASONS: dict[str, str] = {
    "AceStepPipeline": "It makes music.",
    "AnimateDiffPAGPipeline": _MOTION,
    "AnimateDiffPipeline": _MOTION,
    "AnimateDiffSDXLPipeline": _MOTION,
    "AnyFlowPipeline": "It is a flow map: its transformer takes the time of the next step beside that of the noise.",
    "BriaFibo2Pipeline": (
        "It draws the words that a caption asks for as images, which its language model sees at low noise alone, so "
        "that the conditioning depends on the time. Train a Bria FIBO instead (BriaFiboPipeline)."
    ),
    "Cosmos2_5_PredictBasePipeline": (
        "Its constructor asks for NVIDIA's guardrail, a package with models of its own, and nobody has written a "
        "family for it."
    ),
    "Flux2KleinKVPipeline": _DISTILLED.format(base="the base model of its size (Flux2KleinPipeline)"),
    "HeliosPipeline": _HISTORY,
    "HeliosPyramidPipeline": _HISTORY,
    "HunyuanVideoFramepackPipeline": _HISTORY,
    "IFPipeline": "It draws pixels in three stages, without latents, and predicts a variance beside the noise.",
    "Kandinsky3Pipeline": "Its UNet takes no adapters: Kandinsky3UNet has no `add_adapter`.",
    "LTX2ConditionPipeline": _SAME_WEIGHTS.format(plain="LTX2Pipeline"),
    "LTX2DFRPipeline": "It draws key frames beside a video and hands them on between stages (LTX-2.5).",
    "LTX2DFRTemporalRefinePipeline": "It refines a video that another pipeline has drawn (LTX-2.5).",
    "LTX2HDRPipeline": _SAME_WEIGHTS.format(plain="LTX2Pipeline"),
    "LTX2InContextPipeline": _SAME_WEIGHTS.format(plain="LTX2Pipeline"),
    "LTXI2VLongMultiPromptPipeline": _SAME_WEIGHTS.format(plain="LTXPipeline"),
    "LatentConsistencyModelPipeline": _DISTILLED.format(base="the Stable Diffusion that it was made from"),
    "PRXPipeline": "Its transformer takes no adapters: PRXTransformer2DModel has no `add_adapter`.",
    "SanaSprintPipeline": _DISTILLED.format(base="a Sana without `Sprint` in its name (SanaPipeline)"),
    "SkyReelsV2DiffusionForcingPipeline": (
        "Each of its frames has a noise level of its own, and a draw here has one for all. Train a SkyReels V2 "
        "without diffusion forcing instead (SkyReelsV2Pipeline)."
    ),
    "StableUnCLIPPipeline": "Its UNet takes an image's embedding, which a second model draws from the prompt.",
}
"""Pipelines that draw from a prompt alone and load LoRA adapters, and why each has no family; by class."""

_INPUTS = {"image", "video", "control_image", "control_video", "conditioning_frames"}
"""Arguments of a pipeline's call that a prompt alone does not give."""


def reason_for(name: str, supported: Collection[str]) -> str | None:
    """
    Say why a pipeline's class has no model family.

    Args:
        name (`str`): Name of the class.
        supported (`Collection[str]`): Names of those that have one.

    Returns:
        `str`: sentences for an error message; `None` where no reason is known.
    """
    import diffusers

    if name in REASONS:
        return REASONS[name]
    if (plain := name.replace("PAG", "")) != name and plain in supported:  # another guidance
        return _SAME_WEIGHTS.format(plain=plain)
    kind = getattr(diffusers, name, None)
    if name.endswith("ModularPipeline"):
        reason = "diffusers has it as modular blocks alone, and training needs a whole pipeline."
    elif kind is None:
        return None
    elif ".deprecated." in kind.__module__:
        reason = "diffusers keeps it among its deprecated pipelines."
    elif _INPUTS & inspect.signature(kind.__call__).parameters.keys():
        reason = "It takes an image or a video beside the prompt, which the rows of a dataset do not have."
    # A class that lacks a package is a stand-in, which has `_backends` and tells nothing of its arguments.
    elif not hasattr(kind, "_backends") and "prompt" not in inspect.signature(kind.__call__).parameters:
        return "It takes no `prompt`, which each row of a dataset has."
    else:
        return None
    plain = max((each for each in supported if name.startswith(each.removesuffix("Pipeline"))), key=len)
    if plain == "Pipeline":  # every name begins so
        return reason
    return f"{reason} Where its weights are those of {plain}, load them with that class and pass the object."
