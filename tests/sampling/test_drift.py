"""Sampled images that drift from the base model's: seen in pixels and scores, warned of, or the run stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.sampling import DriftAlarm, SampleCallback, SampleSettings
from tgol_trainer.sampling.drift import compare, measure
from tgol_trainer.saving.divergence import TrainingDivergedError


def pictures(seed=0, count=6):
    """Soft colours with a little noise: something to saturate, blur and flatten."""
    rng = np.random.default_rng(seed)
    gradient = np.linspace(60, 190, 32)
    made = []
    for _ in range(count):
        colour = rng.uniform(-40, 40, 3)
        image = gradient[None, :, None] + colour + rng.normal(0, 6, (32, 32, 3))
        made.append(Image.fromarray(image.clip(0, 255).astype(np.uint8)))
    return made


def changed(function):
    return [
        Image.fromarray(np.clip(function(np.asarray(image, dtype=np.float64)), 0, 255).astype(np.uint8))
        for image in pictures()
    ]


def blurred(array):
    return np.asarray(Image.fromarray(array.astype(np.uint8)).filter(ImageFilter.BoxBlur(1)))


DAMAGE = {
    "saturation": lambda array: array.mean(-1, keepdims=True) + 3 * (array - array.mean(-1, keepdims=True)),
    "contrast": lambda array: 128 + (array - 128) * 0.4,
    "high frequency": blurred,
    "diversity": lambda array: array - array.mean((0, 1)) + np.array([120.0, 120.0, 120.0]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_kind_of_damage_is_found_by_its_name(name):
    drift = compare(measure(pictures()), measure(changed(DAMAGE[name])), {}, {})
    assert any(found.startswith(f"{name} × ") for found in DriftAlarm().findings(drift))


def test_other_noise_of_the_same_kind_is_no_drift_and_the_same_images_are_at_1():
    same = compare(measure(pictures()), measure(pictures()), {}, {})
    assert set(same.values()) == {1.0}
    other = compare(measure(pictures(0, 24)), measure(pictures(1, 24)), {}, {})
    assert DriftAlarm().findings(other) == []


def test_a_score_is_compared_in_standard_deviations_of_the_base_and_may_rise():
    """Base scores 0 and 2 have standard deviation 1; the third image has no score."""
    base = {"score": [0.0, 2.0, None]}
    drift = compare({}, {}, base, {"score": [-1.5, 0.5, 9.0]})
    assert drift == {"drift/score": pytest.approx(-1.5)}
    assert DriftAlarm().findings(drift) == ["score -1.5 standard deviations"]
    assert DriftAlarm().findings(compare({}, {}, base, {"score": [9.0, 9.0, 9.0]})) == []
    assert compare({}, {}, {"score": [1.0, 1.0, 1.0]}, {"score": [0.0, 0.0, 0.0]}) == {}


def test_settings_of_the_alarm_that_mean_nothing_are_refused(config, dataset):
    for options in ({"action": "shout"}, {"max_ratio": 1.0}, {"max_drop": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            DriftAlarm(**options)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="leave one out"):
        TGOLTrainer(
            stable_diffusion(), config(**options), dataset, eval_dataset=dataset, callbacks=[sampler([], "stop")]
        )


# ---- In a run ----


def sampler(rewards, action):
    settings = SampleSettings(num_inference_steps=2)
    return SampleCallback(["one", "two", "three"], rewards, steps=1, settings=settings, drift=DriftAlarm(action))


class Falling:
    """A score that falls at the given call: the base is the first, step 1 the second."""

    __name__ = "falling"

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, images, prompts):
        self.calls += 1
        return [float(index) - 10.0 * (self.calls >= self.at) for index in range(len(images))]


class Weights(TrainerCallback):
    """The trained weights after each update."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append([p.detach().clone() for n, p in model.named_parameters() if p.requires_grad])


def drifting(config, dataset, at, action):
    seen = Weights()
    trainer = TGOLTrainer(
        stable_diffusion(),
        config(per_device_eval_batch_size=3, save_strategy="steps", save_steps=1),
        dataset,
        peft_config=LoraConfig(r=4),
        callbacks=[seen, sampler([Falling(at)], action)],
    )
    return trainer, seen


def test_a_drift_stops_the_run_and_the_weights_of_the_sampling_before_are_kept(config, dataset, caplog):
    trainer, seen = drifting(config, dataset, at=4, action="stop")  # base, steps 1, 2, 3
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 3
    now = [value.detach() for value in trainer._trained_weights()]
    assert all(torch.equal(a, b) for a, b in zip(now, seen.after[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(now, seen.after[2], strict=True))
    said = "Training stopped at step 3, where images had drifted from the base model's (falling -12.2 standard dev"
    assert said in caplog.text
    folder = Path(trainer.args.output_dir)
    card = (folder / "README.md").read_text()
    assert said in card and "The weights are those of step 2." in card
    ours, saved = (
        load_file(place / "pytorch_lora_weights.safetensors") for place in (folder, folder / "checkpoint-2")
    )
    assert all(torch.equal(ours[name], saved[name]) for name in saved)
    assert not (folder / "checkpoint-3").exists()


def test_a_run_that_drifted_before_anything_was_kept_is_an_error(config, dataset):
    trainer, _ = drifting(config, dataset, at=2, action="stop")
    with pytest.raises(TrainingDivergedError, match=r"stopped at step 1, the first that was sampled.*No weights"):
        trainer.train()


def test_by_default_a_drift_is_a_warning_and_the_run_goes_on(config, dataset, caplog):
    trainer, _ = drifting(config, dataset, at=4, action="warn")
    trainer.train()
    assert trainer.state.global_step == 4
    warned = [record.getMessage() for record in caplog.records if "have drifted" in record.getMessage()]
    assert [text.split(":")[0] for text in warned] == ["Step 3", "Step 4"]
    logged = [line["drift/falling"] for line in trainer.state.log_history if "drift/falling" in line]
    assert logged == pytest.approx([0, 0, 0, -12.247449, -12.247449])
