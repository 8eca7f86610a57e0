"""Reward models at tiny sizes: weights under their published names against forward passes written out."""

import hashlib
import logging
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.rewards.published import (
    EMBED,
    HEAD,
    LOGIT_SCALE,
    MEAN,
    PATCH,
    PROMPTS,
    SIDE,
    STD,
    VISION_HEADS,
    Weights,
    aesthetic,
    affine_head,
    bert_tokenizer,
    blip_image,
    blip_text,
    head_weights,
    hps,
    image_reward,
    image_reward_weights,
    noise,
    normalised,
    open_clip_cosines,
    open_clip_tower,
    open_clip_weights,
    some_images,
    tiny_clip_config,
)
from tgol_trainer.rewards import RewardFacts, load_reward, score_images
from tgol_trainer.rewards.clip import ClipScore, PickScore
from tgol_trainer.rewards.hpsv2 import HPSv2, padded_pixels, vit_h_14
from tgol_trainer.rewards.imagereward import ImageRewardModel, blip_configs


def close(value, tolerance=2e-5):
    return pytest.approx(value.tolist() if isinstance(value, torch.Tensor) else value, abs=tolerance)


def test_hpsv2_is_the_cosine_of_an_open_clip_forward_from_the_published_names(clip_folder):
    expected = open_clip_cosines(open_clip_weights(), normalised(some_images()), PROMPTS)
    assert expected.max() - expected.min() > 0.02  # so the comparison can fail
    assert score_images(hps(clip_folder), some_images(), PROMPTS) == close(expected)


def test_clip_score_and_pickscore_scale_the_same_cosine(clip_folder):
    cosines = open_clip_cosines(open_clip_weights(), normalised(some_images()), PROMPTS)
    assert ClipScore.from_pretrained(clip_folder)(some_images(), PROMPTS) == close(100 * cosines, 2e-3)
    assert PickScore.from_pretrained(clip_folder)(some_images(), PROMPTS) == close(
        math.exp(LOGIT_SCALE) * cosines, 2e-3
    )


def test_weights_in_half_precision_are_computed_with_in_the_dtype_asked_for(clip_folder, tmp_path):
    halves = {name: tensor.half() for name, tensor in open_clip_weights().items()}
    torch.save({"state_dict": halves}, tmp_path / "half.pt")
    made = hps(clip_folder, tmp_path / "half.pt")
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    assert made(some_images(), PROMPTS) == close(open_clip_cosines(halves, normalised(some_images()), PROMPTS))
    low = hps(clip_folder, dtype=torch.bfloat16)(some_images(), PROMPTS)
    assert low == close(hps(clip_folder)(some_images(), PROMPTS), 0.05)
    cosines, scaled = low, PickScore.from_pretrained(clip_folder, dtype=torch.bfloat16)(some_images(), PROMPTS)
    assert [b / a for a, b in zip(cosines, scaled, strict=True)] == pytest.approx(
        [math.exp(LOGIT_SCALE)] * 3, rel=1e-4
    )
    # Normalised and multiplied in fp32: the results are not numbers that bfloat16 can hold.
    assert any(score != torch.tensor(score).bfloat16().item() for score in low)


@pytest.mark.parametrize("kind", ["hps", "clip", "image_reward", "aesthetic"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_and_odd_size_score_as_their_rgb_form(rewards, kind, mode):
    image = noise(37, 11, seed=4).convert("L" if mode == "I;16" else "RGB").convert(mode)
    assert rewards[kind]([image], ["a"]) == rewards[kind]([image.convert("RGB")], ["a"])
    for size in [(1, 1), (3, 90), (SIDE + 1, SIDE)]:
        assert all(math.isfinite(score) for score in rewards[kind]([noise(*size)], ["a"]))


@pytest.mark.parametrize("size", [(100, 60), (60, 101), (35, 32), (32, 39), (90, 3)])
@pytest.mark.parametrize("kind", ["clip", "image_reward", "aesthetic"])
def test_the_shortest_side_is_resized_and_the_centre_cropped(rewards, kind, size):
    image, short = noise(*size, seed=7), min(size)
    resized = image.resize([SIDE * length // short for length in size], Image.Resampling.BICUBIC)
    # ImageReward's code uses torchvision, which rounds margins half to even; the others' is that of transformers.
    rounded = round if kind == "image_reward" else math.floor
    left, top = (rounded((length - SIDE) / 2) for length in resized.size)
    expected = rewards[kind]([resized.crop((left, top, left + SIDE, top + SIDE))], ["a"])
    assert rewards[kind]([image], ["a"]) == close(expected, 1e-5)


@pytest.mark.parametrize("kind", ["hps", "clip", "image_reward", "aesthetic"])
def test_a_score_does_not_depend_on_what_else_is_in_the_batch(rewards, kind):
    images, prompts = [*some_images(3), noise(50, 20, seed=9)], ["a", "b" * 200, "a", ""]
    together = rewards[kind](images, prompts)
    alone = [rewards[kind]([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together == close(alone, 1e-3 if kind == "clip" else 1e-5)
    assert rewards[kind]([], []) == []
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        rewards[kind](images[:2], ["a"])
    with pytest.raises(TypeError, match="is one string"):
        rewards[kind](images[:2], "ab")


def test_each_prompt_is_encoded_once(clip_folder):
    made = hps(clip_folder)
    sizes = []
    made.model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = made(some_images(3), ["a", "b", "a"])
    assert sizes == [2]
    assert made(some_images(3), ["a", "b", "a"]) == first and sizes == [2]
    made([noise()], ["c"])
    assert sizes == [2, 1]


def test_the_cache_of_prompts_has_an_end(clip_folder, monkeypatch):
    monkeypatch.setattr("tgol_trainer.rewards.clip._CACHED_PROMPTS", 2)
    made = hps(clip_folder)
    expected = open_clip_cosines(open_clip_weights(), normalised(some_images()), ["a", "b", "c"])
    assert made(some_images(), ["a", "b", "c"]) == close(expected)
    assert list(made._cache) == ["b", "c"]
    assert made(some_images(), ["a", "b", "c"]) == close(expected)


def test_long_prompts_keep_their_end_token(clip_folder):
    made = hps(clip_folder)
    long = "x " * 300
    assert made([noise()], [long]) == close(made([noise()], ["x " * 75]), 1e-6)  # 75 words and two special tokens
    assert made([noise()], [long]) != close(made([noise()], ["x " * 74]), 1e-5)


def test_hpsv2_cleans_prompts_as_its_reference_and_says_when_it_cannot(clip_folder, monkeypatch, caplog):
    made = hps(clip_folder)
    for dirty in ["  fish &amp;amp; chips\n", "fish  &amp; CHIPS", "ﬁsh & chips"]:
        assert made([noise()], [dirty]) == made([noise()], ["fish & chips"])
    with caplog.at_level(logging.WARNING):
        monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
        without = hps(clip_folder)
    assert "ftfy is not installed" in caplog.text
    assert without([noise()], ["fish &amp;amp; chips"]) == made([noise()], ["fish & chips"])


@pytest.mark.parametrize(("width", "height"), [(64, 32), (16, 8), (32, 16)])
def test_hpsv2_pads_the_short_side_with_black_before_it_normalises(width, height):
    pixels = padded_pixels([Image.new("RGB", (width, height), "white")], SIDE)[0].double()
    expected = torch.zeros(3, SIDE, SIDE).double()
    expected[:, 8:24] = 1
    assert torch.allclose(pixels, (expected - MEAN) / STD, atol=1e-5)
    tall = padded_pixels([Image.new("RGB", (height, width), "white")], SIDE)[0].double()
    assert torch.allclose(tall, pixels.transpose(1, 2), atol=1e-5)


def test_hpsv2_resizes_the_longest_side_with_antialiasing():
    image = noise(100, 60, seed=3)
    shown = padded_pixels([image], SIDE)[0].double() * STD + MEAN
    height = round(60 * SIDE / 100)
    top = (SIDE - height) // 2
    resized = image.resize((SIDE, height), Image.Resampling.BICUBIC)  # Pillow's always antialiases
    expected = torch.tensor(list(resized.tobytes())).view(height, SIDE, 3).permute(2, 0, 1) / 255
    assert (shown[:, top : top + height] - expected).abs().max() < 0.01
    assert shown[:, :top].abs().max() < 1e-6 and shown[:, top + height :].abs().max() < 1e-6


@pytest.mark.parametrize(("width", "height", "rows"), [(768, 420, 123), (1280, 180, 31), (640, 330, 115)])
def test_hpsv2_rounds_half_pixels_as_its_reference(width, height, rows):
    """Multiplied by a factor, which is not exact: one row more, or less, than rounding half to even gives."""
    pixels = padded_pixels([Image.new("RGB", (width, height), "white")], 224)[0].double() * STD + MEAN
    assert (pixels[0, :, 0] > 0.5).sum() == rows == round(height * (224 / float(width)))


def test_weights_of_version_2_0_are_refused_under_any_name(clip_folder, tmp_path, monkeypatch):
    place = tmp_path / "HPS_v2_1.pt"
    shutil.copy(clip_folder / "HPS_v2.1_compressed.pt", place)
    content = place.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr("tgol_trainer.rewards.hpsv2._VERSION_2_0", (len(content), digest[:8]))
    with pytest.raises(ValueError, match=r"HPS_v2_1\.pt holds HPSv2\.0"):
        hps(clip_folder, place)
    monkeypatch.setattr("tgol_trainer.rewards.hpsv2._VERSION_2_0", (len(content), digest[1:9]))
    assert hps(clip_folder, place)


def test_the_full_size_configuration_has_the_published_number_of_weights():
    with torch.device("meta"):
        clip = __import__("transformers").CLIPModel(vit_h_14())
        blip = ImageRewardModel(*blip_configs())
    assert sum(parameter.numel() for parameter in clip.parameters()) == 986_109_441
    # The checkpoint's 446.67 M less what is dropped: two projections to 256 and 512 position ids.
    counted = sum(parameter.numel() for parameter in blip.parameters())
    # Heads leave no trace in the weights. OpenCLIP's and BLIP's are 64 wide, those of ViT-H's images 80.
    for part, width in ((clip.vision_model, 80), (clip.text_model, 64), (blip.vision, 64), (blip.text, 64)):
        assert part.config.hidden_size / part.config.num_attention_heads == width
    assert (counted + 1024 * 256 + 256 + 768 * 256 + 256 + 512) / 1e6 == pytest.approx(446.67, abs=0.01)


# ---- ImageReward ----


def test_image_reward_is_a_forward_from_the_published_names(tmp_path):
    weights = image_reward_weights()
    prompts = ["a cat", "two dogs, on a hill", "a" * 50 + " " + "b " * 40]
    images_seen = blip_image(weights, normalised(some_images()))
    expected = []
    for prompt, image in zip(prompts, images_seen, strict=True):
        ids = bert_tokenizer()(prompt)["input_ids"]
        ids = ids if len(ids) <= 35 else [*ids[:34], ids[-1]]
        raw = affine_head(weights, "mlp.layers.", blip_text(weights, ids, image[None]))
        expected.append((raw.item() - 0.16717362830052426) / 1.0333394966054072)
    assert max(expected) - min(expected) > 0.05
    reward = image_reward(tmp_path)
    assert reward(some_images(), prompts) == close(expected, 1e-4)
    seen = reward.model.vision(pixel_values=normalised(some_images()).float()).last_hidden_state
    assert (seen - images_seen).abs().max() < 1e-4


def test_image_reward_keeps_its_head_in_fp32(tmp_path):
    low = image_reward(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.model.mlp.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in low.model.vision.parameters()} == {torch.bfloat16}
    assert low(some_images(), PROMPTS) == close(image_reward(tmp_path)(some_images(), PROMPTS), 0.2)


# ---- Aesthetic ----


@pytest.mark.parametrize("prefix", ["layers.", ""])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_is_the_product_of_affine_maps_of_the_feature_of_length_one(clip_folder, tmp_path, prefix, suffix):
    weights = head_weights(EMBED, prefix)
    path = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    tower = Weights(open_clip_weights())
    x = torch.nn.functional.conv2d(normalised(some_images()), tower["visual.conv1.weight"], stride=PATCH)
    x = torch.cat([tower["visual.class_embedding"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = tower.norm("visual.ln_pre", x + tower["visual.positional_embedding"], 1e-5)
    x = open_clip_tower(tower, "visual.", x, VISION_HEADS)
    features = tower.norm("visual.ln_post", x[:, 0], 1e-5) @ tower["visual.proj"]
    # The five maps multiplied out into one.
    matrix, offset = torch.eye(EMBED).double(), torch.zeros(EMBED).double()
    for index in HEAD:
        weight = weights[f"{prefix}{index}.weight"].double()
        matrix, offset = weight @ matrix, weight @ offset + weights[f"{prefix}{index}.bias"].double()
    expected = features / features.norm(dim=-1, keepdim=True) @ matrix[0] + offset[0]
    assert aesthetic(clip_folder, path)(some_images(), [""] * 3) == close(expected, 1e-4)


def test_aesthetic_ignores_the_prompt_and_keeps_its_head_in_fp32(rewards, clip_folder, tmp_path):
    assert rewards["aesthetic"]([noise()], ["a"]) == rewards["aesthetic"]([noise()], ["b"])
    save_file(head_weights(EMBED), tmp_path / "model.safetensors")
    low = aesthetic(clip_folder, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.head.parameters()} == {torch.float32}
    assert low([noise()], [""]) == close(rewards["aesthetic"]([noise()], [""]), 0.2)


# ---- Facts and names ----


def test_facts_name_the_model_and_the_scale(rewards, clip_folder):
    assert rewards["hps"].facts == RewardFacts(
        "hpsv2.1", str(clip_folder), None, "version 2.1, cosine, higher is better"
    )
    assert rewards["clip"].facts.name == "clip" and rewards["clip"].facts.model_id == str(clip_folder)
    assert str(clip_folder / "vision") in rewards["aesthetic"].facts.model_id
    assert rewards["image_reward"].facts.name == "imagereward"


def test_a_model_of_the_catalogue_is_loaded_with_device_dtype_and_options(clip_folder):
    made = load_reward(
        "hpsv2.1",
        device="cpu",
        dtype=torch.bfloat16,
        source=clip_folder,
        tokenizer=clip_folder,
        config=tiny_clip_config(),
    )
    assert isinstance(made, HPSv2)
    assert made.model.dtype == torch.bfloat16
