"""Published files of reward models: which are read, and what is said of those that do not fit."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.rewards.published import (
    CONTEXT,
    EMBED,
    MEAN,
    PATCH,
    PROMPTS,
    SIDE,
    STD,
    VISION,
    aesthetic,
    head_weights,
    hps,
    image_reward,
    image_reward_configs,
    image_reward_weights,
    noise,
    open_clip_weights,
    some_images,
    tiny_clip_config,
)
from tgol_trainer.rewards import RewardFacts, find_reward, load_reward
from tgol_trainer.rewards.aesthetic import AestheticScore
from tgol_trainer.rewards.checkpoints import build, find_file, read_weights
from tgol_trainer.rewards.clip import ClipScore, PickScore
from tgol_trainer.rewards.hpsv2 import HPSv2
from tgol_trainer.rewards.imagereward import ImageReward


@pytest.mark.parametrize("kind", ["hps", "image_reward", "aesthetic"])
def test_a_missing_an_extra_and_a_misshapen_weight_are_refused(clip_folder, tmp_path, kind):
    made = {"hps": open_clip_weights(), "image_reward": image_reward_weights(), "aesthetic": head_weights(EMBED)}
    weights = made[kind]

    def load(weights):
        if kind == "image_reward":
            return image_reward(tmp_path, weights)
        torch.save(weights, tmp_path / "w.pt")
        return (hps if kind == "hps" else aesthetic)(clip_folder, tmp_path / "w.pt")

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
def test_a_folder_of_transformers_that_holds_other_weights_is_refused(clip_folder, tmp_path, kind):
    shutil.copytree(clip_folder, tmp_path / "model")
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
def test_a_folder_of_transformers_as_it_was_saved_years_ago_is_read(clip_folder, tmp_path, kind):
    shutil.copytree(clip_folder, tmp_path / "model")
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
    assert load(tmp_path / "model")(images, PROMPTS) == load(clip_folder)(images, PROMPTS)


def test_weights_of_transformers_that_cannot_be_read_are_refused_in_words(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"model were not read: .*Git-LFS pointer"):
        ClipScore.from_pretrained(tmp_path / "model")
    file.unlink()
    torch.save({"a": os.getcwd}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle that would run code") as error:
        ClipScore.from_pretrained(tmp_path / "model")
    assert "weights_only" not in str(error.value)  # torch would advise to switch it off


def test_a_tokenizer_that_is_not_there_or_anothers_is_refused(clip_folder, tmp_path):
    """Transformers makes an empty one, with which every prompt of a length scores the same."""
    load = {
        "hps": lambda place: HPSv2.from_pretrained(clip_folder, tokenizer=place, config=tiny_clip_config()),
        "clip": ClipScore.from_pretrained,
        "image_reward": lambda place: ImageReward.from_pretrained(
            tmp_path, tokenizer=place, configs=image_reward_configs()
        ),
    }
    image_reward(tmp_path)
    shutil.copytree(clip_folder, tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    for kind, size in (("hps", "514"), ("clip", "514"), ("image_reward", "63 or 65")):
        argument = "source" if kind == "clip" else "tokenizer"
        with pytest.raises(ValueError, match=rf"has \d tokens, the weights are for {size}: .*`{argument}=`"):
            load[kind](tmp_path / "model")
    with pytest.raises(ValueError, match=r"has \d+ tokens, the weights are for 514"):
        load["hps"](tmp_path)
    with pytest.raises(ValueError, match=r"The tokenizer of owner/absent has 2 tokens.*could not be loaded"):
        load["hps"]("owner/absent")


@pytest.mark.parametrize(
    ("name", "argument"), [("pickscore", "source"), ("clip", "source"), ("aesthetic", "backbone")]
)
def test_without_a_network_a_repository_is_named_with_what_to_pass(name, argument, tmp_path):
    save_file(head_weights(EMBED), tmp_path / "head.safetensors")
    options = {"source": tmp_path / "head.safetensors"} if name == "aesthetic" else {}
    repository = "openai/clip-vit-large-patch14" if options else find_reward(name).default_source
    with pytest.raises(OSError, match=rf"of {repository} could not be loaded.*\(`{argument}=`"):
        load_reward(name, **options)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": torch.zeros(1), "b": Payload()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="running code"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"", "was not read|damaged or not"),
        (b"PK\x03\x04 cut off", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{cut off", "cannot be read as safetensors"),
        (b"hello, this is a text file", "was not read|damaged or not"),
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
    with pytest.raises(ValueError, match="is not an existing file or folder, and not a Hub repository"):
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


def test_the_commit_of_a_folder_of_the_hub_is_recorded_and_none_of_a_folder_here(clip_folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(clip_folder, repository / "snapshots" / commit)
    head = tmp_path / "head.safetensors"
    save_file(head_weights(EMBED), head)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (ClipScore.from_pretrained, PickScore.from_pretrained):
        assert load("owner/name", revision="v1").facts == RewardFacts(
            load.__self__.name, "owner/name", commit, load.__self__.scale
        )
        assert load(clip_folder, revision="v1").facts.revision is None
    made = AestheticScore.from_pretrained(head, backbone="owner/name", backbone_revision="v1")
    assert made.facts.revision == f"unknown on {commit}"
    assert aesthetic(clip_folder, head, backbone_revision="v1").facts.revision is None


def test_a_folder_of_the_home_is_found(clip_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(clip_folder.parent))
    assert ClipScore.from_pretrained(f"~/{clip_folder.name}")([noise()], ["a"])


def test_a_buffer_that_the_weights_do_not_hold_is_not_left_empty():
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(3), persistent=False)

    with pytest.raises(ValueError, match="the buffer table is not part of the weights"):
        build(Unknown, {}, "w.pt")
