"""What Wan 2.1 has and models of images have not: frames, precision, sizes, and what makes videos and shows them."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import LoraConfig
from PIL import Image

from tests.conftest import scored_dataset
from tests.tiny import stable_diffusion, wan
from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.config import size_of
from tgol_trainer.data import DataError
from tgol_trainer.evaluation import generate_images, generate_videos, save_contact_sheet
from tgol_trainer.families import FamilySettings, wrap_pipeline

LORA = LoraConfig(r=4, lora_alpha=8)
GENERATION = {"num_frames": 5, "num_inference_steps": 2, "height": 16, "width": 32, "guidance_scale": 1.0}
GENERATION["progress"] = False


@pytest.fixture
def video_config(config):
    def make(**overrides):
        settings = {"resolution": "16x32", "num_frames": 5, "max_steps": 2, "per_device_train_batch_size": 4}
        return config(**{**settings, **overrides})

    return make


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def batch_of(trainer, rows=range(8)):
    return trainer.collator([trainer.train_dataset[row] for row in rows])


# ---- The model ----


def test_its_facts_are_those_of_the_pipeline():
    family = wrap_pipeline(wan())
    assert (family.num_frames, family.pipeline_tag) == (81, "text-to-video")
    assert family.likelihood.density == "uniform"
    assert wrap_pipeline(wan(), settings=FamilySettings("logit_normal")).likelihood.density == "logit_normal"


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_the_noise_levels_follow_the_pipelines_shift_also_after_generation(shift):
    """σ = shift·s/(1 + (shift - 1)·s) with s = 1, 0.999, ..., and t = 1000·σ."""
    pipe = wan(flow_shift=shift)
    generate_videos(pipe, ["a"], [0], **GENERATION)
    pipe.scheduler.set_timesteps(2)
    likelihood = wrap_pipeline(pipe).likelihood
    s = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    sigma = shift * s / (1 + (shift - 1) * s)
    torch.testing.assert_close(likelihood.sigmas.double(), sigma, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(likelihood.timesteps.double(), 1000 * sigma, rtol=1e-6, atol=1e-4)
    schedule = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert torch.equal(likelihood.sigmas, schedule.sigmas)
    assert torch.equal(likelihood.timesteps, schedule.timesteps)


@pytest.mark.parametrize(("wrong", "nearest"), [(6, "5 and 9"), (80, "77 and 81"), (2, "1 and 5")])
def test_a_number_of_frames_that_would_be_cut_is_refused_with_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=rf"`num_frames` is {wrong}; it must be 4·k \+ 1.*Nearest are {nearest}\."):
        wrap_pipeline(wan(), settings=FamilySettings(num_frames=wrong))


def test_a_number_of_frames_means_nothing_to_a_model_of_images():
    with pytest.raises(ValueError, match="`num_frames` means nothing to StableDiffusionPipeline"):
        wrap_pipeline(stable_diffusion(), settings=FamilySettings(num_frames=5))


def test_prompts_are_encoded_as_the_pipeline_encodes_them_for_generation():
    """`__call__` takes 512 tokens, while `encode_prompt` alone would take 226."""
    pipe, seen = wan(), []
    family = wrap_pipeline(pipe)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    prompt = "a cat " * 60
    generate_videos(pipe, [prompt], [0], **GENERATION)
    encoded_prompt = family.condition([prompt], torch.zeros(1, 4), (16, 32))["encoder_hidden_states"]
    assert encoded_prompt.shape == (1, 512, 32)
    assert encoded_prompt[0, 300].abs().sum() > 0
    assert torch.equal(encoded_prompt, seen[0])


def test_a_bf16_base_keeps_its_float32_modules_and_trains_a_float32_adapter(video_config, clips, tmp_path, caplog):
    wan().save_pretrained(tmp_path / "wan")
    dtypes = {"dtype": {"default": "bfloat16", "vae": "float32"}}
    caplog.set_level(logging.WARNING)
    trainer = TGOLTrainer(str(tmp_path / "wan"), video_config(model_init_kwargs=dtypes), clips, peft_config=LORA)
    transformer = trainer.family.denoiser
    assert transformer.dtype == torch.bfloat16
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in transformer.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.family.pipeline.vae.dtype == torch.float32
    assert "should stay in float32" not in caplog.text
    assert "autoencoder was loaded in" not in caplog.text
    trainer.train()
    first = lines(trainer)[0]
    assert first["loss"] == pytest.approx(first["weights/mean"] * math.log(2), rel=1e-6)
    assert first["grad_norm"] > 0


def test_a_cast_that_loses_float32_modules_is_warned_about_and_the_autoencoder_comes_back(caplog):
    pipe = wan()
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    caplog.set_level(logging.WARNING)
    family = wrap_pipeline(pipe)
    assert re.search(r"\d+ weights of the transformer that should stay in float32 are not", caplog.text)
    assert "autoencoder was loaded in bfloat16 and is used in float32" in caplog.text
    assert family.pipeline.vae.dtype == torch.float32
    assert family.probe().dtype == torch.bfloat16


# ---- Training ----


def test_two_steps_on_videos_and_the_first_loss_is_the_mean_weight_times_ln_2(video_config, clips):
    args = video_config(per_device_train_batch_size=8, random_flip=True, caption_dropout=0.5)
    trainer = TGOLTrainer(wan(), args, clips, peft_config=LORA)
    assert trainer.collator.resolution == (16, 32)
    assert batch_of(trainer)["pixel_values"].shape == (8, 3, 5, 16, 32)
    trainer.train()
    scores = np.asarray(clips["score"])
    weights = 1 + 5 * np.abs(scores - np.median(scores))
    first, second = lines(trainer)
    assert first["loss"] == pytest.approx(weights.mean() * math.log(2), rel=1e-6)
    assert second["loss"] != first["loss"]
    assert first["grad_norm"] > 0


def test_a_mirrored_clip_is_mirrored_in_every_frame(video_config, clips, monkeypatch):
    trainer = TGOLTrainer(wan(), video_config(random_flip=True), clips)
    seen = []
    real = trainer.family.encode
    monkeypatch.setattr(trainer.family, "encode", lambda pixels: (seen.append(pixels), real(pixels))[1])
    trainer.model.train()
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch)
    pixels = batch["pixel_values"]
    turned = [bool(torch.equal(now, was.flip(-1))) for now, was in zip(seen[0], pixels, strict=True)]
    same = [bool(torch.equal(now, was)) for now, was in zip(seen[0], pixels, strict=True)]
    assert [one != other for one, other in zip(turned, same, strict=True)] == [True] * 8
    assert any(turned)
    assert any(same)


def test_streams_of_videos_train(video_config, clips):
    trainer = TGOLTrainer(wan(), video_config(), clips.to_iterable_dataset(), peft_config=LORA)
    trainer.train()
    first = lines(trainer)[0]
    assert first["loss"] == pytest.approx(first["weights/mean"] * math.log(2), rel=1e-6)


def test_images_for_wan_and_videos_for_stable_diffusion_are_refused(video_config, config, clips, dataset):
    with pytest.raises(DataError, match="the model makes videos, and the column 'image' holds images"):
        TGOLTrainer(wan(), video_config(), dataset)
    with pytest.raises(DataError, match="the model makes images, and the column 'video' holds videos"):
        TGOLTrainer(stable_diffusion(), config(), clips)
    renamed = clips.rename_column("video", "clip")
    with pytest.raises(DataError, match=r"no column 'video' \(video\)"):
        TGOLTrainer(wan(), video_config(), renamed)
    assert TGOLTrainer(wan(), video_config(video_column="clip"), renamed).columns.visual == "clip"


# ---- Height and width ----


def test_height_and_width_are_read_from_a_text():
    assert TGOLConfig(output_dir="x", resolution="480x832").resolution == "480x832"
    assert TGOLConfig(output_dir="x", resolution=" 480 × 832 ").resolution == "480x832"
    assert TGOLConfig(output_dir="x", resolution="512").resolution == 512
    assert [size_of(given) for given in ("480x832", 512, None)] == [(480, 832), (512, 512), None]


@pytest.mark.parametrize("value", ["480x", "x832", "480x0", "a", "1.5", "480x832x3", "-16"])
def test_a_resolution_that_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match="`resolution` must be at least 1 and at most 16384"):
        TGOLConfig(output_dir="x", resolution=value)


def test_a_size_that_does_not_fit_the_model_is_refused_with_the_nearest(video_config, clips):
    with pytest.raises(ValueError, match=r"`resolution` 20x33 is not a multiple of 16.*on both sides: use 16x32\."):
        TGOLTrainer(wan(), video_config(resolution="20x33"), clips)


def test_models_of_images_train_on_images_that_are_not_square(config):
    dataset = scored_dataset(side=24)
    trainer = TGOLTrainer(stable_diffusion(), config(resolution="16x24", max_steps=1), dataset)
    assert batch_of(trainer)["pixel_values"].shape == (8, 3, 16, 24)
    trainer.train()
    first = lines(trainer)[0]
    assert first["loss"] == pytest.approx(first["weights/mean"] * math.log(2), rel=1e-6)


# ---- Generation, cards and images ----


def test_the_same_seeds_give_the_same_videos_and_nothing_is_left_changed():
    pipe = wan()
    pipe.transformer.train()
    scheduler, state = pipe.scheduler, torch.get_rng_state()
    prompts = ["a cat", "a dog", "a cat"]
    one = generate_videos(pipe, prompts, [1, 2, 3], **GENERATION)
    two = generate_videos(pipe, prompts, [1, 2, 3], **GENERATION)
    assert [len(video) for video in one] == [5, 5, 5]
    assert {frame.size for video in one for frame in video} == {(32, 16)}
    assert [[frame.tobytes() for frame in video] for video in one] == [[f.tobytes() for f in video] for video in two]
    assert one[0][0].tobytes() != one[2][0].tobytes()
    assert pipe.transformer.training
    assert pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), state)
    batched = generate_videos(pipe, prompts, [1, 2, 3], batch_size=3, **GENERATION)
    assert np.abs(np.asarray(batched).astype(int) - np.asarray(one)).max() <= 1
    direct = pipe("a dog", generator=torch.Generator().manual_seed(2), output_type="pil", **without_progress())
    assert [frame.tobytes() for frame in direct.frames[0]] == [frame.tobytes() for frame in one[1]]


def without_progress():
    return {name: value for name, value in GENERATION.items() if name != "progress"}


def test_wrong_calls_of_generation_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"StableDiffusionPipeline returned .* holds no videos"):
        generate_videos(stable_diffusion(), ["a"], [0], num_inference_steps=1, progress=False)
    with pytest.raises(TypeError, match=r"WanPipeline returned .* holds no images"):
        generate_images(wan(), ["a"], [0], num_inference_steps=1, height=16, width=16, progress=False)
    with pytest.raises(ValueError, match="asked for 6 frames and made 5"):
        generate_videos(wan(), ["a"], [0], **{**GENERATION, "num_frames": 6})
    with pytest.raises(TypeError, match="one prompt per video"):
        generate_videos(wan(), "a", [0])
    with pytest.raises(ValueError, match="1 prompts and 2 seeds"):
        generate_videos(wan(), ["a"], [0, 1])


def test_a_video_of_nan_is_refused():
    pipe = wan()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN, which would be saved as a black video, for 1 of 1 prompts"):
        generate_videos(pipe, ["a cat"], [0], **GENERATION)


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_the_snippet_of_the_card_runs_as_written(video_config, clips, tmp_path, monkeypatch, full):
    """Without imageio, as here, it leaves an image for each frame; with it, a video file."""
    wan().save_pretrained(tmp_path / "wan")
    options = {"full_finetuning": True} if full else {"learning_rate": 1e-2}
    trainer = TGOLTrainer(str(tmp_path / "wan"), video_config(**options), clips, peft_config=None if full else LORA)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "pip install imageio imageio-ffmpeg" in snippet
    assert 'export_to_video(frames, "sample.mp4", fps=16)' in snippet
    monkeypatch.chdir(tmp_path / "saved")
    snippet = snippet.replace("path/to/the/base/model", str(tmp_path / "wan"))
    real, small = WanPipeline.__call__, without_progress()  # the defaults, 480x832 and 81 frames, take hours here
    monkeypatch.setattr(WanPipeline, "__call__", lambda self, *a, **k: real(self, *a, **{**small, **k}))
    exec(snippet, {})
    drawn = sorted((tmp_path / "saved").glob("sample*"))
    assert [path.name for path in drawn] in ([f"sample_{n:03}.png" for n in range(5)], ["sample.mp4"])
    if drawn[0].suffix == ".png":
        assert Image.open(drawn[0]).size == (32, 16)


def colours(shift, count=9):
    ramp = np.zeros((count, 48, 80, 3), np.uint8)
    for number in range(count):
        ramp[number, :, : 8 * (number + 1)] = [230, 90 + shift, 40]
    return [Image.fromarray(frame) for frame in ramp]


def test_a_contact_sheet_shows_the_frames_where_they_belong(tmp_path):
    prompts = ["a bar that grows from left to right", "the same, " * 30]
    path = tmp_path / "new" / "sheet.png"
    save_contact_sheet(path, prompts, [colours(0), colours(0, 3)], [colours(100), colours(100, 3)], num_shown=4)
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for green, counts in ((90, [1, 4, 6, 9, 1, 2, 3]), (190, [1, 4, 6, 9, 1, 2, 3])):
        # Frames are enlarged three times: a bar of n parts covers 48·3 · 8·n·3 pixels.
        covered = (np.abs(sheet - [230, green, 40]).sum(-1) == 0).sum()
        assert covered == sum(48 * 3 * 8 * 3 * count for count in counts)
    rows_of = [np.flatnonzero((np.abs(sheet - [230, green, 40]).sum(-1) == 0).any(1)).min() for green in (90, 190)]
    assert rows_of[0] < rows_of[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [colours(0)], []), "prompts has 1, before has 1, after has 0"),
        (([], [], []), "no videos to draw"),
        ((["a"], [[]], [colours(0)]), "`before`: video 0 has no frames"),
    ],
)
def test_a_contact_sheet_that_cannot_be_drawn_says_why(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_contact_sheet(tmp_path / "sheet.png", *arguments)
    with pytest.raises(ValueError, match="`num_shown` is 0"):
        save_contact_sheet(tmp_path / "sheet.png", ["a"], [colours(0)], [colours(0)], num_shown=0)
