"""Tiny random weights under the names that authors publish, and the forward passes written out from formulas."""

import math
import random

import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm
from transformers import BertTokenizer

from tests.tiny import clip_tokenizer
from tgol_trainer.rewards.aesthetic import AestheticScore
from tgol_trainer.rewards.hpsv2 import HPSv2, vit_h_14
from tgol_trainer.rewards.imagereward import ImageReward, blip_configs

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


def hps(folder, source=None, **options):
    return HPSv2.from_pretrained(source or folder, tokenizer=folder, config=tiny_clip_config(), **options)


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


# ---- Aesthetic ----


def aesthetic(folder, source, **options):
    return AestheticScore.from_pretrained(source, backbone=folder / "vision", **options)
