"""Score videos by VideoReward: visual quality, motion quality and text alignment, from a Qwen2-VL with a head."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from .base import Medium, RewardFacts, check_prompts
from .checkpoints import build, find_file, load_part, read_weights
from .model import ModelReward
from .pixels import rgb
from .qwen2_vl import MAX_RATIO, Qwen2VLWithHead, as_named_here, authors_file, conversation, qwen2_vl, read_texts
from .video_patches import chosen_frames, frame_size, patches_of

logger = logging.getLogger(__name__)

NAMES = ("VQ", "MQ", "TA")
_TOKENS = tuple(f"<|{name}_reward|>" for name in NAMES)
_VIDEO = "<|video_pad|>"
# Mean and standard deviation of each score on the authors' data; those in `model_config.json` come first.
_STATISTICS = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811}
_STATISTICS |= {"TA_mean": 2.8105, "TA_std": 2.5121}
_MIN_PIXELS = 100_352
_TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
_TEMPLATE_FILE = "prompt_template.py"
_TEMPLATE_URL = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/3e5ebc600aebc4d28300e9132b0a23ee8e1bc47c/" + _TEMPLATE_FILE
)
_LORA = re.compile(r"(.+)\.lora_A\.default\.weight")


def merged_weights(
    weights: Mapping[str, torch.Tensor], *, alpha: float, rslora: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """
    Add the LoRA of the published file to its base and rename all weights to those of [`VideoRewardModel`].

    The names of `model.pth` are those of PEFT around transformers 4.45's Qwen2-VL. The LoRA's factor is `alpha` over
    its rank, or over the root of its rank with `rslora`. Products are computed in fp32; the result is in `dtype`. The
    weights of `lm_head`, which the score does not use, are dropped; unknown names stay.
    """
    merged = dict(weights)
    for name in weights:
        found = _LORA.fullmatch(name)
        base, up = (f"{found[1]}.base_layer.weight", f"{found[1]}.lora_B.default.weight") if found else ("", "")
        if base in merged and up in merged:
            down, rise = merged.pop(name).float(), merged.pop(up).float()
            factor = alpha / (math.sqrt(down.shape[0]) if rslora else down.shape[0])
            merged[base] = merged[base].float() + factor * (rise @ down)
    plain = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): merged[name] for name in merged}
    return as_named_here(plain, dtype)


def qwen2_vl_2b(vocab_size: int) -> Any:
    """Return the `Qwen2VLConfig` of Qwen2-VL-2B with the number of tokens of the tokenizer, as the authors set it."""
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    return qwen2_vl(vocab_size, text)


class VideoRewardModel(Qwen2VLWithHead):
    """
    Qwen2-VL with the linear head that reads the scores.

    Args:
        config (`Qwen2VLConfig`): Sizes.
        output_dim (`int`): Numbers that the head gives for a token: one, or one for each score.
    """

    def __init__(self, config: Any, output_dim: int) -> None:
        super().__init__(config, torch.nn.Linear(config.text_config.hidden_size, output_dim, bias=False))


def read_template(path: str | Path) -> str:
    """
    Read the question to the model from `prompt_template.py` of KwaiVGI/VideoAlign, without running the file.

    `{text_prompt}` stands in the place of the prompt. A file without such a question raises a `ValueError`.
    """
    text = read_texts(path, _TEMPLATE_URL).get(_TEMPLATE_NAME, "")
    if not all(text.count(part) == 1 for part in (*_TOKENS, "{text_prompt}")):
        raise ValueError(f"{path} holds no text {_TEMPLATE_NAME} with {', '.join(_TOKENS)}. Use {_TEMPLATE_URL}.")
    return text


class VideoReward(ModelReward):
    """
    VideoReward: visual quality (VQ), motion quality (MQ) and text alignment (TA) of a video; the score is their sum.

    The model sees about two frames per second, so the frame rate of a clip matters: that of a [`Clip`] is used, or
    else `fps`. There is no score for a clip of fewer than two frames, for one over 200 times as long as wide, and for
    a prompt that holds the model's own tokens. Clips are computed one after the other; prompts are not cut.

    Source: Liu et al., 2025, "Improving Video Generation with Human Feedback" (arXiv 2501.13918), code VideoAlign.

    Args:
        model ([`VideoRewardModel`]):
            On the device and in the dtype to compute with; its head in fp32. It is put in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Qwen2-VL's, with the three score tokens.
        template (`str`): The question to the model, from [`read_template`].
        statistics (`Mapping[str, float]`, *optional*): `VQ_mean`, `VQ_std` and so on.
        sampling_fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        max_pixels (`int`, *optional*, defaults to 200704): Largest area of a frame.
        fps (`float`, *optional*, defaults to 16.0): Frames per second of clips that do not state it; 16 is Wan 2.1's.
        facts ([`RewardFacts`], *optional*): What the scores are.
    """

    default_source = "KlingTeam/VideoReward"
    default_config = staticmethod(qwen2_vl_2b)
    """Returns the `Qwen2VLConfig` for a number of tokens; a subclass for a model of another size replaces it."""
    name = "videoreward"
    scale = "VQ + MQ + TA, each standardised, higher is better"
    takes: ClassVar[Medium] = "videos"

    def __init__(
        self,
        model: VideoRewardModel,
        tokenizer: Any,
        template: str,
        *,
        statistics: Mapping[str, float] = _STATISTICS,
        sampling_fps: float = 2.0,
        max_pixels: int = 200_704,
        fps: float = 16.0,
        facts: RewardFacts | None = None,
    ) -> None:
        super().__init__(facts)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template = template
        self.statistics = dict(statistics)
        self.sampling_fps, self.max_pixels, self.fps = sampling_fps, max_pixels, fps

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        filename: str = "checkpoint-11352/model.pth",
        tokenizer: str | Path = "Qwen/Qwen2-VL-2B-Instruct",
        template: str | Path | None = None,
        fps: float = 16.0,
    ) -> VideoReward:
        """
        Load the published weights and merge their LoRA.

        Args:
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; `source` is a repository or a folder with `model_config.json`,
                `KlingTeam/VideoReward` by default. The authors use `torch.bfloat16`.
            filename (`str`, *optional*, defaults to `"checkpoint-11352/model.pth"`):
                Name of the weights in the repository or the folder.
            tokenizer (`str` or `Path`, *optional*, defaults to `"Qwen/Qwen2-VL-2B-Instruct"`):
                Repository or folder of the tokenizer of Qwen2-VL.
            template (`str` or `Path`, *optional*):
                The authors' `prompt_template.py`, which holds the question to the model and is not run. By default it
                is the one beside `model_config.json`, or else it is downloaded once from their repository.
            fps (`float`, *optional*, defaults to 16.0): Frames per second of clips that do not state it.

        Returns:
            [`VideoReward`]

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`]; and `ValueError` if `model_config.json` asks for
                another way of scoring.
        """
        from transformers import AutoTokenizer

        source = str(source or cls.default_source)
        if Path(source).expanduser().is_file():
            raise ValueError(f"`source`: {source} is a file; pass the folder with model_config.json and {filename}.")
        settings = _read_settings(find_file(source, "model_config.json", revision=revision)[0])
        path, commit = find_file(source, filename, revision=revision)
        words = load_part(AutoTokenizer, str(tokenizer), argument="tokenizer")
        words.add_tokens(list(_TOKENS), special_tokens=True)
        question = read_template(
            template or authors_file(source, _TEMPLATE_FILE, _TEMPLATE_URL, "VideoReward", read_template)
        )
        lora = settings["peft_lora_config"]
        weights = merged_weights(
            read_weights(path),
            alpha=float(lora.get("lora_alpha", 128)),
            rslora=bool(lora.get("use_rslora", False)),
            dtype=dtype or torch.float32,
        )
        outputs = int(settings["model_config"].get("output_dim", 1))
        model = build(lambda: VideoRewardModel(cls.default_config(len(words)), outputs), weights, path)
        data = settings["data_config"]
        return cls(
            model.to(device),  # not its dtype: that would round the frequencies
            words,
            question,
            statistics=_STATISTICS | settings["inference_config"],
            sampling_fps=float(data.get("fps") or 2.0),
            max_pixels=int(data.get("max_frame_pixels") or 200_704),
            fps=fps,
            facts=RewardFacts(cls.name, source, commit, cls.scale),
        )

    def __call__(self, videos: list[list[Image.Image]], prompts: list[str], /) -> list[float | None]:
        """Return one score per video, the sum of the three, as [`RewardFunction`] says."""
        return self.columns(videos, prompts)[""]

    def columns(self, videos: list[list[Image.Image]], prompts: list[str]) -> dict[str, list[float | None]]:
        """
        Return the sum and the three scores of each video, from one pass.

        Args:
            videos (`list[list[PIL.Image.Image]]`): Frames of each video, best as [`Clip`]s.
            prompts (`list[str]`): One prompt per video.

        Returns:
            `dict[str, list[float | None]]`: `""` for the sum, `"_vq"`, `"_mq"` and `"_ta"`.
        """
        check_prompts(videos, prompts, self.takes)
        found = [self._three_scores(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
        columns: dict[str, list[float | None]] = {"": [None if scores is None else sum(scores) for scores in found]}
        for index, name in enumerate(NAMES):
            columns[f"_{name.lower()}"] = [None if scores is None else scores[index] for scores in found]
        return columns

    @torch.no_grad()
    def _three_scores(self, video: list[Image.Image], prompt: str) -> list[float] | None:
        chosen = chosen_frames(len(video), getattr(video, "fps", None) or self.fps, self.sampling_fps)
        if not chosen or max(video[0].size) > MAX_RATIO * min(video[0].size):
            return None
        vision = self.model.model.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        patches, grid = patches_of(
            rgb([video[index] for index in chosen]),
            frame_size(video[0].height, video[0].width, (_MIN_PIXELS, self.max_pixels), side),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
        )
        places = len(patches) // vision.spatial_merge_size**2
        text = conversation(_VIDEO * places, self.template.replace("{text_prompt}", prompt))
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        video_id, *score_ids = self.tokenizer.convert_tokens_to_ids([_VIDEO, *_TOKENS])
        counts = [int((ids == token).sum()) for token in (video_id, *score_ids)]
        if counts != [places, 1, 1, 1]:
            logger.warning("No VideoReward for the prompt %r: it holds tokens that the model reserves.", prompt[:80])
            return None
        like = self.model.model.visual.patch_embed.proj.weight
        numbers = self.model(
            ids.to(like.device), patches.to(like.device, like.dtype), grid.to(like.device), video_id, score_ids
        )
        raw = numbers[:, 0] if numbers.shape[1] == 1 else numbers.diagonal()
        return [
            (value - self.statistics[f"{name}_mean"]) / self.statistics[f"{name}_std"]
            for name, value in zip(NAMES, raw.double().tolist(), strict=True)
        ]


def _read_settings(path: Path) -> dict[str, dict[str, Any]]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download it again.") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds {type(read).__name__}, not the settings of VideoReward. Download it again.")
    names = ("data_config", "model_config", "peft_lora_config", "inference_config")
    settings = {name: dict(read.get(name) or {}) for name in names}
    known: dict[str, dict[str, Any]] = {
        "data_config": {"sample_type": "uniform", "prompt_template_type": "detailed_special", "num_frames": None},
        # With special tokens the authors' code reads the scores at them, whatever `reward_token` says.
        "model_config": {"use_special_tokens": True},
    }
    for part, values in known.items():
        for name, value in values.items():
            if settings[part].get(name, value) != value:
                raise ValueError(
                    f"{path}: {part}.{name} is {settings[part][name]!r}; only {value!r}, the value of "
                    "KlingTeam/VideoReward, is supported."
                )
    return settings
