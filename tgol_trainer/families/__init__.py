"""Load a diffusers pipeline and choose its model family by the name of the pipeline's class."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download

from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer.likelihoods import FlowLikelihood
from tgol_trainer.shapes import EmbeddedModel, embedded_model

from .amused import AmusedFamily
from .aura_flow import AuraFlowFamily
from .base import FamilySettings, ModelFamily
from .blocks import StoredBlocks
from .bria_fibo import BriaFiboFamily
from .chroma import ChromaFamily
from .cogvideox import CogVideoXFamily
from .cogview4 import CogView4Family
from .conditioning import Conditioning
from .distilled import warn_of_distillation
from .ernie_image import ErnieImageFamily
from .flux import FluxFamily
from .flux2 import Flux2Family, Flux2KleinFamily
from .hidream import HiDreamFamily
from .hunyuan_video import HunyuanVideoFamily
from .hunyuan_video_15 import HunyuanVideo15Family
from .ideogram4 import Ideogram4Family
from .inspection import inspect_pipeline, parts_of_index
from .kandinsky5 import Kandinsky5ImageFamily, Kandinsky5VideoFamily
from .kept_prompts import KeptPrompts, keeps_prompts
from .kolors import KolorsFamily
from .krea2 import Krea2Family
from .licenses import hub_license
from .ltx import LTX2Family, LTXConditionFamily, LTXFamily
from .lumina2 import Lumina2Family
from .meissonic import MeissonicFamily, load_meissonic
from .mochi import MochiFamily
from .origin import ModelOrigin
from .prompts import words_of
from .quantization import add_text_encoders, denoiser_quantization, large_text_encoders
from .qwen_image import QwenImage21Family, QwenImageFamily
from .sana import SanaFamily, SanaVideoFamily
from .skyreels_v2 import SkyReelsV2Family
from .stable_diffusion import StableDiffusionFamily
from .stable_diffusion_3 import StableDiffusion3Family
from .stable_diffusion_xl import StableDiffusionXLFamily
from .unsupported import reason_for
from .video import VideoFamily
from .wan import WanFamily
from .z_image import ZImageFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

FAMILIES: dict[str, type[ModelFamily]] = {
    "AmusedPipeline": AmusedFamily,
    "StableDiffusionPipeline": StableDiffusionFamily,
    "StableDiffusionXLPipeline": StableDiffusionXLFamily,
    "KolorsPipeline": KolorsFamily,
    "StableDiffusion3Pipeline": StableDiffusion3Family,
    "FluxPipeline": FluxFamily,
    "Flux2Pipeline": Flux2Family,
    "Flux2KleinPipeline": Flux2KleinFamily,
    "ZImagePipeline": ZImageFamily,
    "QwenImagePipeline": QwenImageFamily,
    "QwenImage21Pipeline": QwenImage21Family,
    "WanPipeline": WanFamily,
    "SkyReelsV2Pipeline": SkyReelsV2Family,
    "HunyuanVideoPipeline": HunyuanVideoFamily,
    "Krea2Pipeline": Krea2Family,
    "ErnieImagePipeline": ErnieImageFamily,
    "SanaPipeline": SanaFamily,
    "Lumina2Pipeline": Lumina2Family,
    "AuraFlowPipeline": AuraFlowFamily,
    "ChromaPipeline": ChromaFamily,
    "CogView4Pipeline": CogView4Family,
    "CogVideoXPipeline": CogVideoXFamily,
    "MochiPipeline": MochiFamily,
    "SanaVideoPipeline": SanaVideoFamily,
    "Kandinsky5T2IPipeline": Kandinsky5ImageFamily,
    "Kandinsky5T2VPipeline": Kandinsky5VideoFamily,
    "HiDreamImagePipeline": HiDreamFamily,
    "BriaFiboPipeline": BriaFiboFamily,
    "Ideogram4Pipeline": Ideogram4Family,
    "HunyuanVideo15Pipeline": HunyuanVideo15Family,
    "LTXPipeline": LTXFamily,
    "LTXConditionPipeline": LTXConditionFamily,
    "LTX2Pipeline": LTX2Family,
    "Pipeline": MeissonicFamily,
}
"""Model families by the name of the pipeline's class. A new family is one file and one entry here."""

FROZEN_DTYPE = {"default": "bfloat16", "vae": "float32", "vqvae": "float32"}
"""Dtype of a base model that stays frozen on a GPU, where none is asked for."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

__all__ = [
    "FAMILIES",
    "FROZEN_DTYPE",
    "Conditioning",
    "FamilySettings",
    "KeptPrompts",
    "ModelFamily",
    "ModelOrigin",
    "StoredBlocks",
    "frame_rate",
    "hub_license",
    "keeps_prompts",
    "load_family",
    "load_meissonic",
    "wrap_pipeline",
]


def load_family(
    model: str | Path | DiffusionPipeline,
    model_init_kwargs: dict[str, Any] | None = None,
    settings: FamilySettings | None = None,
    frozen_on: torch.device | None = None,
) -> ModelFamily:
    """
    Load a pipeline and wrap it in its model family.

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`):
            Hub id, local folder, name of an embedded model (`"shapes"`, `"shapes-masked"`), or a loaded pipeline.
        model_init_kwargs (`dict`, *optional*):
            Passed to `DiffusionPipeline.from_pretrained`: `dtype` (also as a string, `"bfloat16"`, and by
            component, `{"default": "bfloat16", "vae": "float32"}`; float32 by default), `revision`, `variant`,
            `quantization_config` (of the denoiser). With `meissonic_repository`, a clone of Meissonic's repository,
            and `trust_remote_code=True`, passed to [`load_meissonic`] instead. An embedded model takes `dtype` alone.
        settings ([`FamilySettings`], *optional*): Choices of the run.
        frozen_on (`torch.device`, *optional*):
            The device that the base model will be frozen on. On a GPU the default dtype is then bfloat16, or float16
            where the GPU has no bfloat16, and float32 for the autoencoder. It changes no embedded model.

    Returns:
        [`ModelFamily`]

    Raises:
        ValueError: for an unsupported pipeline, for `model_init_kwargs` beside a pipeline that is already loaded, or
            for options that an embedded model does not take.
        FileNotFoundError: for a folder that does not exist or holds no pipeline.
        TypeError: for a `model` of another kind, such as a denoiser alone.
    """
    from diffusers import DiffusionPipeline

    options, settings = dict(model_init_kwargs or {}), settings or FamilySettings()
    if settings.text_encoders_in_4bit and (isinstance(model, DiffusionPipeline) or embedded_model(model)):
        raise ValueError("`text_encoders_in_4bit` is for a Hub id or a folder: these are loaded already.")
    if isinstance(model, DiffusionPipeline):
        if options:
            raise ValueError(
                f"`model_init_kwargs` ({', '.join(options)}) has no effect on a pipeline that is already loaded: "
                "pass a Hub id or folder, or load the pipeline with these arguments yourself."
            )
        return wrap_pipeline(model, settings=settings)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"`model` is a {type(model).__name__}; it must be a Hub id, a local folder, or a whole pipeline "
            "(`diffusers.DiffusionPipeline`), whose text encoder and autoencoder are needed as well."
        )
    if frozen_on is not None and "dtype" not in options and not embedded_model(model):
        options |= {"dtype": dtype} if (dtype := _frozen_dtype(frozen_on)) else {}
    if "quantization_config" in options or settings.text_encoders_in_4bit:
        options.setdefault("dtype", "float32")  # otherwise diffusers makes layers that are not quantised float16
    if "dtype" in options:
        options["dtype"] = read_dtype(options["dtype"])
    if embedded := embedded_model(model):
        return _load_embedded(str(model), embedded, options, settings)
    if "meissonic_repository" in options:
        origin = ModelOrigin.of_source(str(model), options.get("revision"), file="transformer/config.json")
        return wrap_pipeline(load_meissonic(model, **options), origin, settings)
    source = str(Path(model).expanduser()) if Path(model).expanduser().exists() else str(model)
    index = read_index(source, options)
    if "quantization_config" in options:
        options["quantization_config"] = denoiser_quantization(index, options["quantization_config"])
    if settings.text_encoders_in_4bit:
        add_text_encoders(index, options)
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, **options)
    except (ValueError, OSError) as error:  # files that are missing or broken, or code that would be run
        raise ValueError(f"{model} cannot be loaded: {error}") from error
    if settings.text_encoders_in_4bit:
        for name in large_text_encoders(pipeline):  # a GPU, where they are loaded, is for the denoiser
            getattr(pipeline, name).to("cpu")
    return wrap_pipeline(pipeline, ModelOrigin.of_source(str(model), options.get("revision")), settings)


def _frozen_dtype(device: torch.device) -> dict[str, str] | None:
    """Return the dtype of a base model that stays frozen on this device; `None` for that of `from_pretrained`."""
    if device.type != "cuda":
        return None
    name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    logger.info("The frozen base model is loaded in %s; `dtype` in `model_init_kwargs` overrides it.", name)
    return {**FROZEN_DTYPE, "default": name}


def read_dtype(value: Any) -> Any:
    """Turn names of torch dtypes into dtypes, also in a dictionary by component."""
    if isinstance(value, dict):
        return {part: read_dtype(each) for part, each in value.items()}
    if not isinstance(value, str) or value == "auto":
        return value
    dtype = getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`model_init_kwargs['dtype']` is {value!r}, which is not a torch dtype.")
    return dtype


def _load_embedded(
    name: str, model: EmbeddedModel, options: dict[str, Any], settings: FamilySettings | None
) -> ModelFamily:
    unknown = [option for option in options if option != "dtype"]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: the embedded {name} model is loaded one way only.")
    origin = ModelOrigin(note=model.note, loading_code=model.loading_code, call_arguments=model.call_arguments)
    return wrap_pipeline(model.load(**options), origin, settings)


def read_index(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    Read the `model_index.json` of a Hub id or folder and check the pipeline's class.

    This comes before the weights, which can be tens of gigabytes. `options` are those of `from_pretrained`, of which
    `revision`, `token` and the like say where the file is.
    """
    if Path(model).exists():
        file = Path(model) / "model_index.json"
        if file.with_name("modular_model_index.json").is_file() and not file.is_file():
            raise ValueError(f"{model} is a modular pipeline of diffusers, and training needs a whole one.")
        if not file.is_file():
            raise FileNotFoundError(
                f"{model} holds no model_index.json, so it is not the folder of a diffusers pipeline. A single file "
                "of weights is loaded with the pipeline class's `from_single_file`: pass the object."
            )
    elif is_hub_id(model):
        place = {name: options[name] for name in INDEX_OPTIONS if name in options}
        file = Path(hf_hub_download(model, "model_index.json", **place))
    else:
        raise FileNotFoundError(f"{model} does not exist, and it is not a Hub id (`owner/name`).")
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. Download the model again.") from error
    name = index.get("_class_name")
    if name == "Pipeline":
        raise ValueError(
            f"{model!r} names a pipeline class `Pipeline`, which diffusers does not have. For Meissonic add "
            "`model_init_kwargs={'meissonic_repository': 'path/to/a/clone', 'trust_remote_code': True}` "
            "(docs/meissonic.md); else load the pipeline yourself and pass the object."
        )
    if isinstance(name, str) and "custom_pipeline" not in options:
        _check_supported(name, parts_of_index(index))
    return index


def wrap_pipeline(
    pipeline: DiffusionPipeline, origin: ModelOrigin | None = None, settings: FamilySettings | None = None
) -> ModelFamily:
    """
    Wrap a loaded pipeline in its model family.

    Args:
        pipeline (`diffusers.DiffusionPipeline`): Any supported pipeline; used as it is, not copied.
        origin ([`ModelOrigin`], *optional*): Where it came from; by default what its own config says.
        settings ([`FamilySettings`], *optional*): Choices of the run.

    Returns:
        [`ModelFamily`]

    Raises:
        ValueError: for a pipeline class without a family, a tokenizer whose files were not there, or weights that are
            NaN or infinite.
    """
    family = choose_family(pipeline, origin, settings)
    unused = []
    if family.settings.timestep_sampling and not isinstance(family.likelihood, FlowLikelihood):
        unused.append("`timestep_sampling` is for models of flow matching")
    if family.settings.guidance is not None and not family.denoiser.config.get("guidance_embeds"):
        unused.append("`train_guidance` is for models distilled with guidance")
    if warning := warn_of_distillation(pipeline):
        logger.warning("%s", warning)
    for reason in unused:
        logger.warning("%s and has no effect on this %s: leave it out.", reason, type(pipeline).__name__)
    return family


def choose_family(
    pipeline: DiffusionPipeline, origin: ModelOrigin | None, settings: FamilySettings | None
) -> ModelFamily:
    """Wrap a pipeline as [`wrap_pipeline`] does, without its warnings."""
    name = type(pipeline).__name__
    components = pipeline.components.items()
    _check_supported(name, {part: type(each).__name__ for part, each in components if each is not None})
    _check_tokenizers(pipeline)
    _check_weights(pipeline)
    family = FAMILIES[name](pipeline, origin or ModelOrigin.of_pipeline(pipeline), settings)
    if family.num_frames is None and family.settings.num_frames is not None:
        raise ValueError(f"`num_frames` means nothing to {name}, a model of images: leave it out.")
    if family.settings.vae_tiling:
        _tile(getattr(pipeline, family.autoencoder_name))
    if family.settings.expert is not None and not isinstance(family, WanFamily):
        raise ValueError(f"`expert` means nothing to {name}, which has one transformer: leave it out.")
    return family


def frame_rate(pipeline: DiffusionPipeline) -> int:
    """Return the frame rate of a pipeline's videos; 16 for one without a family."""
    family = FAMILIES.get(type(pipeline).__name__)
    return family.frame_rate(pipeline) if family is not None and issubclass(family, VideoFamily) else 16


def _tile(autoencoder: Any) -> None:
    try:
        autoencoder.enable_tiling()
    except NotImplementedError as error:
        raise ValueError(f"`vae_tiling`: {type(autoencoder).__name__} knows no tiles. Leave it out.") from error


def _check_supported(name: str, parts: dict[str, str]) -> None:
    import diffusers

    if name not in FAMILIES:
        supported = ", ".join("Pipeline (Meissonic)" if each == "Pipeline" else each for each in sorted(FAMILIES))
        if reason := reason_for(name, FAMILIES):
            raise ValueError(f"{name} is not supported. {reason} Supported pipelines: {supported}.")
        raise ValueError(
            f"{name} is not supported yet. Supported pipelines: {supported}. Supporting another takes a model family, "
            f"a file of a page. {inspect_pipeline(name, parts)} CONTRIBUTING.md, 'A new model family', says what to "
            "write."
        )
    needed = getattr(getattr(diffusers, name, None), "_backends", ())  # of the stand-in for a class that cannot be had
    if missing := [package for package in needed if find_spec(package) is None]:
        raise ValueError(f"{name} needs {', '.join(missing)}: pip install {' '.join(missing)}.")


def _check_tokenizers(pipeline: DiffusionPipeline) -> None:
    """Refuse a tokenizer without words, which transformers makes of a folder that lacks the tokenizer's files."""
    from transformers import PreTrainedTokenizerBase

    for name, part in pipeline.components.items():
        words = words_of(part)
        if isinstance(words, PreTrainedTokenizerBase) and words("cat").input_ids == words("dog").input_ids:
            raise ValueError(
                f"`{name}` of the pipeline knows no words: its files were not there when it was loaded, so every "
                "prompt would be the same to the model. Download the model again, or mend its folder."
            )


def _check_weights(pipeline: DiffusionPipeline) -> None:
    """Refuse weights that are no numbers: they would come to light as a loss of NaN, or as black images."""
    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        for key, weight in part.named_parameters():
            quantised = weight.dtype not in _FLOATS or type(weight) is not torch.nn.Parameter
            if weight.device.type == "meta" or quantised:  # a skeleton, or what its own library checks
                continue
            # A sum is read once, and is finite unless a weight is not or float16 overflows.
            if not torch.isfinite(weight.detach().sum()) and not torch.isfinite(weight.detach()).all():
                raise ValueError(
                    f"The `{name}` of this {type(pipeline).__name__} holds NaN or infinite weights, in {key!r}. Its "
                    "file is damaged, or float16 could not hold its numbers: download it again, or load it in another "
                    "dtype."
                )
