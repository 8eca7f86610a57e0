"""Images during training: nothing is disturbed, scores reach the log and trackers, the strip goes on."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from tests.clips import encoded
from tests.helpers import quick
from tests.tiny import amused, stable_diffusion, wan
from tgol_trainer import TGOLTrainer
from tgol_trainer.data import DataError
from tgol_trainer.evaluation import generate_images, save_sample_strip
from tgol_trainer.sampling import SampleCallback, SampleSettings
from tgol_trainer.sampling.callback import read_sample_prompts

PROMPTS = ["prompt number 0", "something else", "prompt number 2"]
SAMPLING = {"per_device_eval_batch_size": 2}


def sampler(reward_funcs=None, prompts=PROMPTS, **options):
    return SampleCallback(prompts, reward_funcs, settings=SampleSettings(num_inference_steps=2), **options)


def brightness(images, prompts):
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


def restless(images, prompts):
    """A reward that draws from every global generator."""
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in images]


def picky(images, prompts):
    return [
        None if "else" in prompt else score for prompt, score in zip(prompts, brightness(images, prompts), strict=True)
    ]


def sampled(trainer, key="samples/brightness/mean"):
    return [line for line in trainer.state.log_history if key in line]


def image(trainer, column, row):
    return Image.open(f"{trainer.args.output_dir}/samples/{column}/{row:03d}.png")


def moments(trainer):
    with open(f"{trainer.args.output_dir}/samples/index.json") as file:
        return json.load(file)["columns"]


def test_sampled_prompts_are_stripped_as_those_of_the_rows(config, dataset):
    samples = sampler(prompts=["(a cat:1.2)", "a dog"])
    TGOLTrainer(stable_diffusion(), config(prompt_syntax="strip"), dataset, callbacks=[samples])
    assert samples.rows == [("a cat", 0), ("a dog", 0)]
    with pytest.raises(DataError, match="'<lora:x:1>' has no plain text"):
        TGOLTrainer(
            *(stable_diffusion(), config(prompt_syntax="strip"), dataset), callbacks=[sampler(prompts=["<lora:x:1>"])]
        )


# ---- Nothing is disturbed ----

SCENES = {
    "lora with dropout": ({}, {"peft_config": LoraConfig(r=4, lora_dropout=0.3)}),
    "all weights": ({"full_finetuning": True, "learning_rate": 1e-4}, {}),
    "bf16 autocast": ({"bf16": True}, {}),
    "moving reference": ({"reference_update": "epoch", "max_steps": -1, "num_train_epochs": 2}, {}),
}


@pytest.mark.parametrize("scene", quick(SCENES, "lora with dropout", "moving reference"))
def test_a_run_with_sampling_equals_one_without_step_by_step_bit_for_bit(config, dataset, tmp_path, scene):
    settings, arguments = SCENES[scene]

    def run(name, **extra):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        options = {**settings, **extra.pop("sampling", {}), "output_dir": str(tmp_path / name)}
        trainer = TGOLTrainer(stable_diffusion(), config(**options), dataset, **arguments, **extra)
        scheduler, timesteps = trainer.family.pipeline.scheduler, trainer.family.pipeline.scheduler.timesteps
        gradients = []
        step = trainer.training_step

        def recorded(model, *args, **kwargs):
            loss = step(model, *args, **kwargs)
            gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
            return loss

        trainer.training_step = recorded
        trainer.train()
        states = (torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)))
        flags = [module.training for module in trainer.model.modules()]
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        kinds = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
        assert trainer.family.pipeline.scheduler is scheduler and scheduler.timesteps is timesteps
        return trainer, gradients, states, (flags, trained, kinds, random.getstate())

    plain, gradients, states, others = run("plain")
    extra = {"sampling": SAMPLING, "callbacks": [sampler([brightness, restless], steps=1)]}
    watched, gradients_too, states_too, others_too = run("watched", **extra)
    last = watched.state.global_step
    assert [line["step"] for line in sampled(watched)] == list(range(last + 1))
    lines = [line for line in watched.state.log_history if "samples/brightness/mean" not in line]
    untimed = [
        {key: value for key, value in line.items() if "runtime" not in key and "per_second" not in key}
        for line in [*plain.state.log_history, *lines]
    ]
    assert untimed[: len(untimed) // 2] == untimed[len(untimed) // 2 :]
    assert len(gradients) == len(gradients_too) == last
    for before, after in zip(gradients, gradients_too, strict=True):
        assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states, states_too, strict=True))
    assert others == others_too
    weights, weights_too = plain.model.state_dict(), watched.model.state_dict()
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)


def test_the_base_is_the_model_without_adapter_and_later_images_are_those_of_the_policy(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(**SAMPLING), dataset, callbacks=[sampler()])
    trainer.train()
    options = {"batch_size": 2, "num_inference_steps": 2, "height": 16, "width": 16, "progress": False}
    bare = generate_images(stable_diffusion(), PROMPTS, [0, 0, 0], **options)
    policy = generate_images(trainer.family.pipeline, PROMPTS, [0, 0, 0], **options)
    for row in range(3):
        assert image(trainer, "base", row).tobytes() == bare[row].tobytes()
        assert image(trainer, "step-000004", row).tobytes() == policy[row].tobytes()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(bare, policy, strict=True))


def test_an_adapter_to_start_from_is_compared_with_the_base_from_step_0_on(config, dataset, tmp_path):
    first = TGOLTrainer(stable_diffusion(), config(output_dir=str(tmp_path / "first")), dataset)
    first.train()
    first.save_model()
    args = config(**SAMPLING, adapter_name_or_path=str(tmp_path / "first"), max_steps=1, learning_rate=0.0)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset, callbacks=[sampler(brightness)])
    trainer.train()
    assert [column["step"] for column in moments(trainer)] == [None, 0, 1]
    start, end = sampled(trainer)
    assert start["samples/brightness/mean"] == end["samples/brightness/mean"] != start["samples/brightness/base"]


# ---- The log ----


def test_the_log_holds_means_and_win_rates_of_the_images_in_the_files(config, dataset):
    args = config(**SAMPLING, max_steps=3, logging_steps=10)
    trainer = TGOLTrainer(
        stable_diffusion(),
        args,
        dataset,
        callbacks=[sampler([brightness, picky, "jpeg_compressibility"], steps=2, seeds=[3, 4])],
    )
    trainer.train()
    lines = sampled(trainer)
    assert [line["step"] for line in lines] == [0, 2, 3]
    base = np.array([brightness([image(trainer, "base", row)], [""])[0] for row in range(6)])
    for line in lines[1:]:
        now = np.array([brightness([image(trainer, f"step-{line['step']:06d}", row)], [""])[0] for row in range(6)])
        wins = np.sign(now - base) / 2 + 0.5
        for name, rows in (("brightness", slice(0, 6)), ("picky", [0, 1, 4, 5])):
            assert line[f"samples/{name}/mean"] == pytest.approx(now[rows].mean(), rel=1e-12)
            assert line[f"samples/{name}/base"] == pytest.approx(base[rows].mean(), rel=1e-12)
            assert line[f"samples/{name}/win_rate"] == wins[rows].mean()
    assert lines[0]["samples/brightness/win_rate"] == 0.5
    assert lines[0]["samples/brightness/mean"] == lines[0]["samples/brightness/base"]
    assert "samples/jpeg_compressibility/win_rate" in lines[0]
    # The line of the first update and the last one are still there: 10 updates apart, and so neither of ours.
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1]


def test_images_reach_a_tensorboard_file_pixel_by_pixel(config, dataset, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    args = config(**SAMPLING, report_to="tensorboard")
    trainer = TGOLTrainer(stable_diffusion(), args, dataset, callbacks=[sampler(brightness, steps=2)])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = sorted(events.Tags()["images"])
    assert tags == ["samples/00_prompt number 0", "samples/01_something else", "samples/02_prompt number 2"]
    for row, tag in enumerate(tags):
        shown = events.Images(tag)
        assert [event.step for event in shown] == [0, 2, 4]
        for event, column in zip(shown, ("base", "step-000002", "step-000004"), strict=True):
            stored = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
            assert stored.tobytes() == image(trainer, column, row).tobytes()
    means = [event.value for event in events.Scalars("train/samples/brightness/mean")]
    assert means == pytest.approx([line["samples/brightness/mean"] for line in sampled(trainer)], rel=1e-6)


def test_a_score_of_samples_chooses_the_best_checkpoint(config, dataset):
    args = config(
        **SAMPLING,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        load_best_model_at_end=True,
        metric_for_best_model="samples/brightness/mean",
        learning_rate=1e-2,
    )
    trainer = TGOLTrainer(stable_diffusion(), args, dataset, eval_dataset=dataset, callbacks=[sampler(brightness)])
    trainer.train()
    history = {line["step"]: line["samples/brightness/mean"] for line in sampled(trainer) if line["step"]}
    evaluated = [line["eval_samples/brightness/mean"] for line in sampled(trainer, "eval_samples/brightness/mean")]
    assert evaluated == list(history.values())
    best = max(history, key=history.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    columns = moments(trainer)
    assert trainer.evaluate()["eval_samples/brightness/mean"] == history[best]
    assert moments(trainer) == columns  # an evaluation after training adds nothing


# ---- The strip ----


@pytest.mark.parametrize("lost", quick([None, "base/001.png"], "base/001.png"))
def test_a_resumed_run_goes_on_with_the_strip_and_redraws_only_a_base_that_is_missing(config, dataset, tmp_path, lost):
    calls = []

    def counted(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts)

    settings = {**SAMPLING, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = TGOLTrainer(stable_diffusion(), config(**settings), dataset, callbacks=[sampler(counted, steps=2)])
    whole.train()
    folder = tmp_path / "run" / "samples"
    drawn = {file: file.read_bytes() for file in folder.rglob("*.png")}
    before = moments(whole)
    assert [column["step"] for column in before] == [None, 2, 4, 6]
    if lost:
        (folder / lost).unlink()
    calls.clear()
    resumed = TGOLTrainer(stable_diffusion(), config(**settings), dataset, callbacks=[sampler(counted, steps=2)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert sum(calls) == (6 if lost else 3)  # step 6, and the base where it was lost
    assert moments(resumed) == before
    kept = {file: file.read_bytes() for file in folder.rglob("*.png")}
    assert kept == drawn
    assert (tmp_path / "run" / "checkpoint-6" / "samples" / "strip.png").read_bytes() == kept[folder / "strip.png"]
    assert "(samples/strip.png)" in (tmp_path / "run" / "checkpoint-6" / "README.md").read_text()


def test_a_new_run_in_the_same_folder_takes_nothing_over(config, dataset):
    first = TGOLTrainer(stable_diffusion(), config(**SAMPLING, max_steps=3), dataset, callbacks=[sampler()])
    first.train()
    again = TGOLTrainer(stable_diffusion(seed=1), config(**SAMPLING, max_steps=2), dataset, callbacks=[sampler()])
    again.train()
    assert [column["step"] for column in moments(again)] == [None, 2]
    found = {path.name for path in Path(again.args.output_dir, "samples").iterdir()}
    assert found == {"base", "step-000002", "index.json", "strip.png"}


def test_training_twice_compares_with_the_base_and_not_with_where_the_first_left_off(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(**SAMPLING), dataset, callbacks=[sampler(brightness)])
    trainer.train()
    first = sampled(trainer)
    trainer.train()
    second = sampled(trainer)
    assert second[0]["samples/brightness/base"] == first[0]["samples/brightness/base"]
    assert second[0]["samples/brightness/mean"] == first[-1]["samples/brightness/mean"]


def test_a_strip_shows_prompts_downwards_and_steps_rightwards(tmp_path):
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)], [(0, 250, 250), (250, 0, 250)]]
    images = [[Image.new("RGB", (16, 16), colour) for colour in column] for column in colours]
    path = tmp_path / "new" / "strip.png"
    save_sample_strip(path, ["one", "two"], ["base", "step 1", "step 2"], images, scores={"a": [[1, None]] * 3})
    sheet = np.asarray(Image.open(path))
    centres = {}
    for column, row in np.ndindex(3, 2):
        found = np.argwhere((sheet == colours[column][row]).all(-1))
        assert len(found) == 160 * 160
        centres[column, row] = found.mean(0)
    for column, row in np.ndindex(2, 1):
        assert centres[column, row][1] + 160 < centres[column + 1, row][1]
        assert centres[column, row][0] + 160 < centres[column, row + 1][0]
        assert centres[column, row][0] == centres[column + 1, row][0]


# ---- Other media ----


def test_a_model_of_tokens_is_sampled_one_image_a_call(config, dataset):
    trainer = TGOLTrainer(
        amused(), config(**SAMPLING, max_steps=1), dataset, callbacks=[sampler("jpeg_compressibility")]
    )
    trainer.train()
    assert [line["step"] for line in sampled(trainer, "samples/jpeg_compressibility/mean")] == [0, 1]


def test_videos_become_rows_of_frames_and_their_score_is_the_mean_over_frames(config):
    arrays = np.random.default_rng(0).integers(0, 256, (4, 5, 32, 32, 3), dtype=np.uint8)
    rows = {"prompt": ["a"] * 4, "video": [encoded(clip) for clip in arrays], "score": [0.0, 1.0, 2.0, 3.0]}
    clips = Dataset.from_dict(rows)
    options = {"resolution": 32, "num_frames": 5, "max_steps": 1, "per_device_train_batch_size": 2}
    trainer = TGOLTrainer(wan(), config(**{**SAMPLING, **options}), clips, callbacks=[sampler(brightness)])
    trainer.train()
    shown = image(trainer, "base", 0)
    assert shown.size == (3 * 128 + 2 * 2, 128)  # three frames of 32 pixels, four times their size
    assert [line["step"] for line in sampled(trainer)] == [0, 1]


def test_a_callback_forgets_the_run_before_when_another_trainer_takes_it(config, dataset, tmp_path):
    used, found = sampler(brightness), []
    for seed, callback in ((0, used), (1, used), (1, sampler(brightness))):
        args = config(**SAMPLING, max_steps=1, output_dir=str(tmp_path / str(len(found))))
        trainer = TGOLTrainer(stable_diffusion(seed=seed), args, dataset, dataset, callbacks=[callback])
        found.append({key: value for key, value in trainer.evaluate().items() if "samples/" in key})
        trainer.train()
    assert found[1] == found[2] != found[0]


def test_a_callback_that_is_added_later_samples_like_one_handed_in(config, dataset, tmp_path):
    lines = []
    for late in (False, True):
        args = config(**SAMPLING, max_steps=2, output_dir=str(tmp_path / str(late)))
        callback = sampler(brightness, steps=1)
        trainer = TGOLTrainer(stable_diffusion(), args, dataset, callbacks=None if late else [callback])
        if late:
            trainer.add_callback(callback)
        trainer.train()
        lines.append(sampled(trainer))
    assert len(lines[0]) == 3 and lines[0] == lines[1]


# ---- What is refused ----


def test_two_callbacks_that_would_write_the_same_files_are_refused(config, dataset):
    with pytest.raises(ValueError, match="two of SampleCallback"):
        TGOLTrainer(stable_diffusion(), config(), dataset, callbacks=[sampler(), sampler()])
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset, callbacks=[sampler()])
    with pytest.raises(ValueError, match="two of SampleCallback"):
        trainer.add_callback(sampler())


def test_no_repository_is_made_for_a_reward_that_does_not_exist(config, dataset, monkeypatch):
    made = []
    monkeypatch.setattr(TGOLTrainer, "init_hf_repo", lambda self, *args, **kwargs: made.append(self))
    with pytest.raises(ValueError, match="'brightnes' is not a known reward"):
        args = config(push_to_hub=True, hub_model_id="user/adapter")
        TGOLTrainer(stable_diffusion(), args, dataset, callbacks=[sampler("brightnes")])
    assert not made


@pytest.mark.parametrize(
    ("sampling", "settings", "message"),
    [
        ({"steps": 0}, {}, "`steps` must be at least 1"),
        ({"seeds": [1, 1]}, {}, "`seeds` must be one or more different numbers"),
        ({"reward_funcs": "brightnes"}, {}, "'brightnes' is not a known reward"),
        ({"reward_funcs": [brightness, brightness]}, {}, "two rewards are called 'brightness'"),
        (
            {"reward_funcs": brightness},
            {"metric_for_best_model": "samples/dark/mean"},
            "Logged are samples/brightness/mean,",
        ),
        ({}, {"metric_for_best_model": "eval_samples/a/mean"}, "Give the callback `reward_funcs`"),
        (None, {"metric_for_best_model": "eval_samples/a/mean"}, "Hand in a `SampleCallback`"),
        ({"prompts": ["a", " "]}, {}, "1 of 2 cannot be used .row 1: empty prompt"),
        ({"prompts": []}, {}, "is empty: give at least one prompt"),
        ({"prompts": ["nowhere.txt"]}, {}, "'nowhere.txt' is not a file here"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_training(config, dataset, sampling, settings, message):
    with pytest.raises((ValueError, DataError), match=message):
        callbacks = None if sampling is None else [sampler(**sampling)]
        TGOLTrainer(stable_diffusion(), config(**settings), dataset, callbacks=callbacks)


def test_prompts_come_from_a_list_or_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    assert read_sample_prompts([str(tmp_path / "prompts.txt")]) == ["a cat", "a dog"]
    assert read_sample_prompts(str(tmp_path / "prompts.txt")) == ["a cat", "a dog"]
    assert read_sample_prompts(["a cat.", "a dog"]) == ["a cat.", "a dog"]
    assert read_sample_prompts("a single prompt") == ["a single prompt"]
