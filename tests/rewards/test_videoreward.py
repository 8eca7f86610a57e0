"""VideoReward at a tiny size: the published names with their LoRA against a forward pass written out here."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.published import MEAN, STD, Weights, noise, weights_of
from tests.rewards.tiny_qwen2_vl import (
    WIDTH,
    qwen_shapes,
    text_features,
    tiny_config,
    tokenizer,
    vision_features,
)
from tgol_trainer.rewards import Clip, RewardFacts, load_reward, score_columns
from tgol_trainer.rewards.video_patches import chosen_frames, frame_size, patches_of
from tgol_trainer.rewards.videoreward import VideoReward, VideoRewardModel, qwen2_vl_2b, read_template

RANK, ALPHA = 3, 7.0
SCORES = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
QUESTION = "\nRate looks: <|VQ_reward|>\nRate moves: <|MQ_reward|>\nText - {text_prompt}\nRate it: <|TA_reward|>\n"
LIMITS = (100_352, 200_704)
STATISTICS = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5, "TA_mean": 0.1, "TA_std": 4.0}


def lora_shapes(name, inside, out, bias):
    shapes = {f"{name}.base_layer.weight": ("", out, inside), f"{name}.lora_A.default.weight": ("", RANK, inside)}
    shapes[f"{name}.lora_B.default.weight"] = ("", out, RANK)
    return shapes | ({f"{name}.base_layer.bias": ("", out)} if bias else {})


def published_weights(outputs=1):
    """The layout of `model.pth`: PEFT around Qwen2-VL of transformers 4.45, with the unused language head."""
    shapes = qwen_shapes(265, "base_model.model.", lora_shapes)
    return weights_of(shapes | {"base_model.model.rm_head.weight": ("", outputs, WIDTH)}, seed=3, spread=0.3)


def raw_scores(weights, frames, prompt, rslora=False):
    text = Weights(weights, "base_model.model.model.")
    factor = ALPHA / (math.sqrt(RANK) if rslora else RANK)

    def projected(name, x):
        y = x @ text[f"{name}.base_layer.weight"].T
        y = y + factor * (x @ text[f"{name}.lora_A.default.weight"].T) @ text[f"{name}.lora_B.default.weight"].T
        bias = f"{name}.base_layer.bias"
        return y + text[bias] if text.prefix + bias in weights else y

    features = vision_features(Weights(weights, "base_model.model.visual."), frames)
    words = tokenizer(*SCORES)
    found, ids = text_features(text, features, words, QUESTION.replace("{text_prompt}", prompt), projected)
    head = weights["base_model.model.rm_head.weight"].double()
    numbers = found @ head.T
    places = [ids.index(words.convert_tokens_to_ids(token)) for token in SCORES]
    return [numbers[place, min(i, len(head) - 1)].item() for i, place in enumerate(places)]


def clip(frames=9, width=84, height=56, fps=4.0, seed=0):
    return Clip([noise(width, height, seed=10 * seed + i) for i in range(frames)], fps)


def normalised(video, indices):
    frames = torch.stack([torch.tensor(np.asarray(video[index])).permute(2, 0, 1) for index in indices]).double()
    return (frames / 255 - MEAN) / STD


def write(folder, weights=None, **changes):
    settings = {
        "data_config": {"fps": 2, "sample_type": "uniform", "prompt_template_type": "detailed_special"},
        "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
        "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
        "inference_config": STATISTICS,
    }
    for name, values in changes.items():
        settings[name] = {**settings[name], **values}
    (folder / "checkpoint-11352").mkdir(exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(settings))
    torch.save(published_weights() if weights is None else weights, folder / "checkpoint-11352" / "model.pth")
    (folder / "prompt_template.py").write_text(
        f"raise SystemExit('ran')\nOTHER = 'x'\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {QUESTION!r}\n"
    )
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


class TinyVideoReward(VideoReward):
    default_config = staticmethod(lambda vocab_size: tiny_config(qwen2_vl_2b(vocab_size)))


def load(folder, **options):
    return TinyVideoReward.from_pretrained(folder, tokenizer=folder / "tokenizer", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture
def any_size(monkeypatch):
    """Frames as small as the tests need them, where the model itself takes 100,352 pixels at least."""
    monkeypatch.setattr("tgol_trainer.rewards.videoreward._MIN_PIXELS", 1)


@pytest.mark.parametrize(("outputs", "rslora"), [(1, False), (3, True)])
def test_the_scores_are_a_forward_from_the_published_names_with_the_lora_beside_the_base(
    any_size, tmp_path, outputs, rslora
):
    weights = published_weights(outputs)
    folder = write(tmp_path, weights, model_config={"output_dim": outputs}, peft_lora_config={"use_rslora": rslora})
    reward = load(folder)
    videos, prompts = [clip(), clip(frames=25, seed=1), clip(seed=2, width=56)], ["a cat", "two dogs {x}", "ü"]
    indices = [
        [0, 3, 5, 8],
        [0, 2, 4, 7, 9, 11, 13, 15, 17, 20, 22, 24],
        [0, 3, 5, 8],
    ]  # 9 and 25 frames of 4 a second
    expected = [
        raw_scores(weights, normalised(video, chosen), prompt, rslora)
        for video, prompt, chosen in zip(videos, prompts, indices, strict=True)
    ]
    found = score_columns(reward, videos, prompts)
    assert list(found) == ["", "_vq", "_mq", "_ta"]
    for index, name in enumerate(["VQ", "MQ", "TA"]):
        wanted = [(raw[index] - STATISTICS[f"{name}_mean"]) / STATISTICS[f"{name}_std"] for raw in expected]
        assert max(wanted) - min(wanted) > 0.01  # so the comparison can fail
        assert found[f"_{name.lower()}"] == pytest.approx(wanted, abs=2e-4)
    sums = [sum(found[ending][i] for ending in ("_vq", "_mq", "_ta")) for i in range(3)]
    assert found[""] == pytest.approx(sums) and reward(videos, prompts) == found[""]
    assert reward(videos[1:2], prompts[1:2]) == found[""][1:2]


def test_half_precision_leaves_the_head_and_the_frequencies_in_fp32(any_size, folder):
    low, full = load(folder, dtype=torch.bfloat16), load(folder)
    assert low.model.rm_head.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in low.model.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in low.model.buffers()} == {torch.float32}
    assert low([clip()], ["a"]) == pytest.approx(full([clip()], ["a"]), abs=0.3)


def test_a_frame_rate_that_is_not_told_is_the_one_given(any_size, folder):
    slow = load(folder, fps=4.0)
    assert slow([list(clip())], ["a"]) == load(folder)([clip()], ["a"])
    assert slow([list(clip())], ["a"]) != load(folder, fps=0.5)([list(clip())], ["a"])


def test_what_cannot_be_scored_is_none_and_the_rest_is(any_size, folder, caplog):
    reward = load(folder)
    videos = [clip(frames=1), clip(frames=0), clip(), clip(), clip(width=2, height=500), clip(frames=2)]
    prompts = ["a", "a", "a <|VQ_reward|>", "a", "a", "a"]
    with caplog.at_level(logging.WARNING):
        scores = reward(videos, prompts)
    assert [score is None for score in scores] == [True, True, True, False, True, False]
    assert "holds tokens that the model reserves" in caplog.text
    assert score_columns(reward, [], []) == {"": [], "_vq": [], "_mq": [], "_ta": []}


# ---- Frames ----


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 10.1 frames: ten
        (49, 8, [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),  # 12.25: twelve
        (30, 30, [0, 10, 19, 29]),  # two frames: four at least
        (5, 30, [0, 1, 3, 4]),
        (3, 1, [0, 2]),  # no more than there are, and an even number
        (1, 1, []),
        (0, 1, []),
    ],
)
def test_frames_are_chosen_at_two_a_second_even_in_number_and_first_to_last(total, fps, expected):
    assert chosen_frames(total, fps) == expected


def test_frames_keep_their_shape_within_the_limits_of_the_area():
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    assert frame_size(480, 832, LIMITS) == (336, 588)  # 340 and 590, cut to multiples of 28
    for side in (768, 1000, *range(449, 2000, 13)):  # squares shrink to 448 up to rounding: which side of it counts
        expected = processors.smart_resize(side, side, 28, min_pixels=100_352, max_pixels=200_704)
        assert frame_size(side, side, LIMITS) == expected
    for height, width in np.random.default_rng(0).integers(60, 2000, (200, 2)).tolist():
        found = frame_size(height, width, LIMITS)
        assert found == processors.smart_resize(height, width, 28, min_pixels=100_352, max_pixels=200_704)
        assert 100_352 <= found[0] * found[1] <= 200_704


def test_patches_of_a_still_are_those_of_the_image_processor_of_transformers():
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    image = noise(112, 84, seed=1)
    expected = processors.Qwen2VLImageProcessorPil()(images=[image], do_resize=False, return_tensors="pt")
    patches, grid = patches_of([image, image], (84, 112))
    assert torch.allclose(patches, expected["pixel_values"], atol=1e-5)
    assert grid.tolist() == expected["image_grid_thw"].tolist() == [[1, 6, 8]]


def test_each_value_of_a_patch_comes_from_its_frame_row_column_and_colour():
    frames = [noise(112, 56, seed=seed) for seed in range(6)]
    patches, grid = patches_of(frames, (56, 112))
    assert grid.tolist() == [[3, 4, 8]] and patches.shape == (96, 1176)
    pixels = normalised(frames, range(6))
    rng = np.random.default_rng(0)
    for time, y, x, colour, frame, row, column in rng.integers(0, [3, 4, 8, 3, 2, 14, 14], (200, 7)):
        number = time * 32 + (y // 2) * 16 + (x // 2) * 4 + (y % 2) * 2 + x % 2
        value = patches[number, ((colour * 2 + frame) * 14 + row) * 14 + column].item()
        assert value == pytest.approx(pixels[2 * time + frame, colour, 14 * y + row, 14 * x + column].item(), abs=1e-5)


def test_frames_are_resized_bicubically_with_antialiasing_to_whole_values():
    frames = [noise(100, 60, seed=1)] * 2
    patches, _ = patches_of(frames, (28, 56))
    values = (patches.view(-1, 3, 392) * STD.float().view(3, 1) + MEAN.float().view(3, 1)) * 255
    assert torch.allclose(values, values.round(), atol=1e-3)
    pillow = frames[0].resize((56, 28), Image.Resampling.BICUBIC)  # Pillow's always antialiases
    expected, _ = patches_of([pillow, pillow], (28, 56))
    difference = (patches - expected).abs() * 0.27 * 255
    assert difference.mean() < 0.3 and difference.max() < 4  # it rounds between its two passes


# ---- Files ----


def test_the_full_size_model_fills_the_published_file():
    with torch.device("meta"):
        model = VideoRewardModel(qwen2_vl_2b(151_660), 1)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    # Heads leave no trace in the weights: 128 wide in the text, 80 in images.
    text, vision = model.model.config.text_config, model.model.config.vision_config
    assert (text.hidden_size / text.num_attention_heads, vision.embed_dim / vision.num_heads) == (128, 80)
    assert 2 * sum(text.rope_parameters["mrope_section"]) == 128
    language_head = 151_660 * 1536
    # Rank 64 beside every projection: 1536 wide, keys and values 256, inside 8960.
    lora = 28 * 64 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    # In bfloat16; the rest of the file, 0.3 MB, are names.
    assert 2 * (numbers + language_head + lora) == pytest.approx(5_031_072_529, abs=500_000)


def test_a_missing_an_extra_and_a_misshapen_weight_are_refused(tmp_path):
    weights = published_weights()
    short = {key: value for key, value in weights.items() if key != "base_model.model.model.norm.weight"}
    with pytest.raises(ValueError, match=r"does not hold the weights of this reward: 1 missing \(.*norm\.weight\)"):
        load(write(tmp_path, short))
    half = {key: value for key, value in weights.items() if "1.mlp.up_proj.lora_B" not in key}
    with pytest.raises(ValueError, match=r"1 unexpected \(.*up_proj\.lora_A"):
        load(write(tmp_path, half))
    with pytest.raises(ValueError, match=r"1 of another shape \(rm_head\.weight \(3, 24\) instead of \(1, 24\)"):
        load(write(tmp_path, published_weights(3)))


def test_another_way_of_scoring_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"data_config\.sample_type is 'multi_pts'; only 'uniform'"):
        load(write(tmp_path, data_config={"sample_type": "multi_pts"}))
    for content, message in (("[1]", "holds list, not the settings"), ("{", "is not JSON")):
        (tmp_path / "model_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"model_config\.json {message}"):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"is a file; pass the folder with model_config\.json"):
        load(tmp_path / "model_config.json")


@pytest.mark.parametrize("text", ["x = 1", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 'no tokens'", "not python ("])
def test_a_file_without_the_question_is_refused(tmp_path, text):
    (tmp_path / "t.py").write_text(text)
    with pytest.raises(ValueError, match=r"t\.py .*KwaiVGI/VideoAlign"):
        read_template(tmp_path / "t.py")


def test_without_a_network_the_question_is_asked_for_by_its_address(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("tgol_trainer.rewards.videoreward._TEMPLATE_URL", (tmp_path / "absent.py").as_uri())
    (tmp_path / "weights").mkdir()
    write(tmp_path / "weights")
    template = tmp_path / "weights" / "prompt_template.py"
    template.rename(tmp_path / "moved.py")
    with pytest.raises(OSError, match=r"put this file beside the weights or pass its path"):
        load(tmp_path / "weights")
    assert load(tmp_path / "weights", template=tmp_path / "moved.py").template == QUESTION
    (tmp_path / "page.py").write_text("<html>Log in</html>")
    for name in ("page.py", "absent.py"):  # the page was not kept, so it is asked for again
        monkeypatch.setattr("tgol_trainer.rewards.videoreward._TEMPLATE_URL", (tmp_path / name).as_uri())
        with pytest.raises(
            (ValueError, OSError), match="cannot be read as Python" if name == "page.py" else "could not"
        ):
            load(tmp_path / "weights")
    monkeypatch.setattr("tgol_trainer.rewards.videoreward._TEMPLATE_URL", (tmp_path / "moved.py").as_uri())
    assert load(tmp_path / "weights").template == QUESTION
    (tmp_path / "moved.py").unlink()  # it was kept
    assert load(tmp_path / "weights").template == QUESTION


def test_it_is_loaded_by_name_with_its_facts(folder, monkeypatch):
    monkeypatch.setattr(VideoReward, "default_config", TinyVideoReward.default_config)
    made = load_reward("videoreward", source=folder, tokenizer=folder / "tokenizer", dtype=torch.bfloat16)
    assert made.facts == RewardFacts("videoreward", str(folder), None, made.scale) and made.takes == "videos"
