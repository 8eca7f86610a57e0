"""Meissonic, whose pipeline and transformer live in its authors' repository."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer.likelihoods import Draw

from .base import FamilySettings, ModelOrigin
from .masked import MaskedTokenFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

REPOSITORY = "https://github.com/viiika/Meissonic"

_FILES = ("src/transformer.py", "src/scheduler.py", "src/pipeline.py")
_ARGUMENTS = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"}
_ARGUMENTS |= {"micro_conds"}
_FIELDS = {"vocab_size", "codebook_size", "downsample"}
_HUB_OPTIONS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
_MODEL_OPTIONS = {*_HUB_OPTIONS, "dtype", "variant", "use_safetensors", "quantization_config"}


class MeissonicFamily(MaskedTokenFamily):
    """
    Meissonic's `Pipeline`: CLIP text encoder with projection, VQ autoencoder, multi-modal transformer of FLUX's kind.

    `Pipeline` is a name that others use too, so the transformer is recognised by its class name, its call signature
    and its config; anything else is refused. The transformer gets the attribute that its attention lacks under newer
    diffusers, see [`set_head_dim`].

    Raises:
        ValueError: for another pipeline that is called `Pipeline`.
    """

    pooled_argument = "pooled_projections"

    def __init__(
        self, pipeline: DiffusionPipeline, origin: ModelOrigin, settings: FamilySettings | None = None
    ) -> None:
        check_is_meissonic(pipeline)
        super().__init__(pipeline, origin, settings)
        set_head_dim(self.denoiser)

    @property
    def native_resolution(self) -> int:
        """Side in pixels: by the transformer's sample size if it has one, else 1024 with `downsample`, 512 without."""
        config = self.denoiser.config
        if config.get("sample_size"):
            return config["sample_size"] * self.pipeline.vae_scale_factor
        return 1024 if config["downsample"] else 512

    @property
    def max_tokens(self) -> int:
        """77, which the pipeline passes whatever the tokenizer says."""
        return 77

    def enable_gradient_checkpointing(self) -> None:
        """
        Recompute the transformer's blocks in the backward pass.

        `Transformer2DModel` declares that it does not support checkpointing (its authors' training compiles the model,
        which did not go together with DDP: https://github.com/pytorch/pytorch/issues/104674), so diffusers' switch
        raises ValueError; the forward pass still reads this flag, in train mode. Drop this method once the class sets
        `_supports_gradient_checkpointing = True` and its `_set_gradient_checkpointing` takes today's arguments.
        """
        self.denoiser.gradient_checkpointing = True

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Logits (B, codebook_size, h, w) of the transformer.

        The time is the mask ratio times 1000, as in training; the authors' pipeline passes the index of the sampling
        step instead.
        """
        tokens = conditioning["encoder_hidden_states"].shape[1]
        return model(
            hidden_states=draw.inputs,
            timestep=draw.timesteps,
            img_ids=self.image_ids(*draw.inputs.shape[-2:]).to(draw.inputs.device),
            txt_ids=torch.zeros(tokens, 3, device=draw.inputs.device),
            **conditioning,
        )

    def image_ids(self, height: int, width: int) -> torch.Tensor:
        """
        Positions of the image's tokens inside the transformer, where `downsample` halves the grid.

        The authors' pipeline decides by `height == 1024` instead of by the config, and fails for a model with
        `downsample` at other heights.

        Args:
            height (`int`):
                Rows of the grid of token ids.
            width (`int`):
                Columns of it.

        Returns:
            `torch.Tensor`: (positions, 3) float32; 0, row, column.
        """
        if self.denoiser.config["downsample"]:
            height, width = height // 2, width // 2
        ids = torch.zeros(height, width, 3)
        ids[..., 1] = torch.arange(height)[:, None]
        ids[..., 2] = torch.arange(width)
        return ids.view(-1, 3)

    def full_usage(self, location: str, prompt: str) -> str:
        """The snippet of the base class, with the transformer's class taken from the pipeline."""
        load = f'pipe.transformer = type(pipe.transformer).from_pretrained({location!r}, subfolder="transformer")'
        fix = ["from tgol_trainer.families.meissonic import set_head_dim", ""]
        lines = [*fix, *self._loading_lines(), load, "set_head_dim(pipe.transformer)"]
        return "\n".join([*lines, *self._image_lines(prompt)])

    def merged_usage(self, location: str, prompt: str) -> str:
        """The snippet of the base class, loaded with the authors' code."""
        lines = loading_code(dataclasses.replace(self.origin, hub_id=location, revision=None)).splitlines()
        return "\n".join([*lines, *self._image_lines(prompt)])

    def _loading_lines(self) -> list[str]:
        if self.origin.loading_code:
            return self.origin.loading_code.splitlines()
        return loading_code(self.origin).splitlines()

    def _image_lines(self, prompt: str) -> list[str]:
        side = self.native_resolution
        size = "" if side == 1024 else f", height={side}, width={side}"  # the pipeline's default is 1024
        return [f"image = pipe({prompt!r}{size}{self.origin.call_text}).images[0]", 'image.save("sample.png")']


def loading_code(origin: ModelOrigin) -> str:
    """Python lines that define `pipe` from a model's origin and a clone of the authors' repository."""
    source = origin.hub_id or "path/to/the/base/model"
    revision = f"    revision={origin.revision!r},\n" if origin.hub_id and origin.revision else ""
    return (
        f"# First: git clone {REPOSITORY} path/to/Meissonic\n"
        "from tgol_trainer.families import load_meissonic\n\n"
        f"pipe = load_meissonic(\n    {source!r},\n{revision}"
        '    meissonic_repository="path/to/Meissonic",\n    trust_remote_code=True,\n)'
    )


def check_is_meissonic(pipeline: DiffusionPipeline) -> None:
    """
    Refuse a pipeline that shares nothing with Meissonic's but the name.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            Of a class named `Pipeline`.

    Raises:
        ValueError: naming what differs.
    """
    kind, transformer = type(pipeline), getattr(pipeline, "transformer", None)
    expected = {"vqvae", "tokenizer", "text_encoder", "transformer", "scheduler"}
    wrong = [f"it has no component {name}" for name in sorted(expected - set(pipeline.components))]
    if transformer is not None:
        found = type(transformer)
        if found.__name__ != "Transformer2DModel" or found.__module__.startswith("diffusers."):
            wrong.append(f"its transformer is {found.__module__}.{found.__name__}")
        missing = _ARGUMENTS - set(inspect.signature(transformer.forward).parameters)
        wrong += [f"its transformer does not take {', '.join(sorted(missing))}"] if missing else []
        missing = _FIELDS - set(transformer.config)
        wrong += [f"its transformer's config lacks {', '.join(sorted(missing))}"] if missing else []
    if "mask_token_id" not in getattr(getattr(pipeline, "scheduler", None), "config", {}):
        wrong.append("its scheduler has no mask_token_id")
    if wrong:
        raise ValueError(
            f"{kind.__module__}.{kind.__name__} is not supported: of the pipelines called `Pipeline`, only "
            f"Meissonic's ({REPOSITORY}) is, and {'; '.join(wrong)}."
        )


def set_head_dim(transformer: ModelMixin) -> None:
    """
    Give diffusers' `Attention` modules the `head_dim` that its FLUX processor reads.

    Since diffusers 0.40 (https://github.com/huggingface/diffusers/pull/13718) `FluxAttnProcessor2_0`, which Meissonic
    puts on `Attention` modules, is a processor for another class. With this attribute the output is that of 0.39. Drop
    it once Meissonic uses that class.

    Args:
        transformer (`diffusers.ModelMixin`):
            Changed in place.
    """
    from diffusers.models.attention_processor import Attention

    for module in transformer.modules():
        if isinstance(module, Attention) and not hasattr(module, "head_dim"):
            module.head_dim = module.inner_dim // module.heads


def load_meissonic(
    model: str | Path, *, meissonic_repository: str | Path, trust_remote_code: bool = False, **options: Any
) -> DiffusionPipeline:
    """
    Load Meissonic with the classes of its authors' repository, which is imported: its code runs on this machine.

    Args:
        model (`str` or `Path`):
            Hub id or local folder with the folders `transformer`, `vqvae`, `text_encoder`, `tokenizer`, `scheduler`.
        meissonic_repository (`str` or `Path`):
            A clone of https://github.com/viiika/Meissonic, the folder that holds `src`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Must be `True`: says that you have looked at that code or trust it.
        options:
            `dtype` (float32 by default; also by component, `{"default": ..., "vqvae": ...}`), `variant`, `revision`,
            `use_safetensors`, `cache_dir`, `token`, `local_files_only`, `force_download`, as in `from_pretrained`;
            `quantization_config`, of the transformer.

    Returns:
        `diffusers.DiffusionPipeline`: the repository's `Pipeline`.

    Raises:
        ValueError: without the opt-in, for a folder that is no clone, or for an option that would not be honoured.
    """
    if trust_remote_code is not True:
        raise ValueError(
            "`meissonic_repository` runs the Python code of that folder. If you trust it, say so with "
            "`trust_remote_code=True`."
        )
    unknown = set(options) - _MODEL_OPTIONS
    if unknown:
        raise ValueError(
            f"Loading Meissonic does not know {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(sorted(_MODEL_OPTIONS))}. Otherwise load the pipeline yourself and pass the object."
        )
    from diffusers import VQModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    quantized = {"quantization_config": options.pop("quantization_config", None)}
    dtype = options.pop("dtype", None)
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    with _repository(Path(meissonic_repository).expanduser().resolve()):
        code = {name: importlib.import_module(f"src.{name}") for name in ("transformer", "scheduler", "pipeline")}
    source = str(model)

    def weights(kind: Any, part: str, **more: Any) -> Any:
        chosen = dtypes.get(part, dtypes.get("default")) or torch.float32
        return kind.from_pretrained(source, subfolder=part, dtype=chosen, **options, **more)

    pipeline = code["pipeline"].Pipeline(
        vqvae=weights(VQModel, "vqvae"),
        tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **hub),
        text_encoder=weights(CLIPTextModelWithProjection, "text_encoder"),
        transformer=weights(code["transformer"].Transformer2DModel, "transformer", **quantized),
        scheduler=code["scheduler"].Scheduler.from_pretrained(source, subfolder="scheduler", **hub),
    )
    set_head_dim(pipeline.transformer)
    return pipeline


@contextmanager
def _repository(root: Path) -> Iterator[None]:
    """Make `src` the folder of that name in `root`, without touching `sys.path`; undone if an import fails."""
    missing = [name for name in _FILES if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"`meissonic_repository` {str(root)!r} holds no {', '.join(missing)}: give the folder that "
            f"`git clone {REPOSITORY}` made."
        )
    folder = str(root / "src")
    before = sys.modules.get("src")
    if before is not None:
        if folder in [str(Path(path).resolve()) for path in getattr(before, "__path__", [])]:
            yield
            return
        raise ValueError(
            f"Another package called `src` is already imported ({getattr(before, '__file__', None) or before}), so "
            "Meissonic's cannot be: run this in a process of its own."
        )
    known = set(sys.modules)
    try:
        _import_package(folder)
        yield
    except BaseException:
        for name in set(sys.modules) - known:
            if name == "src" or name.startswith("src."):
                del sys.modules[name]
        raise


def _import_package(folder: str) -> None:
    # The repository's `src` has no __init__.py. A path entry would lose against any other `src` that has one.
    file = Path(folder) / "__init__.py"
    spec: importlib.machinery.ModuleSpec | None = importlib.machinery.ModuleSpec("src", None, is_package=True)
    if file.is_file():
        spec = importlib.util.spec_from_file_location("src", file)
    if spec is None:
        raise ValueError(f"{file} cannot be imported.")
    spec.submodule_search_locations = [folder]
    sys.modules["src"] = package = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(package)
