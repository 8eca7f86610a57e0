"""What rewards share that are a Qwen2-VL with a head: sizes, network, names of weights, the authors' question."""

from __future__ import annotations

import ast
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgol_trainer._files import replacing

MAX_RATIO = 200
"""How many times as long as wide an image may be, by Qwen2-VL's own code."""


def qwen2_vl(vocab_size: int, text: Mapping[str, int]) -> Any:
    """
    Return the `Qwen2VLConfig` for a number of tokens, with the sizes in `text` that tell the models of the family
    apart: `hidden_size`, `intermediate_size`, `num_attention_heads`, `num_key_value_heads`.
    """
    from transformers import Qwen2VLConfig

    shared: dict[str, Any] = {"num_hidden_layers": 28, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    shared |= {"vocab_size": vocab_size, "bos_token_id": 151643, "eos_token_id": 151645}
    shared |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    shared |= {"max_position_embeddings": 32768}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return Qwen2VLConfig(text_config={**shared, **text}, vision_config={**vision, "hidden_size": text["hidden_size"]})


class Qwen2VLWithHead(torch.nn.Module):
    """
    Qwen2-VL without its language head, and a head that reads scores at some tokens.

    Positions are those of the authors' code: 0, 1, 2, ... in all three axes, unlike Qwen2-VL's own, and with rotary
    frequencies rounded to bfloat16, since the authors cast the whole model.

    Args:
        config (`Qwen2VLConfig`): Sizes.
        head (`torch.nn.Module`): From features (..., hidden_size) to numbers.
    """

    def __init__(self, config: Any, head: torch.nn.Module) -> None:
        super().__init__()
        from transformers import Qwen2VLModel

        self.model = Qwen2VLModel(config)
        self.rm_head = head
        theta = config.text_config.rope_parameters["rope_theta"]
        for module, base in ((self.model.language_model.rotary_emb, theta), (self.model.visual.rotary_pos_emb, 1e4)):
            for name, buffer in list(module.named_buffers()):
                size = buffer.shape[0]
                exponents = torch.arange(size, dtype=torch.float32, device="cpu") / size
                setattr(module, name, (1 / base**exponents).bfloat16().float())

    def forward(
        self, ids: torch.Tensor, patches: torch.Tensor, grid: torch.Tensor, visual_id: int, score_ids: Sequence[int]
    ) -> torch.Tensor:
        """
        Return the head's numbers for one image or video at the tokens `score_ids`: (len(score_ids), numbers), fp32.

        `ids` are (length,) token ids, with `visual_id` once for each patch that is left after merging; `patches`
        (number, values) and `grid` (1, 3) are those of [`patches_of`].
        """
        embeddings = self.model.language_model.embed_tokens(ids)
        embeddings[ids == visual_id] = self.model.visual(patches, grid_thw=grid).pooler_output.to(embeddings.dtype)
        # Without `position_ids` the language model counts 0, 1, 2, ...; Qwen2VLModel would compute its own positions.
        hidden = self.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]
        places = torch.cat([(ids == score_id).nonzero()[:, 0] for score_id in score_ids])
        numbers: torch.Tensor = self.rm_head(hidden[places].float())
        return numbers


def as_named_here(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    Rename weights of transformers 4.45's Qwen2-VL with a head `rm_head` to those of [`Qwen2VLWithHead`].

    The result is in `dtype`, the head in fp32. The weights of `lm_head`, which scores do not use, are dropped; unknown
    names stay.
    """
    renamed = {}
    for name, tensor in weights.items():
        new = name
        if new == "lm_head.weight":
            continue
        if new.startswith("visual."):
            new = "model." + new
        elif new.startswith("model."):
            new = "model.language_model." + new.removeprefix("model.")
        renamed[new] = tensor.to(torch.float32 if new.startswith("rm_head.") else dtype)
    return renamed


def conversation(visual: str, question: str) -> str:
    """Return a question about an image or video as Qwen2-VL takes it; `visual` has a token for each merged patch."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{visual}<|vision_end|>{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def read_texts(path: str | Path, url: str) -> dict[str, str]:
    """
    Return the texts that a Python file assigns to names, without running the file.

    A file that is no Python source raises a `ValueError`, which names `url` as where to get it.
    """
    try:
        statements = ast.parse(Path(path).read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Python source: {error}. Use {url}.") from error
    texts = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            texts.update(dict.fromkeys(names, str(statement.value.value)))
    return texts


def authors_file(folder: str | Path, name: str, url: str, reward: str, read: Callable[[Path], Any]) -> Path:
    """
    Return a file of a reward's authors: the one beside the weights, or a copy that is downloaded once.

    Args:
        folder (`str` or `Path`): Where it may lie.
        name (`str`): Its name there.
        url (`str`): Where it is downloaded.
        reward (`str`): Name of the reward in messages.
        read (`Callable`): Raises an error for a file that is not it, which keeps a proxy's page out of the cache.
    """
    beside = Path(folder).expanduser() / name
    if beside.is_file():
        return beside
    from huggingface_hub import cached_assets_path

    cached = cached_assets_path("tgol_trainer", namespace=reward.lower()) / name
    if not cached.is_file():
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - constants of this package
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"The question to {reward} could not be downloaded from {url} ({type(error).__name__}: "
                f"{error}). Where there is no network, put this file beside the weights or pass its path: template=..."
            ) from error
        with replacing(cached) as draft:
            draft.write_bytes(content)
            read(draft)
    return cached
