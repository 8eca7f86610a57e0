"""A tiny random Qwen2-VL under the names of transformers 4.45, and its forward pass written out from formulas."""

import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import gelu, silu
from transformers import PreTrainedTokenizerFast

from tests.rewards.published import attention, linear_shapes, norm_shapes, shrunk

WIDTH, HEADS, KEYS, HIDDEN, LAYERS = 24, 2, 1, 40, 2
VISION, VISION_HEADS, DEPTH = 16, 2, 2
HEAD = WIDTH // HEADS
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def tokenizer(*extra):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=plain)
    made.add_tokens([*SPECIAL, *extra], special_tokens=True)
    return made


def tiny_config(config):
    """A configuration of a full size at a tiny one."""
    text, vision = config.text_config, config.vision_config
    shrunk(text, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS)
    shrunk(text, num_attention_heads=HEADS, num_key_value_heads=KEYS)
    shrunk(text, rope_parameters={**text.rope_parameters, "mrope_section": [2, 2, 2]})
    shrunk(vision, depth=DEPTH, embed_dim=VISION, hidden_size=WIDTH, num_heads=VISION_HEADS, mlp_ratio=2)
    return config


def qwen_shapes(vocab_size, prefix, projection):
    """The weights of Qwen2-VL as transformers 4.45 names them; `projection` names those of a layer of the text."""
    visual, text = f"{prefix}visual.", f"{prefix}model."
    shapes = {f"{visual}patch_embed.proj.weight": ("", VISION, 3, 2, 14, 14), f"{text}norm.weight": ("n", WIDTH)}
    shapes |= {f"{prefix}lm_head.weight": ("", vocab_size, WIDTH)}
    shapes |= {f"{text}embed_tokens.weight": ("", vocab_size, WIDTH)}
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
        shapes |= projection(block + "self_attn.q_proj", WIDTH, WIDTH, True)
        shapes |= projection(block + "self_attn.k_proj", WIDTH, KEYS * HEAD, True)
        shapes |= projection(block + "self_attn.v_proj", WIDTH, KEYS * HEAD, True)
        shapes |= projection(block + "self_attn.o_proj", WIDTH, WIDTH, False)
        shapes |= projection(block + "mlp.gate_proj", WIDTH, HIDDEN, False)
        shapes |= projection(block + "mlp.up_proj", WIDTH, HIDDEN, False)
        shapes |= projection(block + "mlp.down_proj", HIDDEN, WIDTH, False)
    return shapes


def turned(x, angles):
    """Rotate pairs (i, i + half) of the last axis by angles (length, half)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rounded(frequencies):
    return frequencies.bfloat16().double()


def vision_features(tower, frames):
    """Frames (T, 3, H, W) in CLIP's units, T even, to one feature for each 28 pixels square of two frames."""
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


def text_features(text, features, words, question, projected):
    """Features of each token of a conversation about an image or video, and the tokens' ids (-1 for the image)."""
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
    return rms(x, text["norm.weight"]), ids
