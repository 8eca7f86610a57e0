"""One random CLIP in its published forms, and a reward of each kind."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from tests.rewards.published import EMBED, SIDE, aesthetic, head_weights, hps, image_reward, open_clip_weights
from tests.tiny import clip_tokenizer
from tgol_trainer.rewards.clip import ClipScore


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """An OpenCLIP pickle beside a model of transformers, and the vision tower alone in `vision`."""
    folder = tmp_path_factory.mktemp("clip")
    torch.save({"state_dict": open_clip_weights()}, folder / "HPS_v2.1_compressed.pt")
    clip_tokenizer().save_pretrained(folder)
    hps(folder).model.save_pretrained(folder)
    CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(folder / "vision")
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    for place in (folder, folder / "vision"):
        CLIPImageProcessor(**sizes).save_pretrained(place)
    return folder


@pytest.fixture(scope="session")
def rewards(clip_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_file(head_weights(EMBED), other / "model.safetensors")
    return {
        "hps": hps(clip_folder),
        "clip": ClipScore.from_pretrained(clip_folder),
        "image_reward": image_reward(other),
        "aesthetic": aesthetic(clip_folder, other),
    }
