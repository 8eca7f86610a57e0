"""The reference's errors on fixed draws: those of a second forward pass, computed once, one pass a step."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from tests.conftest import scored_dataset
from tests.helpers import over
from tests.pipelines import TINY
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLConfig, TGOLTrainer

SETTINGS = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 4, "max_steps": 5, "random_flip": True}


def counted(trainer, monkeypatch):
    """Count the rows that the denoiser sees, with and without gradient."""
    seen = {"reference": 0, "policy": 0}
    predict = trainer.family.predict

    def call(model, draw, conditioning):
        prediction = predict(model, draw, conditioning)
        seen["policy" if prediction.requires_grad else "reference"] += len(prediction)
        return prediction

    monkeypatch.setattr(trainer.family, "predict", call)
    return seen


@over(TINY, ("sd", "flux", "wan", "amused"))
def test_a_kept_error_is_that_of_a_second_forward_pass_on_the_same_draw(name, tmp_path, monkeypatch):
    facts = TINY[name]
    settings = {**facts.settings, **SETTINGS, "max_steps": 3, "num_ref_draws": 2, "caption_dropout": 0.3}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args = TGOLConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), **settings)
    trainer = TGOLTrainer(facts.build(), args, facts.dataset(), eval_dataset=facts.dataset())
    trainer.get_train_dataloader()
    read, compared = trainer.draws.references.read, []

    def both(inputs, step):
        kept = read(inputs, step)
        live = trainer._reference_pass(*trainer.draws(inputs, step))[1]
        torch.testing.assert_close(kept, live, rtol=1e-6, atol=1e-7)
        compared.append(step)
        return kept

    monkeypatch.setattr(trainer.draws.references, "read", both)
    trainer.train()
    trainer.evaluate()
    # Four rows: a step is a pass over the data, and the two draws take turns. Evaluation has a draw of its own.
    assert compared == [-2, -3, -2, -1]
    scores = np.asarray(facts.dataset()["score"])
    weights = 1 + 5 * np.abs(scores - np.median(scores))
    first = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert first == pytest.approx(weights.mean() * math.log(2), rel=1e-3)


def test_training_runs_one_forward_pass_and_the_next_run_no_pass_of_the_reference(config, tmp_path, monkeypatch):
    dataset, evaluated = scored_dataset(8), scored_dataset(4, seed=1)

    def run(**overrides):
        args = config(**{**SETTINGS, "cache_dir": str(tmp_path / "cache"), "allow_bad_base": True, **overrides})
        build = overrides.pop("build", stable_diffusion)
        trainer = TGOLTrainer(build(), args, dataset, evaluated, peft_config=LoraConfig(r=overrides.get("seed", 4)))
        seen = counted(trainer, monkeypatch)
        trainer.train()
        trainer.evaluate()
        return seen["reference"], seen["policy"]

    # Five steps of four of eight rows are three passes. The last 4: the policy's pass of evaluation, without gradient.
    assert run() == (3 * 8 + 4 + 4, 5 * 4)
    assert run(temperature=0.1, beta=0.5) == (4, 20)
    assert run(seed=7) == (3 * 8 + 4 + 4, 20)
    assert run(max_steps=7) == (8 + 4, 28)  # three of four draws are there
    assert run(num_ref_draws=2) == (4, 20)


def test_another_base_model_has_errors_of_its_own_and_another_adapter_on_it_has_not(config, tmp_path, monkeypatch):
    dataset = scored_dataset(8)

    def run(pipeline, **lora):
        args = config(**SETTINGS, num_ref_draws=1, cache_dir=str(tmp_path / "cache"))
        trainer = TGOLTrainer(pipeline, args, dataset, peft_config=LoraConfig(**lora))
        seen = counted(trainer, monkeypatch)
        trainer.get_train_dataloader()
        return seen["reference"]

    assert run(stable_diffusion(), r=4) == 8
    assert run(stable_diffusion(), r=8, target_modules=["to_q", "conv_in"]) == 0
    other = stable_diffusion()
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1e-3
    assert run(other, r=4) == 8


def test_images_of_several_sizes_have_the_errors_of_their_own_size_and_autocast_is_that_of_training(config, tmp_path):
    """Rows of two sizes in turns; under bf16 kept errors of float32 give log-ratios of tenths at the first step."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*[(48, 96), (64, 64)][i % 2], 3), dtype=np.uint8)) for i in range(8)
    ]
    rows = Dataset.from_dict({"prompt": ["a"] * 8, "image": images, "score": rng.normal(size=8)})
    for bf16 in (False, True):
        args = config(
            **{**SETTINGS, "random_flip": False}, resolution=64, bf16=bf16, cache_dir=str(tmp_path / "cache")
        )
        trainer = TGOLTrainer(stable_diffusion(), args, rows)
        trainer.train()
        first = next(line for line in trainer.state.log_history if "loss" in line)
        assert abs(first["rewards/positive"]) < 0.02 and abs(first["rewards/negative"]) < 0.02
        again = trainer.evaluate(trainer.train_dataset)
        assert math.isfinite(again["eval_loss"])
        args.max_steps = 9
        trainer.train()  # more passes, so more draws
    with pytest.raises(ValueError, match="it cannot move"):
        trainer.update_reference()


@pytest.mark.parametrize("loss_type", ["sft", "csft"])
def test_supervised_losses_never_run_the_reference_and_log_what_needs_none(config, dataset, monkeypatch, loss_type):
    trainer = TGOLTrainer(
        stable_diffusion(), config(loss_type=loss_type, allow_bad_base=True), dataset, scored_dataset(4)
    )
    seen = counted(trainer, monkeypatch)
    trainer.train()
    assert seen["reference"] == 0
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert {"errors/positive", "errors/negative", "weights/mean", "scores/mean"} <= set(lines[0])
    assert not [key for line in lines for key in line if key.startswith("rewards/") or key.endswith("_change")]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"reference_update": "epoch"}, "makes a new reference after each epoch: leave one out"),
        ({"loss_type": "nft"}, "compares its outputs with the policy's: leave it False"),
        ({"cache": False}, "needs the cache of images and prompts: leave `cache` True"),
        ({"loss_type": "sft"}, "acts only with other loss types than 'sft' and 'csft'"),
    ],
)
def test_what_the_kept_errors_cannot_serve_is_refused(config, others, message):
    with pytest.raises(ValueError, match=message):
        config(precompute_ref_log_probs=True, **others)


def test_a_stream_cannot_have_its_reference_computed_before(config, dataset):
    with pytest.raises(ValueError, match="`precompute_ref_log_probs` needs a dataset with a length"):
        TGOLTrainer(stable_diffusion(), config(precompute_ref_log_probs=True), dataset.to_iterable_dataset())
