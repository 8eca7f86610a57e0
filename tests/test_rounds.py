"""Rounds of sampling, scoring and training on the shapes model: data, reference, threshold, resuming."""

import json

import numpy as np
import pytest
import torch
from datasets import Video
from peft import LoraConfig
from safetensors.torch import load_file

from tgol_trainer import TGOLConfig
from tgol_trainer.adapters import WEIGHTS_NAME, load_trained
from tgol_trainer.data import DataError, read_video
from tgol_trainer.jobs import image_seed
from tgol_trainer.rewards import RewardLoader
from tgol_trainer.rounds import read_shards, train_rounds
from tgol_trainer.shapes import PROMPTS, background_darkness, load_pipeline

from .tiny import wan

SAMPLING = {"num_inference_steps": 4, "guidance_scale": 1.5, "batch_size": 16}


def load(adapter):
    pipeline = load_pipeline()
    if adapter is not None:
        load_trained(pipeline, "unet", adapter)
    return pipeline, None


def rounds_in(folder, num_rounds, **settings):
    args = TGOLConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return train_rounds(
        "shapes",
        args,
        PROMPTS[:4],
        {"background_darkness": lambda: background_darkness},
        load,
        num_rounds=num_rounds,
        sampling={"images_per_prompt": 4, **SAMPLING},
        trainer_options={"peft_config": LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])},
    )


def test_a_reward_of_videos_is_refused_before_a_model_of_images_draws(tmp_path):
    args = TGOLConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(DataError, match="'videoreward' scores videos"):
        train_rounds("shapes", args, PROMPTS[:4], {"videoreward": RewardLoader("videoreward")}, load, num_rounds=1)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_round_draws_at_the_trained_size_and_a_reward_of_images_scores_the_mean_over_frames(tmp_path):
    """48x32 and 5 frames, where the pipeline's own are 480x832 and 81; the mean of two frames is computed again."""
    settings = {"resolution": "48x32", "num_frames": 5, "output_dir": str(tmp_path / "run")}
    args = TGOLConfig(**settings, max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none")
    wan().save_pretrained(tmp_path / "wan")
    sampling = {"images_per_prompt": 2, "num_inference_steps": 1, "mean_over_frames": 2}

    def brightness(images, prompts):
        return [float(np.asarray(image).mean()) for image in images]

    train_rounds(
        str(tmp_path / "wan"),
        args,
        ["a cat"],
        {"brightness": lambda: brightness},
        lambda adapter: (wan(), None),
        num_rounds=1,
        sampling=sampling,
        trainer_options={"peft_config": LoraConfig(r=2, target_modules=["to_q"])},
    )
    rows = read_shards(tmp_path / "run" / "round-0" / "scored").cast_column("video", Video(decode=False))
    drawn = [np.stack(read_video(video, None, np.asarray)) for video in rows["video"]]
    assert [clip.shape for clip in drawn] == [(5, 48, 32, 3)] * 2
    assert rows["brightness"] == pytest.approx([clip[[0, 4]].mean() for clip in drawn])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    return folder, rounds_in(folder, 2, threshold_strategy="oracle")


def test_each_round_trains_on_images_of_the_policy_before_it(two):
    """The second round's images again, from the first round's adapter, and their scores again."""
    folder, _ = two
    rows = read_shards(folder / "round-1" / "scored")
    pipeline, _ = load(str(folder / "round-0" / "adapter"))
    seeds = [image_seed(10_042, prompt, index) for prompt in PROMPTS[:4] for index in range(4)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts = [prompt for prompt in PROMPTS[:4] for _ in range(4)]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompts, num_inference_steps=4, guidance_scale=1.5, generator=generators).images
    assert all(
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(images, rows["image"], strict=True)
    )
    assert rows["background_darkness"] == pytest.approx(background_darkness(images, prompts), abs=1e-2)
    records = json.loads((folder / "rounds.json").read_text())
    assert [record["mean_score"] for record in records][1] == pytest.approx(np.mean(rows["background_darkness"]))


def test_the_reference_of_a_round_is_the_policy_it_began_with(two):
    """Before the first update of round two the policy agrees with its reference, which is not the base model."""
    folder, trainer = two
    state = json.loads((folder / "round-1" / "adapter" / "tgol_state.json").read_text())
    assert state["strategy"]["name"] == "oracle"
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert first["rewards/accuracies"] == 0.5
    kept = trainer.family.denoiser.peft_config.keys()
    assert len(kept) == 2


def test_the_output_folder_holds_the_last_rounds_adapter_and_card(two):
    folder, _ = two
    last, found = (load_file(path / WEIGHTS_NAME) for path in (folder / "round-1" / "adapter", folder))
    assert last.keys() == found.keys() and all(torch.equal(last[key], found[key]) for key in last)
    assert (folder / "README.md").exists()


def test_rounds_go_on_after_a_stop_as_if_there_had_been_none(two, tmp_path):
    folder, _ = two
    rounds_in(tmp_path, 1, threshold_strategy="oracle")
    rounds_in(tmp_path, 2, threshold_strategy="oracle")
    whole, again = (load_file(path / WEIGHTS_NAME) for path in (folder, tmp_path))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_rounds_that_are_all_there_are_neither_trained_again_nor_forgotten(two):
    folder, _ = two
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert rounds_in(folder, 1, threshold_strategy="oracle") is None
    assert rounds_in(folder, 2, threshold_strategy="oracle") is None
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"full_finetuning": True}, "full_finetuning"), ({"reference_update": "epoch"}, "reference_update")],
)
def test_settings_that_rounds_cannot_have_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        rounds_in(tmp_path, 1, **settings)
