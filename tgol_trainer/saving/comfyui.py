"""
Convert a LoRA adapter to the tensors that ComfyUI's loader reads, and back.

The names come from `model_lora_keys_unet` (comfy/lora.py), `unet_to_diffusers`, `mmdit_to_diffusers`,
`flux_to_diffusers` and `z_image_to_diffusers` (comfy/utils.py), for Wan from the modules of comfy/ldm/wan/model.py,
and for LTX and Qwen-Image from those of comfy/ldm/lightricks/ and comfy/ldm/qwen_image/, which have diffusers' names.
The suffixes, alpha and `dora_scale` come from comfy/weight_adapter/lora.py and base.py. All are of
https://github.com/Comfy-Org/ComfyUI as of 2026. diffusers' `convert_state_dict_to_kohya` is not used: it always writes
the rank as alpha, and leaves the magnitudes of DoRA under a name that no loader knows.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer.adapter_files import unwrapped

if TYPE_CHECKING:
    from diffusers import ModelMixin


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    The loader's names for the modules of one model family.

    Args:
        modules (`str`): Regular expression of the module paths in diffusers that have a name in the loader.
        prefix (`str`): Text before each path.
        matrices (`tuple[str, str]`, *optional*, defaults to `("lora_A", "lora_B")`):
            Names of the matrix that is applied first and of the other.
        joined (`bool`, *optional*, defaults to `False`): Whether the dots of a path become underscores.
        renamed (`tuple[tuple[str, str], ...]`, *optional*, defaults to `()`):
            Parts of a path with their names in the loader, replaced in this order.
    """

    modules: str
    prefix: str
    matrices: tuple[str, str] = ("lora_A", "lora_B")
    joined: bool = False
    renamed: tuple[tuple[str, str], ...] = ()

    def name(self, path: str) -> str | None:
        """Return the loader's name of a module, or `None` if it has none."""
        if not re.fullmatch(self.modules, path):
            return None
        for ours, theirs in self.renamed:
            path = path.replace(ours, theirs)
        return self.prefix + (path.replace(".", "_") if self.joined else path)


_FEED_FORWARD = r"net\.(?:0\.proj|2)"
_UNET = Layout(
    r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block)\.(?:"
    r"attentions\.\d+\.(?:proj_in|proj_out|transformer_blocks\.\d+\."
    rf"(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.{_FEED_FORWARD}))"
    r"|resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)|(?:down|up)samplers\.0\.conv)"
    r"|conv_in|conv_out|(?:time|add)_embedding\.linear_[12]",
    prefix="lora_unet_",
    matrices=("lora_down", "lora_up"),
    joined=True,
)
_JOINT_BLOCK = (
    r"transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|attn2\.(?:to_[qkv]|to_out\.0)"
    rf"|ff(?:_context)?\.{_FEED_FORWARD}|norm1\.linear)"
)

LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusion3Pipeline": Layout(
        rf"{_JOINT_BLOCK}|context_embedder|proj_out|pos_embed\.proj"
        r"|time_text_embed\.(?:timestep|text)_embedder\.linear_[12]",
        prefix="transformer.",
    ),
    "FluxPipeline": Layout(
        rf"{_JOINT_BLOCK}|transformer_blocks\.\d+\.norm1_context\.linear"
        r"|single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
        r"|x_embedder|context_embedder|proj_out|time_text_embed\.(?:timestep|text|guidance)_embedder\.linear_[12]",
        prefix="transformer.",
    ),
    **dict.fromkeys(
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        Layout(
            r"transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|ff(?:_context)?\.linear_(?:in|out))"
            r"|single_transformer_blocks\.\d+\.attn\.to_(?:qkv_mlp_proj|out)|x_embedder|context_embedder|proj_out",
            prefix="transformer.",
        ),
    ),
    "ZImagePipeline": Layout(
        r"(?:layers|noise_refiner|context_refiner)\.\d+\."
        r"(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)",
        prefix="diffusion_model.",
    ),
    "QwenImagePipeline": Layout(
        r"transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        rf"|(?:img|txt)_mlp\.{_FEED_FORWARD})",
        prefix="diffusion_model.",  # with "transformer." diffusers would not read the file
    ),
    **dict.fromkeys(
        ("LTXPipeline", "LTXConditionPipeline", "LTX2Pipeline"),
        Layout(
            r"transformer_blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2))",
            prefix="diffusion_model.",
        ),
    ),
    "WanPipeline": Layout(
        rf"blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ffn\.{_FEED_FORWARD})"
        r"|condition_embedder\.(?:time_proj|(?:time|text)_embedder\.linear_[12])|proj_out",
        prefix="diffusion_model.",
        renamed=(
            ("attn1.to_", "self_attn."),
            ("attn2.to_", "cross_attn."),
            ("_attn.out.0", "_attn.o"),
            ("ffn.net.0.proj", "ffn.0"),
            ("ffn.net.2", "ffn.2"),
            ("condition_embedder.time_proj", "time_projection.1"),
            ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
            ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
            ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
            ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
            ("proj_out", "head.head"),
        ),
    ),
}
"""Layout of each pipeline class. ComfyUI loads neither aMUSEd nor Meissonic; other names are not known here."""


@dataclasses.dataclass
class LoraModule:
    """
    The update of one module.

    Args:
        first (`torch.Tensor`): The matrix that is applied first, (rank, in, ...).
        second (`torch.Tensor`): The other matrix, (out, rank, ...).
        scaling (`float`): Factor of their product, α / rank or, rank-stabilised, α / √rank.
        magnitude (`torch.Tensor`, *optional*): Magnitudes of DoRA, (out,), or the `dora_scale` of a file.
    """

    first: torch.Tensor
    second: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def update(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the summand of a weight, in its shape, before any normalisation."""
        product = self.second.flatten(1).to(weight) @ self.first.flatten(1).to(weight)
        return self.scaling * product.reshape(weight.shape)

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a float32 weight as ComfyUI's loader changes it at strength 1; `magnitude` is a `dora_scale`."""
        updated = weight + self.update(weight)
        if self.magnitude is not None:
            updated *= self.magnitude.to(weight) / _row_norms(weight, floor=True).reshape(self.magnitude.shape)
        return updated


def layout_of(pipeline_class: str) -> Layout:
    """Return the layout of a pipeline class, such as `"FluxPipeline"`, or raise a `ValueError` if it has none."""
    if pipeline_class not in LAYOUTS:
        raise ValueError(
            f"The names of {pipeline_class} in ComfyUI's loader are not known here, so there is no 'comfyui' file of "
            "it. Use another format."
        )
    return LAYOUTS[pipeline_class]


def lora_modules(denoiser: ModelMixin, adapter: str) -> dict[str, LoraModule]:
    """Return an adapter's update of each module by its path, with the strength that is set."""
    found = {}
    for path, layer in unwrapped(denoiser).named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            magnitudes = getattr(layer, "lora_magnitude_vector", {})
            found[path] = LoraModule(
                layer.lora_A[adapter].weight.detach(),
                layer.lora_B[adapter].weight.detach(),
                layer.scaling[adapter],
                magnitudes[adapter].weight.detach().flatten() if adapter in magnitudes else None,
            )
    return found


def to_comfyui(modules: dict[str, LoraModule], denoiser: ModelMixin, layout: Layout) -> dict[str, torch.Tensor]:
    """
    Return an adapter's tensors under the names of ComfyUI's loader, on the CPU.

    ComfyUI divides DoRA's magnitudes by the norm of the base weight's rows, PEFT by the norm of the updated weight's.
    `dora_scale` therefore contains the quotient of both norms, so that the result is PEFT's.

    Args:
        modules (`dict[str, LoraModule]`): The result of [`lora_modules`].
        denoiser (`diffusers.ModelMixin`): Holds the base weights, as `path.base_layer.weight`.
        layout ([`Layout`]): The names of the family.

    Raises:
        ValueError: if the loader has no name for some modules.
    """
    unnamed = [path for path in modules if layout.name(path) is None]
    if unnamed:
        raise ValueError(
            f"{len(unnamed)} of {len(modules)} trained modules (such as {unnamed[0]}) have no name in the known "
            "layout of ComfyUI's loader, so there is no 'comfyui' file of them. Use another format, or train only "
            "attention and feed-forward layers."
        )
    tensors = {}
    for path, module in modules.items():
        name, rank = layout.name(path), len(module.first)
        tensors[f"{name}.{layout.matrices[0]}.weight"] = module.first
        tensors[f"{name}.{layout.matrices[1]}.weight"] = module.second
        tensors[f"{name}.alpha"] = _exact(module.scaling * rank)
        if module.magnitude is not None:
            weight = denoiser.get_parameter(f"{path}.base_layer.weight").detach().float()
            quotient = _row_norms(weight, floor=True) / _row_norms(weight + module.update(weight))
            scale = module.magnitude.float() * quotient
            tensors[f"{name}.dora_scale"] = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def from_comfyui(tensors: dict[str, torch.Tensor], denoiser: ModelMixin, layout: Layout) -> dict[str, LoraModule]:
    """
    Return the updates in a file's tensors by module path, found under the names that ComfyUI's loader looks for.

    Args:
        tensors (`dict[str, torch.Tensor]`): The tensors of the file.
        denoiser (`diffusers.ModelMixin`): The base model's denoiser, without adapters.
        layout ([`Layout`]): The names of the family.

    Returns:
        `dict[str, LoraModule]`: `magnitude` is the file's `dora_scale`, as [`apply_as_comfyui`] takes it.

    Raises:
        ValueError: if some tensors match no module.
    """
    left, modules = dict(tensors), {}
    for path, module in denoiser.named_modules():
        name = layout.name(path) if isinstance(getattr(module, "weight", None), torch.Tensor) else None
        keys = [f"{name}.{matrix}.weight" for matrix in layout.matrices]
        if name is None or not all(key in left for key in keys):
            continue
        first, second = (left.pop(key) for key in keys)
        alpha, scale = left.pop(f"{name}.alpha", None), left.pop(f"{name}.dora_scale", None)
        modules[path] = LoraModule(first, second, 1.0 if alpha is None else alpha.item() / len(first), scale)
    if left:
        raise ValueError(
            f"{len(left)} of {len(tensors)} tensors (such as {min(left)}) match no module under the names of "
            "ComfyUI's loader."
        )
    return modules


def apply_as_comfyui(modules: dict[str, LoraModule], denoiser: ModelMixin) -> None:
    """Change a denoiser's weights in place by the formulas of ComfyUI's loader at strength 1."""
    with torch.no_grad():
        for path, module in modules.items():
            parameter = denoiser.get_parameter(f"{path}.weight")
            parameter.copy_(module.applied(parameter.detach().float()))


def _exact(value: Any) -> torch.Tensor:
    """Return a scalar in float32 if that holds it exactly, else in float64. Loaders take either."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)


def _row_norms(weight: torch.Tensor, floor: bool = False) -> torch.Tensor:
    """Return the norm of each row, (out,). With `floor`, add the epsilon with which ComfyUI guards its division."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms + torch.finfo(weight.dtype).eps if floor else norms
