"""Losses, gradients and weights that are not finite: left out if asked for, counted, and blamed on what broke them."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.metrics import RECORD
from tgol_trainer.saving.divergence import TrainingDivergedError, UpdateFilter, norm_overflows

SKIP = {"on_nan": "skip", "lr_scheduler_type": "constant"}


class Watched(TGOLTrainer):
    """Makes chosen losses NaN, or gradients infinite, and keeps weights and optimizer after each update."""

    def __init__(self, *args, broken=(), broken_gradient=(), **kwargs):
        self.broken, self.broken_gradient, self.after, self.calls = broken, broken_gradient, [], 0
        super().__init__(*args, **kwargs)
        self.add_callback(Record(self))

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.calls += 1
        if self.calls in self.broken:
            return loss * math.nan
        if self.calls in self.broken_gradient:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss


class Record(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, *args, **kwargs):
        state = self.trainer.optimizer.state_dict()["state"]
        moments = [value.clone() for entry in state.values() for value in entry.values() if torch.is_tensor(value)]
        self.trainer.after.append([value.detach().clone() for value in self.trainer._trained_weights()] + moments)


def watched(config, dataset, broken=(), broken_gradient=(), **options):
    lora = LoraConfig(r=4, lora_alpha=8)
    trainer = Watched(
        stable_diffusion(),
        config(**{**SKIP, **options}),
        dataset,
        peft_config=lora,
        broken=broken,
        broken_gradient=broken_gradient,
    )
    trainer.train()
    return trainer


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("kind", ["broken", "broken_gradient"])
def test_a_skipped_update_changes_neither_weights_nor_optimizer_and_the_next_one_trains(config, dataset, optim, kind):
    trainer = watched(config, dataset, optim=optim, weight_decay=0.1, **{kind: [3]})
    one, two, three, four = trainer.after
    assert equal(two, three)
    assert not equal(one, two) and not equal(three, four)
    logged = [line for line in trainer.state.log_history if "skipped_updates" in line and "loss" in line]
    assert [line["skipped_updates"] for line in logged] == [0, 0, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in logged)
    assert all(math.isfinite(line["rewards/margins"]) for line in logged if "rewards/margins" in line)


def test_one_micro_batch_of_two_takes_the_whole_update_with_it(config, dataset):
    trainer = watched(config, dataset, broken=[3], gradient_accumulation_steps=2, per_device_train_batch_size=4)
    one, two, three, _ = trainer.after
    assert equal(one, two) and not equal(two, three)
    assert trainer.state.log_history[-1]["skipped_updates"] == 1


def test_a_run_without_faults_is_the_same_with_and_without_skipping(config, dataset):
    assert equal(watched(config, dataset).after[-1], watched(config, dataset, on_nan="raise").after[-1])


def test_the_limit_holds_over_a_resume_and_the_error_says_how_many(config, dataset, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "max_skipped_updates": 2}
    first = watched(config, dataset, broken=[1], max_steps=2, **options)
    state = json.loads((Path(first.args.output_dir) / "checkpoint-2" / "tgol_state.json").read_text())
    assert state["skipped_updates"] == 1
    assert "1 updates were left out up to step" in caplog.text and "(2 are allowed)" in caplog.text
    again = Watched(
        stable_diffusion(),
        config(**SKIP, **options, max_steps=6),
        dataset,
        peft_config=LoraConfig(r=4, lora_alpha=8),
        broken=[1, 2],
    )
    with pytest.raises(TrainingDivergedError, match=r"3 updates were left out.*`max_skipped_updates` is 2"):
        again.train(resume_from_checkpoint=True)


def test_a_decision_for_a_fused_optimizer_never_waits_for_the_device():
    """On the meta device nothing can be read."""
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.defaults["fused"] = True
    updates = UpdateFilter(torch.device("meta"))
    assert updates.add(torch.zeros((), device="meta")).device.type == "meta"
    updates.before_update(optimizer, norm_overflows([weight]))
    assert optimizer.found_inf.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        updates.count()


def test_under_a_gradient_scaler_only_losses_count():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), math.inf)
    optimizer = torch.optim.AdamW([weight], fused=True)
    updates = UpdateFilter(torch.device("cpu"))
    updates.before_update(optimizer, None)
    assert updates.count() == 0
    updates.add(torch.tensor(math.nan))
    updates.before_update(optimizer, None)
    assert updates.count() == 1
    assert not hasattr(optimizer, "found_inf")


def test_a_negative_limit_is_refused(config):
    with pytest.raises(ValueError, match="`max_skipped_updates` must be at least 0, got -1"):
        config(max_skipped_updates=-1)


# ---- Causes, by looking ----


def failing(config, dataset, spoil=None, **options):
    options = {"logging_steps": 2, "logging_first_step": False, **options}
    trainer = TGOLTrainer(stable_diffusion(), config(**options), dataset, peft_config=LoraConfig(r=4))
    if spoil is not None:
        spoil(trainer)
    with pytest.raises(TrainingDivergedError) as raised:
        trainer.train()
    return str(raised.value)


def break_autoencoder(trainer):
    next(trainer.family.pipeline.vae.encoder.parameters()).data.fill_(math.nan)


def test_an_autoencoder_that_gives_nan_is_named_with_the_row_before_training_and_nothing_is_kept(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    break_autoencoder(trainer)
    with pytest.raises(FloatingPointError, match=r"The autoencoder makes NaN or infinity of the image of row 0, in"):
        trainer.train()


def test_a_text_encoder_that_gives_nan_is_named_with_the_prompt(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    for weight in trainer.family.pipeline.text_encoder.parameters():
        weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"A text encoder makes NaN or infinity of the prompt 'prompt number"):
        trainer.train()


def test_without_a_cache_the_reference_tells_that_the_learning_rate_is_not_the_cause(config, dataset):
    said = failing(config, dataset, break_autoencoder, cache=False, train_sampling_strategy="sequential")
    assert "The loss is nan at step 1. The reference's error is not finite either" in said
    assert "(rows of the batch: 0, 1, 2, 3, 4, 5, 6, 7)" in said
    assert "learning rate is not the cause" in said


@pytest.mark.parametrize("loss_type", ["tgol", "sft"])
def test_a_learning_rate_that_broke_the_weights_is_named(config, dataset, loss_type):
    said = failing(config, dataset, learning_rate=1e30, loss_type=loss_type)
    assert "so training broke the weights: lower `learning_rate` (it is 1e+30)" in said


def test_a_score_far_from_the_threshold_of_a_stream_is_named(config, dataset):
    """The weights of a stream are made row by row, so that none is seen before."""
    scores = [1e36 if row == 5 else score for row, score in enumerate(dataset["score"])]
    stream = dataset.remove_columns("score").add_column("score", scores).to_iterable_dataset()
    said = failing(config, stream, threshold=0.0, confidence_scale=1e6)
    assert "The largest confidence weight is inf" in said or "The largest confidence weight is 1e+42" in said


def test_a_temperature_that_stretches_gradients_beyond_float32_is_named(config, dataset):
    """Clipping by an infinite norm makes every gradient 0: the run would end well and have trained nothing."""
    said = failing(config, dataset, temperature=1e-30)
    assert "The norm of the gradient is not finite at step 1. The loss was finite: `temperature` 1e-30" in said


def test_rows_without_a_finite_loss_count_in_no_metric():
    from tgol_trainer.metrics import MetricSums

    rows = torch.ones(4, len(RECORD))
    rows[1] = math.nan
    whole, kept = MetricSums(), MetricSums()
    whole.add(rows)
    kept.add(rows[[0, 2, 3]])
    assert whole.pop() == kept.pop()
    whole.add(rows[[1]])
    assert whole.pop() == {}
