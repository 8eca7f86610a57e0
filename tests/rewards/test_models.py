"""Reward models at tiny sizes: weights under their published names against forward passes written out here."""

import hashlib
import json
import logging
import math
import os
import random
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, layer_norm
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
)

from tests.tiny import clip_tokenizer
from tgol_trainer.rewards import RewardFacts, find_reward, load_reward, score_images
from tgol_trainer.rewards.aesthetic import AestheticScore
from tgol_trainer.rewards.checkpoints import build, find_file, read_weights
from tgol_trainer.rewards.clip import ClipScore, PickScore
from tgol_trainer.rewards.hpsv2 import HPSv2, padded_pixels, vit_h_14
from tgol_trainer.rewards.imagereward import ImageReward, ImageRewardModel, blip_configs

SIDE, PATCH = 32, 8
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)
PROMPTS = ["a cat", "two dogs, on a hill", "a cat"]


def noise(width=SIDE, height=SIDE, seed=0, mode="RGB"):
    image = Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))
    return image.convert(mode)


def some_images(count=3):
    return [noise(seed=seed) for seed in range(count)]


def normalised(images):
    """Images that need no resizing, as float64 pixels in CLIP's units."""
    rows = [torch.tensor(list(image.convert("RGB").tobytes())).view(SIDE, SIDE, 3) for image in images]
    return (torch.stack(rows).permute(0, 3, 1, 2).double() / 255 - MEAN) / STD


def weights_of(shapes, seed=0, spread=0.2):
    """Random values; those of norms lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * spread + (1.0 if "n" in kind else 0.0)
        for name, (kind, *shape) in shapes.items()
    }


def linear_shapes(name, inside, out):
    return {f"{name}.weight": ("", out, inside), f"{name}.bias": ("", out)}


def norm_shapes(name, width):
    return {f"{name}.weight": ("n", width), f"{name}.bias": ("", width)}


def attention(q, k, v, heads, mask=None):
    def split(x):
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Weights:
    """Look-up of weights in float64 under a prefix."""

    def __init__(self, weights, prefix=""):
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name):
        return self.weights[self.prefix + name].double()

    def under(self, prefix):
        return Weights(self.weights, self.prefix + prefix)

    def linear(self, name, x):
        return x @ self[name + ".weight"].T + self[name + ".bias"]

    def norm(self, name, x, eps):
        return layer_norm(x, x.shape[-1:], self[name + ".weight"], self[name + ".bias"], eps)


# ---- OpenCLIP: HPSv2.1, CLIP score, PickScore ----

VISION, TEXT, EMBED, LAYERS, CONTEXT, VOCABULARY = 32, 24, 16, 2, 77, 514
VISION_HEADS, TEXT_HEADS = 4, 3
LOGIT_SCALE = 4.6052  # 4.59375 in bfloat16


def open_clip_block(prefix, width):
    return {
        **norm_shapes(f"{prefix}.ln_1", width),
        f"{prefix}.attn.in_proj_weight": ("", 3 * width, width),
        f"{prefix}.attn.in_proj_bias": ("", 3 * width),
        **linear_shapes(f"{prefix}.attn.out_proj", width, width),
        **norm_shapes(f"{prefix}.ln_2", width),
        **linear_shapes(f"{prefix}.mlp.c_fc", width, 4 * width),
        **linear_shapes(f"{prefix}.mlp.c_proj", 4 * width, width),
    }


def open_clip_weights():
    shapes = {
        "positional_embedding": ("", CONTEXT, TEXT),
        "text_projection": ("", TEXT, EMBED),
        "logit_scale": ("",),
        "visual.class_embedding": ("", VISION),
        "visual.positional_embedding": ("", (SIDE // PATCH) ** 2 + 1, VISION),
        "visual.proj": ("", VISION, EMBED),
        "visual.conv1.weight": ("", VISION, 3, PATCH, PATCH),
        "token_embedding.weight": ("", VOCABULARY, TEXT),
        **norm_shapes("visual.ln_pre", VISION),
        **norm_shapes("visual.ln_post", VISION),
        **norm_shapes("ln_final", TEXT),
    }
    for layer in range(LAYERS):
        shapes |= open_clip_block(f"visual.transformer.resblocks.{layer}", VISION)
        shapes |= open_clip_block(f"transformer.resblocks.{layer}", TEXT)
    weights = weights_of(shapes)
    weights["logit_scale"] = torch.tensor(LOGIT_SCALE)
    return weights


def open_clip_tower(weights, prefix, x, heads, mask=None):
    for layer in range(LAYERS):
        block = weights.under(f"{prefix}transformer.resblocks.{layer}.")
        normed = block.norm("ln_1", x, 1e-5)
        qkv = normed @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]
        x = x + block.linear("attn.out_proj", attention(*qkv.chunk(3, dim=-1), heads, mask))
        x = x + block.linear("mlp.c_proj", gelu(block.linear("mlp.c_fc", block.norm("ln_2", x, 1e-5))))
    return x


def open_clip_cosines(weights, pixels, prompts):
    weights = Weights(weights)
    x = torch.nn.functional.conv2d(pixels, weights["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    first = weights["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + weights["visual.positional_embedding"]
    x = open_clip_tower(weights, "visual.", weights.norm("visual.ln_pre", x, 1e-5), VISION_HEADS)
    images = weights.norm("visual.ln_post", x[:, 0], 1e-5) @ weights["visual.proj"]
    texts = []
    for prompt in prompts:
        ids = clip_tokenizer()(prompt)["input_ids"]
        x = weights["token_embedding.weight"][ids][None] + weights["positional_embedding"][: len(ids)]
        mask = torch.full((len(ids), len(ids)), -math.inf).double().triu(1)
        x = weights.norm("ln_final", open_clip_tower(weights, "", x, TEXT_HEADS, mask), 1e-5)
        texts.append(x[0, -1] @ weights["text_projection"])  # the last token is the end token
    return torch.cosine_similarity(images, torch.stack(texts), dim=-1)


def shrunk(config, **sizes):
    """A configuration with other sizes and all else as it was."""
    for name, value in sizes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


def tiny_clip_config():
    config = vit_h_14()
    sizes = {"num_hidden_layers": LAYERS, "projection_dim": EMBED}
    vision = {"hidden_size": VISION, "intermediate_size": 4 * VISION, "num_attention_heads": VISION_HEADS}
    text = {"hidden_size": TEXT, "intermediate_size": 4 * TEXT, "num_attention_heads": TEXT_HEADS}
    shrunk(config.vision_config, **sizes, **vision, patch_size=PATCH, image_size=SIDE)
    shrunk(config.text_config, **sizes, **text, vocab_size=VOCABULARY, bos_token_id=512, eos_token_id=513)
    return shrunk(config, projection_dim=EMBED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published forms of one random CLIP: an OpenCLIP pickle, and a folder of transformers."""
    folder = tmp_path_factory.mktemp("clip")
    torch.save({"state_dict": open_clip_weights()}, folder / "HPS_v2.1_compressed.pt")
    clip_tokenizer().save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    hps(folder).model.save_pretrained(folder)
    return folder


def hps(folder, **options):
    return HPSv2.from_pretrained(folder, tokenizer=folder, config=tiny_clip_config(), **options)


def close(value, tolerance=2e-5):
    return pytest.approx(value.tolist() if isinstance(value, torch.Tensor) else value, abs=tolerance)


def test_hpsv2_is_the_cosine_of_an_open_clip_forward_from_the_published_names(folder):
    expected = open_clip_cosines(open_clip_weights(), normalised(some_images()), PROMPTS)
    assert expected.max() - expected.min() > 0.02  # so the comparison can fail
    assert score_images(hps(folder), some_images(), PROMPTS) == close(expected)


def test_clip_score_and_pickscore_scale_the_same_cosine(folder):
    cosines = open_clip_cosines(open_clip_weights(), normalised(some_images()), PROMPTS)
    assert ClipScore.from_pretrained(folder)(some_images(), PROMPTS) == close(100 * cosines, 2e-3)
    assert PickScore.from_pretrained(folder)(some_images(), PROMPTS) == close(math.exp(LOGIT_SCALE) * cosines, 2e-3)


def test_weights_in_half_precision_are_computed_with_in_the_dtype_asked_for(folder, tmp_path):
    halves = {name: tensor.half() for name, tensor in open_clip_weights().items()}
    torch.save({"state_dict": halves}, tmp_path / "half.pt")
    made = HPSv2.from_pretrained(tmp_path / "half.pt", tokenizer=folder, config=tiny_clip_config())
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    assert made(some_images(), PROMPTS) == close(open_clip_cosines(halves, normalised(some_images()), PROMPTS))
    low = hps(folder, dtype=torch.bfloat16)(some_images(), PROMPTS)
    assert low == close(hps(folder)(some_images(), PROMPTS), 0.05)
    cosines, scaled = low, PickScore.from_pretrained(folder, dtype=torch.bfloat16)(some_images(), PROMPTS)
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


def test_each_prompt_is_encoded_once(folder):
    made = hps(folder)
    sizes = []
    made.model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = made(some_images(3), ["a", "b", "a"])
    assert sizes == [2]
    assert made(some_images(3), ["a", "b", "a"]) == first and sizes == [2]
    made([noise()], ["c"])
    assert sizes == [2, 1]


def test_the_cache_of_prompts_has_an_end(folder, monkeypatch):
    monkeypatch.setattr("tgol_trainer.rewards.clip._CACHED_PROMPTS", 2)
    made = hps(folder)
    expected = open_clip_cosines(open_clip_weights(), normalised(some_images()), ["a", "b", "c"])
    assert made(some_images(), ["a", "b", "c"]) == close(expected)
    assert list(made._cache) == ["b", "c"]
    assert made(some_images(), ["a", "b", "c"]) == close(expected)


def test_long_prompts_keep_their_end_token(folder):
    made = hps(folder)
    long = "x " * 300
    assert made([noise()], [long]) == close(made([noise()], ["x " * 75]), 1e-6)  # 75 words and two special tokens
    assert made([noise()], [long]) != close(made([noise()], ["x " * 74]), 1e-5)


def test_hpsv2_cleans_prompts_as_its_reference_and_says_when_it_cannot(folder, monkeypatch, caplog):
    made = hps(folder)
    for dirty in ["  fish &amp;amp; chips\n", "fish  &amp; CHIPS", "ﬁsh & chips"]:
        assert made([noise()], [dirty]) == made([noise()], ["fish & chips"])
    with caplog.at_level(logging.WARNING):
        monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
        without = hps(folder)
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


def test_weights_of_version_2_0_are_refused_under_any_name(folder, tmp_path, monkeypatch):
    shutil.copy(folder / "HPS_v2.1_compressed.pt", tmp_path / "HPS_v2_1.pt")
    content = (tmp_path / "HPS_v2_1.pt").read_bytes()
    place = tmp_path / "HPS_v2_1.pt"
    load = lambda: HPSv2.from_pretrained(place, tokenizer=folder, config=tiny_clip_config())  # noqa: E731
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr("tgol_trainer.rewards.hpsv2._VERSION_2_0", (len(content), digest[:8]))
    with pytest.raises(ValueError, match=r"HPS_v2_1\.pt holds HPSv2\.0"):
        load()
    monkeypatch.setattr("tgol_trainer.rewards.hpsv2._VERSION_2_0", (len(content), digest[1:9]))
    assert load()


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

WIDTH, BERT, BERT_HEADS, BERT_VOCABULARY = 32, 48, 4, 65  # its tokenizer's 63 and two more
HEAD = {0: (None, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def head_weights(width, prefix="layers.", seed=5):
    shapes = {}
    for index, (inside, out) in HEAD.items():
        shapes |= linear_shapes(f"{prefix}{index}", inside or width, out)
    weights = weights_of(shapes, seed)
    return {name: tensor * 0.6 if name.endswith("weight") else tensor for name, tensor in weights.items()}


def image_reward_weights():
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {
        f"{vision}cls_token": ("", 1, 1, WIDTH),
        f"{vision}pos_embed": ("", 1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}patch_embed.proj.weight": ("", WIDTH, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": ("", WIDTH),
        **norm_shapes(f"{vision}norm", WIDTH),
        f"{text}embeddings.word_embeddings.weight": ("", BERT_VOCABULARY, BERT),
        f"{text}embeddings.position_embeddings.weight": ("", 40, BERT),
        **norm_shapes(f"{text}embeddings.LayerNorm", BERT),
        **linear_shapes("blip.vision_proj", WIDTH, 8),
        **linear_shapes("blip.text_proj", BERT, 8),
    }
    for layer in range(2):
        block = f"{vision}blocks.{layer}"
        shapes |= {**norm_shapes(f"{block}.norm1", WIDTH), **norm_shapes(f"{block}.norm2", WIDTH)}
        shapes |= linear_shapes(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear_shapes(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{block}.mlp.fc1", WIDTH, 2 * WIDTH)
        shapes |= linear_shapes(f"{block}.mlp.fc2", 2 * WIDTH, WIDTH)
        block = f"{text}encoder.layer.{layer}"
        for kind, source in (("attention", BERT), ("crossattention", WIDTH)):
            shapes |= linear_shapes(f"{block}.{kind}.self.query", BERT, BERT)
            shapes |= linear_shapes(f"{block}.{kind}.self.key", source, BERT)
            shapes |= linear_shapes(f"{block}.{kind}.self.value", source, BERT)
            shapes |= linear_shapes(f"{block}.{kind}.output.dense", BERT, BERT)
            shapes |= norm_shapes(f"{block}.{kind}.output.LayerNorm", BERT)
        shapes |= linear_shapes(f"{block}.intermediate.dense", BERT, 2 * BERT)
        shapes |= linear_shapes(f"{block}.output.dense", 2 * BERT, BERT)
        shapes |= norm_shapes(f"{block}.output.LayerNorm", BERT)
    weights = weights_of(shapes, seed=1) | head_weights(BERT, "mlp.layers.")
    weights[f"{text}embeddings.position_ids"] = torch.arange(40)[None]
    return weights


def blip_image(weights, pixels):
    tower = Weights(weights, "blip.visual_encoder.")
    x = torch.nn.functional.conv2d(pixels, tower["patch_embed.proj.weight"], tower["patch_embed.proj.bias"], PATCH)
    x = torch.cat([tower["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1) + tower["pos_embed"]
    for layer in range(2):
        block = tower.under(f"blocks.{layer}.")
        q, k, v = block.linear("attn.qkv", block.norm("norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + block.linear("attn.proj", attention(q, k, v, 4))
        x = x + block.linear("mlp.fc2", gelu(block.linear("mlp.fc1", block.norm("norm2", x, 1e-6))))
    return tower.norm("norm", x, 1e-6)


def blip_text(weights, ids, image):
    """One prompt without padding: BERT with cross-attention, norms after the sum."""
    tower = Weights(weights, "blip.text_encoder.")
    x = tower["embeddings.word_embeddings.weight"][ids][None]
    x = tower.norm("embeddings.LayerNorm", x + tower["embeddings.position_embeddings.weight"][: len(ids)], 1e-12)
    for layer in range(2):
        block = tower.under(f"encoder.layer.{layer}.")
        for kind in ("attention", "crossattention"):
            seen = x if kind == "attention" else image
            parts = [block.linear(f"{kind}.self.query", x)]
            parts += [block.linear(f"{kind}.self.{part}", seen) for part in ("key", "value")]
            out = block.linear(f"{kind}.output.dense", attention(*parts, BERT_HEADS))
            x = block.norm(f"{kind}.output.LayerNorm", out + x, 1e-12)
        out = block.linear("output.dense", gelu(block.linear("intermediate.dense", x)))
        x = block.norm("output.LayerNorm", out + x, 1e-12)
    return x[:, 0]


def affine_head(weights, prefix, x):
    weights = Weights(weights, prefix)
    for index in HEAD:
        x = weights.linear(str(index), x)
    return x[..., 0]


def bert_tokenizer():
    letters = [*"abcdefghijklmnopqrstuvwxyz", *",.0"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={t: i for i, t in enumerate([*special, *letters, *("##" + c for c in letters)])})


def image_reward_configs():
    vision, text = blip_configs()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    shrunk(vision, **sizes, hidden_size=WIDTH, intermediate_size=2 * WIDTH, image_size=SIDE, patch_size=PATCH)
    shrunk(text, **sizes, hidden_size=BERT, intermediate_size=2 * BERT, encoder_hidden_size=WIDTH)
    return vision, shrunk(text, vocab_size=BERT_VOCABULARY, max_position_embeddings=40)


def image_reward(folder, weights=None, **options):
    torch.save(image_reward_weights() if weights is None else weights, folder / "ImageReward.pt")
    bert_tokenizer().save_pretrained(folder)
    return ImageReward.from_pretrained(folder, tokenizer=folder, configs=image_reward_configs(), **options)


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


def aesthetic(folder, source, **options):
    return AestheticScore.from_pretrained(source, backbone=folder / "vision", **options)


@pytest.fixture(scope="module")
def vision_folder(folder):
    CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(folder / "vision")
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder / "vision")
    return folder


@pytest.mark.parametrize("prefix", ["layers.", ""])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_is_the_product_of_affine_maps_of_the_feature_of_length_one(vision_folder, tmp_path, prefix, suffix):
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
    assert aesthetic(vision_folder, path)(some_images(), [""] * 3) == close(expected, 1e-4)


def test_aesthetic_ignores_the_prompt_and_keeps_its_head_in_fp32(rewards, vision_folder, tmp_path):
    assert rewards["aesthetic"]([noise()], ["a"]) == rewards["aesthetic"]([noise()], ["b"])
    save_file(head_weights(EMBED), tmp_path / "model.safetensors")
    low = aesthetic(vision_folder, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.head.parameters()} == {torch.float32}
    assert low([noise()], [""]) == close(rewards["aesthetic"]([noise()], [""]), 0.2)


@pytest.fixture(scope="module")
def rewards(folder, vision_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_file(head_weights(EMBED), other / "model.safetensors")
    return {
        "hps": hps(folder),
        "clip": ClipScore.from_pretrained(folder),
        "image_reward": image_reward(other),
        "aesthetic": aesthetic(vision_folder, other),
    }


# ---- Strictness ----


def loaders(folder, tmp_path):
    def hps_from(weights):
        torch.save({"state_dict": weights}, tmp_path / "w.pt")
        return HPSv2.from_pretrained(tmp_path / "w.pt", tokenizer=folder, config=tiny_clip_config())

    def aesthetic_from(weights):
        torch.save(weights, tmp_path / "w.pt")
        return aesthetic(folder, tmp_path / "w.pt")

    return {
        "hps": (open_clip_weights(), hps_from),
        "image_reward": (image_reward_weights(), lambda weights: image_reward(tmp_path, weights)),
        "aesthetic": (head_weights(EMBED), aesthetic_from),
    }


@pytest.mark.parametrize("kind", ["hps", "image_reward", "aesthetic"])
def test_a_missing_an_extra_and_a_misshapen_weight_are_refused(vision_folder, tmp_path, kind):
    weights, load = loaders(vision_folder, tmp_path)[kind]
    load(weights)
    name = next(name for name in weights if name.endswith(("c_fc.weight", "fc1.weight", "2.weight")))
    with pytest.raises(ValueError, match=r"does not hold the weights of this reward: 1 missing \("):
        load({key: tensor for key, tensor in weights.items() if key != name})
    for extra in ["surprise.weight", name.replace("weight", "extra"), name.replace("2", "99")]:
        with pytest.raises(ValueError, match=r"1 unexpected \(|1 missing \(.*1 unexpected \("):
            load({**weights, extra: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 of another shape \(.* \(1, 1\) instead of"):
        load({**weights, name: torch.zeros(1, 1)})


@pytest.mark.parametrize("kind", ["clip", "pickscore", "aesthetic"])
def test_a_folder_of_transformers_that_holds_other_weights_is_refused(vision_folder, tmp_path, kind):
    shutil.copytree(vision_folder, tmp_path / "model")
    head = tmp_path / "head.safetensors"
    save_file(head_weights(EMBED), head)
    load = {
        "clip": ClipScore.from_pretrained,
        "pickscore": PickScore.from_pretrained,
        "aesthetic": lambda folder: AestheticScore.from_pretrained(head, backbone=folder),  # from both towers
    }[kind]
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    assert load(tmp_path / "model")(some_images(), PROMPTS)
    short = {name: tensor for name, tensor in weights.items() if name != "visual_projection.weight"}
    save_file(short, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(visual_projection\.weight\)"):
        load(tmp_path / "model")
    save_file({**weights, "surprise": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected \(surprise\)"):
        load(tmp_path / "model")
    name = "visual_projection.weight"
    save_file({**weights, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 of another shape \({name} \(3, 3\) instead of \({EMBED}, {VISION}\)\)"):
        load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["clip", "aesthetic"])
def test_a_folder_of_transformers_as_it_was_saved_years_ago_is_read(vision_folder, tmp_path, kind):
    shutil.copytree(vision_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    # Transformers up to 4.30 kept these in the files, as those of the published repositories do: position numbers, an
    # end token of 2 whatever the vocabulary, and sizes that are numbers.
    positions = {"text": torch.arange(CONTEXT)[None], "vision": torch.arange((SIDE // PATCH) ** 2 + 1)[None]}
    old = {f"{tower}_model.embeddings.position_ids": ids for tower, ids in positions.items()}
    save_file({**load_file(file), **old}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"] |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    processor = {"size": SIDE, "crop_size": SIDE, "do_resize": True, "do_center_crop": True, "do_normalize": True}
    processor |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    processor |= {"image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist()}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(head_weights(EMBED), tmp_path / "head.safetensors")
    load = {
        "clip": ClipScore.from_pretrained,
        "aesthetic": lambda folder: AestheticScore.from_pretrained(tmp_path / "head.safetensors", backbone=folder),
    }[kind]
    images = [*some_images(2), noise(60, 40, seed=8)]
    assert load(tmp_path / "model")(images, PROMPTS) == load(vision_folder)(images, PROMPTS)


def test_weights_of_transformers_that_cannot_be_read_are_refused_in_words(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"model were not read: .*Git-LFS pointer"):
        ClipScore.from_pretrained(tmp_path / "model")
    file.unlink()
    torch.save({"a": os.getcwd}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle that means to run code") as error:
        ClipScore.from_pretrained(tmp_path / "model")
    assert "weights_only" not in str(error.value)  # torch would advise to switch it off


def test_a_tokenizer_that_is_not_there_or_anothers_is_refused(folder, tmp_path):
    """Transformers makes an empty one, with which every prompt of a length scores the same."""
    load = {
        "hps": lambda place: HPSv2.from_pretrained(folder, tokenizer=place, config=tiny_clip_config()),
        "clip": ClipScore.from_pretrained,
        "image_reward": lambda place: ImageReward.from_pretrained(
            tmp_path, tokenizer=place, configs=image_reward_configs()
        ),
    }
    image_reward(tmp_path)
    shutil.copytree(folder, tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    for kind, size in (("hps", "514"), ("clip", "514"), ("image_reward", "63 or 65")):
        argument = "source" if kind == "clip" else "tokenizer"
        with pytest.raises(ValueError, match=rf"has \d tokens, the weights are for {size}: .*`{argument}=`"):
            load[kind](tmp_path / "model")
    with pytest.raises(ValueError, match=r"has \d+ tokens, the weights are for 514"):
        load["hps"](tmp_path)
    with pytest.raises(ValueError, match=r"The tokenizer of owner/absent has 2 tokens.*could not be had"):
        load["hps"]("owner/absent")


@pytest.mark.parametrize(
    ("name", "argument"), [("pickscore", "source"), ("clip", "source"), ("aesthetic", "backbone")]
)
def test_without_a_network_a_repository_is_named_with_what_to_pass(name, argument, tmp_path):
    save_file(head_weights(EMBED), tmp_path / "head.safetensors")
    options = {"source": tmp_path / "head.safetensors"} if name == "aesthetic" else {}
    repository = "openai/clip-vit-large-patch14" if options else find_reward(name).default_source
    with pytest.raises(OSError, match=rf"of {repository} could not be had.*\(`{argument}=`"):
        load_reward(name, **options)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": torch.zeros(1), "b": Payload()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="run code"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"", "damaged|no plain file"),
        (b"PK\x03\x04 cut off", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{cut off", "cannot be read as safetensors"),
        (b"hello, this is a text file", "damaged|no plain file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_with_its_path(tmp_path, content, message):
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(tmp_path / "weights.bin")
    assert str(tmp_path / "weights.bin") in str(error.value)


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(1)], {}, {1: torch.zeros(1)}, {"state_dict": {"a": "b"}}])
def test_a_pickle_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"not named weights|more than named tensors"):
        read_weights(tmp_path / "w.pt")


def test_a_damaged_pickle_is_refused_with_its_path_wherever_the_damage_is(tmp_path):
    path, random_bytes = tmp_path / "w.pt", random.Random(0)
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)  # as in torch before 1.6
    whole = path.read_bytes()
    refused = 0
    for _ in range(200):
        place = random_bytes.randrange(len(whole))
        path.write_bytes(whole[:place] + random_bytes.randbytes(1) + whole[place + 1 :])
        try:
            read_weights(path)  # the damage may lie in the numbers
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_a_cut_pickle_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_weights(tmp_path / "w.pt")


def test_files_are_found_by_path_by_folder_and_refused_in_words(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"x")
    assert find_file(tmp_path / "w.pt", "other") == (tmp_path / "w.pt", None)
    assert find_file(str(tmp_path), "w.pt") == (tmp_path / "w.pt", None)
    with pytest.raises(FileNotFoundError, match=r"has no file other; it holds w\.pt"):
        find_file(tmp_path, "other")
    with pytest.raises(ValueError, match="no existing file or folder, and no Hub repository"):
        find_file("not/a/repository", "w.pt")
    with pytest.raises(OSError, match="pass the path of a downloaded file"):
        find_file("owner/name", "w.pt")  # the tests run without the Hub


def test_a_file_of_the_hub_comes_with_its_commit(tmp_path, monkeypatch):
    # The cache of huggingface_hub, laid out by hand as it leaves it after a download.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "w.pt").write_bytes(b"x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_file("owner/name", "w.pt") == (repository / "snapshots" / commit / "w.pt", commit)


def test_the_commit_of_a_folder_of_the_hub_is_recorded_and_none_of_a_folder_here(vision_folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(vision_folder, repository / "snapshots" / commit)
    head = tmp_path / "head.safetensors"
    save_file(head_weights(EMBED), head)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (ClipScore.from_pretrained, PickScore.from_pretrained):
        assert load("owner/name", revision="v1").facts == RewardFacts(
            load.__self__.name, "owner/name", commit, load.__self__.scale
        )
        assert load(vision_folder, revision="v1").facts.revision is None
    made = AestheticScore.from_pretrained(head, backbone="owner/name", backbone_revision="v1")
    assert made.facts.revision == f"unknown on {commit}"
    assert aesthetic(vision_folder, head, backbone_revision="v1").facts.revision is None


def test_a_folder_of_the_home_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ClipScore.from_pretrained(f"~/{folder.name}")([noise()], ["a"])


def test_a_buffer_that_the_weights_do_not_hold_is_not_left_empty():
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(3), persistent=False)

    with pytest.raises(ValueError, match="the buffer table is not part of the weights"):
        build(Unknown, {}, "w.pt")


# ---- Facts and names ----


def test_facts_name_the_model_and_the_scale(rewards, folder):
    assert rewards["hps"].facts == RewardFacts("hpsv2.1", str(folder), None, "version 2.1, cosine, higher is better")
    assert rewards["clip"].facts.name == "clip" and rewards["clip"].facts.model_id == str(folder)
    assert str(folder / "vision") in rewards["aesthetic"].facts.model_id
    assert rewards["image_reward"].facts.name == "imagereward"


def test_a_model_of_the_catalogue_is_loaded_with_device_dtype_and_options(folder):
    made = load_reward(
        "hpsv2.1", device="cpu", dtype=torch.bfloat16, source=folder, tokenizer=folder, config=tiny_clip_config()
    )
    assert isinstance(made, HPSv2)
    assert made.model.dtype == torch.bfloat16
