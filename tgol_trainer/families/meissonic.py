"""Meissonic, whose pipeline and transformer live in its authors' repository."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer.likelihoods import Draw, to_device

from .conditioning import Conditioning
from .flow import grid_positions
from .masked import MaskedTokenFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

REPOSITORY = "https://github.com/viiika/Meissonic"

_MODULES = ("transformer", "scheduler", "pipeline")
_COMPONENTS = {"vqvae", "tokenizer", "text_encoder", "transformer", "scheduler"}
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
    token_limits = {"tokenizer": 77}  # which the pipeline passes whatever the tokenizer says

    def check_pipeline(self) -> None:
        """Refuse a pipeline that shares only its name with Meissonic's, and say what differs."""
        pipeline, transformer = self.pipeline, getattr(self.pipeline, "transformer", None)
        wrong = [f"it has no component {name}" for name in sorted(_COMPONENTS - set(pipeline.components))]
        if transformer is not None:
            kind = type(transformer)
            if kind.__name__ != "Transformer2DModel" or kind.__module__.startswith("diffusers."):
                wrong.append(f"its transformer is {kind.__module__}.{kind.__name__}")
            if missing := _ARGUMENTS - set(inspect.signature(transformer.forward).parameters):
                wrong.append(f"its transformer does not take {', '.join(sorted(missing))}")
            if missing := _FIELDS - set(transformer.config):
                wrong.append(f"its transformer's config lacks {', '.join(sorted(missing))}")
        if "mask_token_id" not in getattr(getattr(pipeline, "scheduler", None), "config", {}):
            wrong.append("its scheduler has no mask_token_id")
        if wrong:
            raise ValueError(
                f"{type(pipeline).__module__}.{type(pipeline).__name__} is not supported: of the pipelines called "
                f"`Pipeline`, only Meissonic's ({REPOSITORY}) is, and {'; '.join(wrong)}."
            )
        super().check_pipeline()

    def prepare_pipeline(self) -> None:
        """Freeze every component, and give the transformer what newer diffusers read."""
        super().prepare_pipeline()
        set_head_dim(self.denoiser)

    @property
    def native_size(self) -> tuple[int, int]:
        """By the transformer's sample size if it has one, else 1024 a side with `downsample` and 512 without."""
        if self.denoiser.config.get("sample_size"):
            return super().native_size
        return (1024, 1024) if self.denoiser.config["downsample"] else (512, 512)

    def enable_gradient_checkpointing(self) -> None:
        """
        Recompute the transformer's blocks in the backward pass.

        `Transformer2DModel` declares that it does not support checkpointing (its authors' training compiles the model,
        which did not go together with DDP: https://github.com/pytorch/pytorch/issues/104674), so diffusers' switch
        raises ValueError; the forward pass still reads this flag, in train mode. Drop this method once the class sets
        `_supports_gradient_checkpointing = True` and its `_set_gradient_checkpointing` takes today's arguments.
        """
        self.denoiser.gradient_checkpointing = True

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """
        Logits (B, codebook_size, h, w) of the transformer.

        The time is the mask ratio times 1000, as in training; the authors' pipeline passes the index of the sampling
        step instead. The positions of the tokens follow `downsample` of the config, which halves the grid inside; the
        authors' pipeline decides by `height == 1024`, and fails for a model with `downsample` at other heights.
        """
        device, grid = draw.inputs.device, 2 if self.denoiser.config["downsample"] else 1
        height, width = (side // grid for side in draw.inputs.shape[-2:])
        return model(
            hidden_states=draw.inputs,
            timestep=draw.timesteps,
            img_ids=to_device(grid_positions(height, width), device),
            txt_ids=torch.zeros(len(conditioning["encoder_hidden_states"][0]), 3, device=device),
            **conditioning,
        )

    def full_usage(self, location: str, prompt: str) -> str:
        """The snippet of the base class, with the transformer's class taken from the pipeline."""
        return self._snippet(
            prompt,
            "from tgol_trainer.families.meissonic import set_head_dim",
            "",
            *self._loading_lines(),
            f'pipe.transformer = type(pipe.transformer).from_pretrained({location!r}, subfolder="transformer")',
            "set_head_dim(pipe.transformer)",
        )

    def _from_pretrained_lines(self, source: str, revision: str | None = None) -> list[str]:
        return [
            f"# First: git clone {REPOSITORY} path/to/Meissonic",
            "from tgol_trainer.families import load_meissonic",
            "",
            "pipe = load_meissonic(",
            f"    {source!r},",
            *([f"    revision={revision!r},"] if revision else []),
            '    meissonic_repository="path/to/Meissonic",',
            "    trust_remote_code=True,",
            ")",
        ]

    def _drawn(self) -> dict[str, int]:
        side, _ = self.native_size
        own = {} if side == 1024 else {"height": side, "width": side}  # the pipeline's default is 1024
        return super()._drawn() or own


def set_head_dim(transformer: ModelMixin) -> None:
    """
    Give diffusers' `Attention` modules the `head_dim` that its FLUX processor reads.

    Since diffusers 0.40 (https://github.com/huggingface/diffusers/pull/13718) `FluxAttnProcessor2_0`, which Meissonic
    puts on `Attention` modules, is a processor for another class. With this attribute the output is that of 0.39. Drop
    it once Meissonic uses that class.

    Args:
        transformer (`diffusers.ModelMixin`): Changed in place.
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
        ValueError: without the opt-in, for a folder that is not a clone, or for an option that would not be honoured.
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
    code, source = _import_code(Path(meissonic_repository).expanduser().resolve()), str(model)

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


def _import_code(root: Path) -> dict[str, ModuleType]:
    """Import the modules of the folder `src` in `root`, without touching `sys.path`; undone if an import fails."""
    missing = [f"src/{name}.py" for name in _MODULES if not (root / "src" / f"{name}.py").is_file()]
    if missing:
        raise ValueError(
            f"`meissonic_repository` {str(root)!r} holds no {', '.join(missing)}: give the folder that "
            f"`git clone {REPOSITORY}` made."
        )
    package, known = sys.modules.get("src"), set(sys.modules)
    if package and root / "src" not in [Path(path).resolve() for path in getattr(package, "__path__", [])]:
        raise ValueError(
            f"Another package called `src` is already imported ({getattr(package, '__file__', None) or package}), so "
            "Meissonic's cannot be: run this in a process of its own."
        )
    try:
        if not package:
            _import_src(root)
        return {name: importlib.import_module(f"src.{name}") for name in _MODULES}
    except BaseException:
        for name in set(sys.modules) - known:
            if name == "src" or name.startswith("src."):
                del sys.modules[name]
        raise


def _import_src(root: Path) -> None:
    # The repository's `src` has no __init__.py. A path entry would lose against any other `src` that has one.
    spec = importlib.machinery.PathFinder.find_spec("src", [str(root)])
    if spec is None:
        raise ValueError(f"{root / 'src'} cannot be imported.")
    spec.submodule_search_locations = [str(root / "src")]  # a namespace's own locations would follow `sys.path`
    sys.modules["src"] = package = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(package)
