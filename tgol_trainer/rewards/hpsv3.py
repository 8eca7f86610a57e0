"""Score images by HPSv3: a mean and a standard deviation of human preference, from a Qwen2-VL-7B with a head."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts, check_prompts
from .checkpoints import build, find_file, load_part, read_weights
from .model import ModelReward
from .pixels import rgb
from .qwen2_vl import MAX_RATIO, Qwen2VLWithHead, as_named_here, authors_file, conversation, qwen2_vl, read_texts
from .video_patches import frame_size, patches_of

logger = logging.getLogger(__name__)

_IMAGE, _REWARD = "<|image_pad|>", "<|Reward|>"
_PIXELS = 200_704
"""Area of every image for the model: the authors set the least and the most to it."""
_TEMPLATE_FILE = "data_collator_qwen.py"
_TEMPLATE_URL = (
    "https://raw.githubusercontent.com/MizzenAI/HPSv3/d232ff8669a0b00759766067c6c3a26e2e717fac/"
    "hpsv3/dataset/data_collator_qwen.py"
)
_QUESTION_HASH = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
"""SHA-256 of the question of the published weights. HPSv3++ has a file of the same name with another one."""


def qwen2_vl_7b(vocab_size: int) -> Any:
    """Return the `Qwen2VLConfig` of Qwen2-VL-7B with the number of tokens of the tokenizer, as the authors set it."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    return qwen2_vl(vocab_size, text)


class HPSv3Model(Qwen2VLWithHead):
    """
    Qwen2-VL with the head of three layers that gives a mean and the logarithm of a standard deviation.

    Args:
        config (`Qwen2VLConfig`): Sizes.
    """

    def __init__(self, config: Any) -> None:
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        width = config.text_config.hidden_size
        head = [linear(width, 1024), relu(), torch.nn.Dropout(0.05), linear(1024, 16), relu(), linear(16, 2)]
        super().__init__(config, torch.nn.Sequential(*head))


def read_question(path: str | Path) -> str:
    """
    Read the question to the model from `data_collator_qwen.py` of MizzenAI/HPSv3, without running the file.

    `{text_prompt}` stands in the place of the prompt. A file with another question raises a `ValueError`.
    """
    texts = read_texts(path, _TEMPLATE_URL)
    question = texts.get("INSTRUCTION", "") + texts.get("prompt_with_special_token", "")
    if hashlib.sha256(question.encode()).hexdigest() != _QUESTION_HASH:
        raise ValueError(
            f"{path} does not hold the question that HPSv3 was trained on; HPSv3++ has a file of this name with "
            f"another. Use {_TEMPLATE_URL}."
        )
    return question


class HPSv3(ModelReward):
    """
    HPSv3: the mean of a distribution of human preference; `columns` also gives its standard deviation.

    Images are computed one after the other; prompts are not cut. There is no score for an image over 200 times as
    long as wide, and for a prompt that holds the model's own tokens.

    Source: Ma et al., 2025, "HPSv3: Towards Wide-Spectrum Human Preference Score" (arXiv 2508.03789), code
    MizzenAI/HPSv3.

    Args:
        model ([`HPSv3Model`]):
            On the device and in the dtype to compute with; its head in fp32. It is put in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Qwen2-VL's, with the token that the score is read at.
        template (`str`): The question to the model, from [`read_question`].
        facts ([`RewardFacts`], *optional*): What the scores are.
    """

    default_source = "MizzenAI/HPSv3"
    default_config = staticmethod(qwen2_vl_7b)
    """Returns the `Qwen2VLConfig` for a number of tokens; a subclass for a model of another size replaces it."""
    name = "hpsv3"
    scale = "mean of human preference, no fixed range, higher is better"

    def __init__(self, model: HPSv3Model, tokenizer: Any, template: str, *, facts: RewardFacts | None = None) -> None:
        super().__init__(facts)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template = template

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        filename: str = "HPSv3.safetensors",
        tokenizer: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | Path | None = None,
    ) -> HPSv3:
        """
        Load the published weights.

        Args:
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; `MizzenAI/HPSv3` by default. The authors use `torch.bfloat16`.
            filename (`str`, *optional*, defaults to `"HPSv3.safetensors"`):
                Name of the weights in the repository or the folder.
            tokenizer (`str` or `Path`, *optional*, defaults to `"Qwen/Qwen2-VL-7B-Instruct"`):
                Repository or folder of the tokenizer of Qwen2-VL.
            template (`str` or `Path`, *optional*):
                The authors' `data_collator_qwen.py`, which holds the question to the model and is not run. By default
                it is the one beside the weights, or else it is downloaded once from their repository.

        Returns:
            [`HPSv3`]

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`]; and `ValueError` for another question.
        """
        from transformers import AutoTokenizer

        source = str(source or cls.default_source)
        place = Path(source).expanduser()
        folder = place.parent if place.is_file() else place
        question = read_question(
            template or authors_file(folder, _TEMPLATE_FILE, _TEMPLATE_URL, "HPSv3", read_question)
        )
        path, commit = find_file(source, filename, revision=revision)
        words = load_part(AutoTokenizer, str(tokenizer), argument="tokenizer")
        words.add_tokens([_REWARD], special_tokens=True)
        weights = as_named_here(read_weights(path), dtype or torch.float32)
        model = build(lambda: HPSv3Model(cls.default_config(len(words))), weights, path)
        facts = RewardFacts(cls.name, source, commit, cls.scale)
        return cls(model.to(device), words, question, facts=facts)  # not its dtype: that would round the frequencies

    def _scores(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        return [None if found is None else found[0] for found in map(self._mean_and_spread, images, prompts)]

    @torch.no_grad()
    def columns(self, images: list[Image.Image], prompts: list[str]) -> dict[str, list[float | None]]:
        """
        Return the mean and the standard deviation of each image, from one pass.

        Args:
            images (`list[PIL.Image.Image]`): Images.
            prompts (`list[str]`): One prompt per image.

        Returns:
            `dict[str, list[float | None]]`: `""` for the mean, which is the score, and `"_sigma"`.
        """
        check_prompts(images, prompts)
        found = list(map(self._mean_and_spread, rgb(images), prompts))
        names = enumerate(("", "_sigma"))
        return {name: [None if scores is None else scores[index] for scores in found] for index, name in names}

    def _mean_and_spread(self, image: Image.Image, prompt: str) -> tuple[float, float] | None:
        if max(image.size) > MAX_RATIO * min(image.size):
            return None
        vision = self.model.model.config.vision_config
        height, width = frame_size(image.height, image.width, (_PIXELS, _PIXELS), 28)
        still = image.resize((width, height), Image.Resampling.BICUBIC)  # by Pillow, as the authors' code does
        patches, grid = patches_of([still] * vision.temporal_patch_size, (height, width))
        places = len(patches) // vision.spatial_merge_size**2
        text = conversation(_IMAGE * places, self.template.replace("{text_prompt}", prompt))
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        image_id, score_id = self.tokenizer.convert_tokens_to_ids([_IMAGE, _REWARD])
        if [int((ids == token).sum()) for token in (image_id, score_id)] != [places, 1]:
            logger.warning("No HPSv3 for the prompt %r: it holds tokens that the model reserves.", prompt[:80])
            return None
        like = self.model.model.visual.patch_embed.proj.weight
        mean, spread = (
            self.model(
                ids.to(like.device), patches.to(like.device, like.dtype), grid.to(like.device), image_id, [score_id]
            )[0]
            .double()
            .tolist()
        )
        return mean, math.exp(spread)
