"""HPSv3 at a tiny size: the published names against a forward pass written out from formulas."""

import hashlib
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.rewards.published import MEAN, STD, Weights, linear_shapes, noise, weights_of
from tests.rewards.tiny_qwen2_vl import (
    WIDTH,
    qwen_shapes,
    text_features,
    tiny_config,
    tokenizer,
    vision_features,
)
from tgol_trainer.rewards import RewardFacts, load_reward, score_columns
from tgol_trainer.rewards.hpsv3 import HPSv3, HPSv3Model, qwen2_vl_7b

BEFORE, AFTER = "\nHow good? Text - {text_prompt}\n\n", "\nRate it: <|Reward|>\n\nEND\n"
HEAD = {"0": (WIDTH, 1024), "3": (1024, 16), "5": (16, 2)}


def plain_shapes(name, inside, out, bias):
    return linear_shapes(name, inside, out) if bias else {f"{name}.weight": ("", out, inside)}


def published_weights():
    shapes = qwen_shapes(263, "", plain_shapes)
    weights = weights_of(shapes, seed=4, spread=0.3)
    for name, (inside, out) in HEAD.items():
        weights |= weights_of(linear_shapes(f"rm_head.{name}", inside, out), seed=5, spread=1.5 / math.sqrt(inside))
    return weights


def expected(weights, image, size, prompt):
    """The mean and the standard deviation of one image, which Pillow brings to a (width, height)."""
    pixels = torch.tensor(np.asarray(image.resize(size, Image.Resampling.BICUBIC))).permute(2, 0, 1).double()
    pixels = (pixels / 255 - MEAN) / STD
    features = vision_features(Weights(weights, "visual."), torch.stack([pixels, pixels]))
    text, words = Weights(weights, "model."), tokenizer("<|Reward|>")

    def projected(name, x):
        return x @ text[f"{name}.weight"].T + (text[f"{name}.bias"] if f"model.{name}.bias" in weights else 0)

    question = BEFORE.replace("{text_prompt}", prompt) + AFTER
    found, ids = text_features(text, features, words, question, projected)
    x = found[ids.index(words.convert_tokens_to_ids("<|Reward|>"))]
    head = Weights(weights, "rm_head.")
    x = head.linear("5", head.linear("3", head.linear("0", x).clamp(min=0)).clamp(min=0))
    return x[0].item(), math.exp(x[1].item())


class TinyHPSv3(HPSv3):
    default_config = staticmethod(lambda vocab_size: tiny_config(qwen2_vl_7b(vocab_size)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_file(published_weights(), tmp_path / "HPSv3.safetensors")
    (tmp_path / "data_collator_qwen.py").write_text(
        f"raise SystemExit('ran')\nINSTRUCTION = {BEFORE!r}\nprompt_with_special_token = {AFTER!r}\n"
    )
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    question = hashlib.sha256((BEFORE + AFTER).encode()).hexdigest()
    monkeypatch.setattr("tgol_trainer.rewards.hpsv3._QUESTION_HASH", question)
    return tmp_path


def load(folder, source=None, **options):
    return TinyHPSv3.from_pretrained(source or folder, tokenizer=folder / "tokenizer", **options)


def test_mean_and_deviation_are_a_forward_from_the_published_names(folder):
    # 200,704 pixels are 448 x 448: a small image is enlarged, its sides rounded up, and a large one rounded down.
    images = [noise(448, 448, seed=1), noise(60, 40, seed=2), noise(1000, 300, seed=3)]
    sizes = [(448, 448), (560, 392), (812, 224)]
    prompts = ["a cat", "two dogs {x}", "\u00fc"]
    wanted = [
        expected(published_weights(), image, size, prompt)
        for image, size, prompt in zip(images, sizes, prompts, strict=True)
    ]
    reward = load(folder)
    found = score_columns(reward, images, prompts)
    assert list(found) == ["", "_sigma"]
    for index, name in enumerate(found):
        values = [each[index] for each in wanted]
        assert max(values) - min(values) > 0.01  # so the comparison can fail
        assert found[name] == pytest.approx(values, abs=2e-4)
    assert reward(images, prompts) == found[""]
    assert load(folder, folder / "HPSv3.safetensors")(images[1:2], prompts[1:2]) == found[""][1:2]


def test_half_precision_leaves_the_head_in_fp32(folder):
    low = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.model.rm_head.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in low.model.model.parameters()} == {torch.bfloat16}
    images = [noise(56, 56)]
    assert low(images, ["a"]) == pytest.approx(load(folder)(images, ["a"]), abs=0.3)


def test_what_cannot_be_scored_is_none_and_the_rest_is(folder, caplog):
    images = [noise(2, 500), noise(56, 56), noise(56, 56), noise(56, 56)]
    with caplog.at_level(logging.WARNING):
        scores = load(folder)(images, ["a", "a <|Reward|>", "<|image_pad|>", "a"])
    assert [score is None for score in scores] == [True, True, True, False]
    assert "holds tokens that the model reserves" in caplog.text
    assert score_columns(load(folder), [], []) == {"": [], "_sigma": []}


def test_the_question_of_another_model_is_refused(folder):
    path = folder / "data_collator_qwen.py"
    path.write_text(path.read_text().replace("How good?", "How pretty?"))
    with pytest.raises(ValueError, match=r"the question that HPSv3 was trained on; HPSv3\+\+ .*MizzenAI/HPSv3"):
        load(folder)
    path.write_text("<html>")
    with pytest.raises(ValueError, match="cannot be read as Python source"):
        load(folder)


def test_weights_that_are_missing_or_of_another_shape_are_refused(folder):
    weights = published_weights()
    del weights["rm_head.5.bias"]
    weights["rm_head.3.weight"] = torch.zeros(8, 1024)
    save_file(weights, folder / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(rm_head\.5\.bias\); 1 of another shape \(rm_head\.3\.weight"):
        load(folder)


def test_the_full_size_model_is_qwen2_vl_7b_with_a_head():
    with torch.device("meta"):
        model = HPSv3Model(qwen2_vl_7b(152_064))
    head = 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2
    numbers = sum(parameter.numel() for parameter in model.parameters()) - head
    assert numbers + 152_064 * 3584 == 8_291_375_616  # the number that the page of Qwen2-VL-7B-Instruct gives
    text = model.model.config.text_config
    assert text.hidden_size / text.num_attention_heads == 128


def test_it_is_loaded_by_name_with_its_facts(folder, monkeypatch):
    monkeypatch.setattr(HPSv3, "default_config", TinyHPSv3.default_config)
    reward = load_reward("hpsv3", source=folder, tokenizer=folder / "tokenizer", dtype="bfloat16")
    assert reward.facts == RewardFacts("hpsv3", str(folder), None, HPSv3.scale)
