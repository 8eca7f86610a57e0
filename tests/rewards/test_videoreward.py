"""VideoReward at a tiny size: the published names with their LoRA against a forward pass written out here."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import gelu, silu
from transformers import PreTrainedTokenizerFast

from tests.rewards.published import (
    MEAN,
    STD,
    Weights,
    attention,
    linear_shapes,
    noise,
    norm_shapes,
    shrunk,
    weights_of,
)
from tgol_trainer.rewards import Clip, RewardFacts, load_reward, score_columns
from tgol_trainer.rewards.video_patches import chosen_frames, frame_size, patches_of
from tgol_trainer.rewards.videoreward import VideoReward, VideoRewardModel, qwen2_vl_2b, read_template

WIDTH, HEADS, KEYS, HIDDEN, LAYERS = 24, 2, 1, 40, 2
VISION, VISION_HEADS, DEPTH = 16, 2, 2
HEAD, RANK, ALPHA = WIDTH // HEADS, 3, 7.0
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
SCORES = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
QUESTION = "\nRate looks: <|VQ_reward|>\nRate moves: <|MQ_reward|>\nText - {text_prompt}\nRate it: <|TA_reward|>\n"
STATISTICS = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5, "TA_mean": 0.1, "TA_std": 4.0}


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=plain)
    made.add_tokens(SPECIAL, special_tokens=True)
    return made


def tiny_config(vocab_size):
    config = qwen2_vl_2b(264)
    text, vision = config.text_config, config.vision_config
    shrunk(text, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS)
    shrunk(text, num_attention_heads=HEADS, num_key_value_heads=KEYS)
    shrunk(text, rope_parameters={**text.rope_parameters, "mrope_section": [2, 2, 2]})
    shrunk(vision, depth=DEPTH, embed_dim=VISION, hidden_size=WIDTH, num_heads=VISION_HEADS, mlp_ratio=2)
    return config


def lora_shapes(name, inside, out, bias):
    shapes = {f"{name}.base_layer.weight": ("", out, inside), f"{name}.lora_A.default.weight": ("", RANK, inside)}
    shapes[f"{name}.lora_B.default.weight"] = ("", out, RANK)
    return shapes | ({f"{name}.base_layer.bias": ("", out)} if bias else {})


def published_weights(outputs=1):
    """The layout of `model.pth`: PEFT around Qwen2-VL of transformers 4.45, with the unused language head."""
    visual, text = "base_model.model.visual.", "base_model.model.model."
    shapes = {f"{visual}patch_embed.proj.weight": ("", VISION, 3, 2, 14, 14), f"{text}norm.weight": ("n", WIDTH)}
    shapes |= {f"{text}embed_tokens.weight": ("", 264, WIDTH), "base_model.model.lm_head.weight": ("", 264, WIDTH)}
    shapes |= {"base_model.model.rm_head.weight": ("", outputs, WIDTH)}
    for layer in range(DEPTH):
        block = f"{visual}blocks.{layer}."
        shapes |= {**norm_shapes(block + "norm1", VISION), **norm_shapes(block + "norm2", VISION)}
        shapes |= linear_shapes(block + "attn.qkv", VISION, 3 * VISION)
        shapes |= linear_shapes(block + "attn.proj", VISION, VISION)
        shapes |= linear_shapes(block + "mlp.fc1", VISION, 2 * VISION)
        shapes |= linear_shapes(block + "mlp.fc2", 2 * VISION, VISION)
    shapes |= norm_shapes(visual + "merger.ln_q", VISION)
    shapes |= linear_shapes(visual + "merger.mlp.0", 4 * VISION, 4 * VISION)
    shapes |= linear_shapes(visual + "merger.mlp.2", 4 * VISION, WIDTH)
    for layer in range(LAYERS):
        block = f"{text}layers.{layer}."
        shapes |= {f"{block}input_layernorm.weight": ("n", WIDTH)}
        shapes |= {f"{block}post_attention_layernorm.weight": ("n", WIDTH)}
        shapes |= lora_shapes(block + "self_attn.q_proj", WIDTH, WIDTH, True)
        shapes |= lora_shapes(block + "self_attn.k_proj", WIDTH, KEYS * HEAD, True)
        shapes |= lora_shapes(block + "self_attn.v_proj", WIDTH, KEYS * HEAD, True)
        shapes |= lora_shapes(block + "self_attn.o_proj", WIDTH, WIDTH, False)
        shapes |= lora_shapes(block + "mlp.gate_proj", WIDTH, HIDDEN, False)
        shapes |= lora_shapes(block + "mlp.up_proj", WIDTH, HIDDEN, False)
        shapes |= lora_shapes(block + "mlp.down_proj", HIDDEN, WIDTH, False)
    return weights_of(shapes, seed=3, spread=0.3)


def turned(x, angles):
    """Rotate pairs (i, i + half) of the last axis by angles (length, half)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rounded(frequencies):
    return frequencies.bfloat16().double()


def vision_features(weights, frames):
    """Frames (T, 3, H, W) in CLIP's units, T even, to one feature for each 28 pixels square of two frames."""
    tower = Weights(weights, "base_model.model.visual.")
    rows, columns = frames.shape[2] // 14, frames.shape[3] // 14
    # Neighbours that are merged follow each other.
    order = [
        (2 * y + dy, 2 * x + dx)
        for y in range(rows // 2)
        for x in range(columns // 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    half = VISION // VISION_HEADS // 2
    frequencies = rounded(1 / 10000 ** (torch.arange(half // 2) * 2 / half))
    angles = torch.stack([torch.cat([y * frequencies, x * frequencies]) for y, x in order])
    features = []
    for pair in frames.view(-1, 2, *frames.shape[1:]):
        filters = tower["patch_embed.proj.weight"]
        x = torch.nn.functional.conv3d(pair.transpose(0, 1)[None], filters, stride=(2, 14, 14))[0, :, 0]
        x = torch.stack([x[:, y, column] for y, column in order])
        for layer in range(DEPTH):
            block = tower.under(f"blocks.{layer}.")
            q, k, v = block.linear("attn.qkv", block.norm("norm1", x, 1e-6)).chunk(3, dim=-1)
            q, k = (
                turned(part.view(-1, VISION_HEADS, 2 * half).transpose(0, 1), angles).transpose(0, 1).flatten(1)
                for part in (q, k)
            )
            x = x + block.linear("attn.proj", attention(q[None], k[None], v[None], VISION_HEADS)[0])
            inner = block.linear("mlp.fc1", block.norm("norm2", x, 1e-6))
            x = x + block.linear("mlp.fc2", inner * torch.sigmoid(1.702 * inner))
        merged = tower.norm("merger.ln_q", x, 1e-6).view(-1, 4 * VISION)
        features.append(tower.linear("merger.mlp.2", gelu(tower.linear("merger.mlp.0", merged))))
    return torch.cat(features)


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def raw_scores(weights, frames, prompt, rslora=False):
    text = Weights(weights, "base_model.model.model.")
    factor = ALPHA / (math.sqrt(RANK) if rslora else RANK)

    def projected(name, x):
        y = x @ text[f"{name}.base_layer.weight"].T
        y = y + factor * (x @ text[f"{name}.lora_A.default.weight"].T) @ text[f"{name}.lora_B.default.weight"].T
        bias = f"{name}.base_layer.bias"
        return y + text[bias] if text.prefix + bias in weights else y

    features = vision_features(weights, frames)
    words = tokenizer()
    words.add_tokens(SCORES, special_tokens=True)
    question = QUESTION.replace("{text_prompt}", prompt)
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    after = f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    table = text["embed_tokens.weight"]
    ids = [*words(before)["input_ids"], *[-1] * len(features), *words(after)["input_ids"]]
    x = torch.cat([table[words(before)["input_ids"]], features, table[words(after)["input_ids"]]])
    angles = torch.arange(len(x)).double()[:, None] * rounded(1 / 1e6 ** (torch.arange(HEAD // 2) * 2 / HEAD))
    mask = torch.full((len(x), len(x)), -math.inf).double().triu(1)
    for layer in range(LAYERS):
        name = f"layers.{layer}."
        normed = rms(x, text[name + "input_layernorm.weight"])
        q, k, v = (projected(f"{name}self_attn.{part}_proj", normed).view(len(x), -1, HEAD) for part in "qkv")
        q, k = (turned(part.transpose(0, 1), angles).transpose(0, 1) for part in (q, k))
        k, v = (part.repeat_interleave(HEADS // KEYS, dim=1) for part in (k, v))
        mixed = attention(q.flatten(1)[None], k.flatten(1)[None], v.flatten(1)[None], HEADS, mask)[0]
        x = x + projected(name + "self_attn.o_proj", mixed)
        normed = rms(x, text[name + "post_attention_layernorm.weight"])
        gated = silu(projected(name + "mlp.gate_proj", normed)) * projected(name + "mlp.up_proj", normed)
        x = x + projected(name + "mlp.down_proj", gated)
    head = weights["base_model.model.rm_head.weight"].double()
    numbers = rms(x, text["norm.weight"]) @ head.T
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
    default_config = staticmethod(tiny_config)


def load(folder, **options):
    return TinyVideoReward.from_pretrained(folder, tokenizer=folder / "tokenizer", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture
def any_size(monkeypatch):
    """Frames as small as the tests need them, where the model itself takes 100,352 pixels at least."""
    monkeypatch.setattr("tgol_trainer.rewards.video_patches._MIN_PIXELS", 1)


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
    assert frame_size(480, 832, 200_704) == (336, 588)  # 340 and 590, cut to multiples of 28
    for side in (768, 1000, *range(449, 2000, 13)):  # squares shrink to 448 up to rounding: which side of it counts
        expected = processors.smart_resize(side, side, 28, min_pixels=100_352, max_pixels=200_704)
        assert frame_size(side, side, 200_704) == expected
    for height, width in np.random.default_rng(0).integers(60, 2000, (200, 2)).tolist():
        found = frame_size(height, width, 200_704)
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
    with pytest.raises(OSError, match=r"put this file beside model_config\.json or pass its path"):
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
    monkeypatch.setattr(VideoReward, "default_config", staticmethod(tiny_config))
    made = load_reward("videoreward", source=folder, tokenizer=folder / "tokenizer", dtype=torch.bfloat16)
    assert made.facts == RewardFacts("videoreward", str(folder), None, made.scale) and made.takes == "videos"
