"""TGOLTrainer on a tiny random pipeline: the loss, the reference, resuming, splitting, options."""

import contextlib
import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.conftest import scored_dataset
from tests.helpers import quick, step_without_waiting
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer, adapters
from tgol_trainer.config.checks import check_processes, check_sharding
from tgol_trainer.data import decode_prompts
from tgol_trainer.families import load_family
from tgol_trainer.likelihoods import RowGenerators
from tgol_trainer.metrics import LOGGED_METRICS, RECORD
from tgol_trainer.saving.divergence import TrainingDivergedError
from tgol_trainer.thresholds import ThresholdError

LORA = LoraConfig(r=4, lora_alpha=8)


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def first_line(trainer):
    return next(line for line in trainer.state.log_history if "loss" in line)


def batch_of(trainer, rows=range(8)):
    return trainer.collator([trainer.train_dataset[row] for row in rows])


def randomize(trainer, scale=0.05):
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


# ---- Prompts ----


def test_a_run_that_strips_prompts_trains_as_one_on_the_plain_text(config, dataset, caplog):
    written = [f"({prompt}:1.2) <lora:x:1>" for prompt in dataset["prompt"]]
    other = dataset.remove_columns("prompt").add_column("prompt", written)
    caplog.set_level(logging.INFO, logger="tgol_trainer")
    stripped = TGOLTrainer(stable_diffusion(), config(max_steps=2, prompt_syntax="strip"), other)
    assert "instructions for other programs are taken out of" in caplog.text
    plain = TGOLTrainer(stable_diffusion(), config(max_steps=2), dataset)
    for trainer in (stripped, plain):
        randomize(trainer)
        trainer.train()
    assert losses(stripped) == losses(plain)
    assert stripped.example_prompt == dataset[0]["prompt"]


# ---- The loss ----


@pytest.mark.parametrize(
    ("prediction_type", "normalization"),
    quick(
        list(itertools.product(["epsilon", "v_prediction"], ["none", "zscore", "robust"])),
        ("epsilon", "none"),
        ("epsilon", "zscore"),
        ("v_prediction", "robust"),
    ),
)
def test_the_first_logged_loss_is_the_mean_weight_times_ln_2(config, dataset, prediction_type, normalization):
    """32 rows in one batch: weights 1 + 5·|s - median| from the raw column, by numpy alone."""
    args = config(max_steps=1, per_device_train_batch_size=32, score_normalization=normalization)
    trainer = TGOLTrainer(stable_diffusion(prediction_type), args, dataset)
    trainer.train()
    scores = np.asarray(dataset["score"])
    if normalization == "zscore":
        scores = (scores - scores.mean()) / scores.std()
    elif normalization == "robust":
        low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75])
        scores = (scores - middle) / ((high - low) / 1.3489795003921634)
    weights = 1 + 5 * np.abs(scores - np.median(scores))
    line = first_line(trainer)
    assert line["loss"] == pytest.approx(weights.mean() * math.log(2), rel=1e-6)
    assert line["weights/mean"] == pytest.approx(weights.mean(), rel=1e-6)
    assert line["weights/max"] == pytest.approx(weights.max(), rel=1e-6)
    assert line["labels/positive_share"] == np.mean(scores >= np.median(scores))
    assert line["rewards/accuracies"] == 0.5


def test_loss_and_gradients_of_a_batch_match_an_independent_float64_formula(config, dataset):
    """The whole path again in float64: encoders, noise, both passes of the UNet, sigma written out, autograd."""
    settings = {"beta": 2.0, "confidence_scale": 3.0, "temperature": 0.01, "latent_sampling": "mode"}
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), dataset, peft_config=LORA)
    randomize(trainer)
    batch = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad.double() for name, p in trainer.model.named_parameters() if p.requires_grad}

    pipe = trainer.family.pipeline
    unet = pipe.unet.double()
    prompts = [dataset["prompt"][row] for row in range(8)]
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    noise_keys = RowGenerators(42, 0, range(8))
    with torch.no_grad():
        z = pipe.vae.double().encode(batch["pixel_values"].double()).latent_dist.mode() * 0.18215
        text = pipe.text_encoder.double()(tokens.input_ids)[0]
    noise = noise_keys.normal("noise", z.float()).double()
    t = noise_keys.integers("timestep", 1000)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = torch.cumprod(1 - betas, 0)[t].view(-1, 1, 1, 1)
    noised = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    unet.zero_grad()
    policy = ((unet(noised, t, text).sample - noise) ** 2).mean((1, 2, 3))
    with torch.no_grad():
        base = stable_diffusion().unet.double()
        reference = ((base(noised, t, text).sample - noise) ** 2).mean((1, 2, 3))
    scores = torch.tensor(dataset["score"][:8], dtype=torch.float64)
    tau = np.median(dataset["score"])
    sigma = 1 / (1 + torch.exp(-2.0 * -(policy - reference) / 0.01))
    label = (scores >= tau).double()
    direct = -((1 + 3 * (scores - tau).abs()) * (label * sigma.log() + (1 - label) * (1 - sigma).log())).mean()
    direct.backward()
    assert loss.item() == pytest.approx(direct.item(), rel=1e-4)
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=1e-4)


def test_every_logged_key_is_documented_and_every_documented_key_is_logged(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset, eval_dataset=dataset)
    trainer.train()
    own = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert set(first_line(trainer)) - own == set(LOGGED_METRICS)
    evaluated = {key.removeprefix("eval_") for key in trainer.evaluate()}
    timing = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "loss"}
    assert evaluated - timing == set(LOGGED_METRICS)


def test_steps_on_one_fixed_draw_lower_the_loss_pull_positives_nearer_and_push_negatives_away(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    optimizer = torch.optim.Adam([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    trainer.model.train()
    batch, records, history = batch_of(trainer), [], []
    for _ in range(9):
        loss, record = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        records.append(dict(zip(RECORD, record.T, strict=True)))
    assert history[0] == pytest.approx(records[0]["weight"].mean().item() * math.log(2), rel=1e-6)
    assert history[-1] < 0.8 * history[0]
    change = records[-1]["error"] - records[-1]["reference_error"]
    positive = records[-1]["label"] > 0.5
    assert change[positive].mean() < 0 < change[~positive].mean()


# ---- The reference ----


def test_a_reference_left_disabled_would_be_noticed(config, dataset, monkeypatch):
    """Break it as the trap does: adapters stay off after the reference's pass, so nothing would be trained."""

    @contextlib.contextmanager
    def leaves_adapters_off(model):
        model.disable_adapters()
        with torch.no_grad():
            yield

    def moved(trainer):
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        with contextlib.suppress(RuntimeError):
            trainer.train()
        after = dict(trainer.model.named_parameters())
        return any(not torch.equal(b, after[name]) for b, name in zip(before, names, strict=True))

    assert moved(TGOLTrainer(stable_diffusion(), config(), dataset))
    monkeypatch.setattr(adapters, "reference_policy", leaves_adapters_off)
    assert not moved(TGOLTrainer(stable_diffusion(), config(), dataset))


def test_policy_and_reference_see_the_same_inputs(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append((args[0].clone(), args[1].clone())))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer))
    (reference_inputs, reference_times), (policy_inputs, policy_times) = seen
    assert torch.equal(reference_inputs, policy_inputs)
    assert torch.equal(reference_times, policy_times)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "tgol_anchored", "value_baseline": True},
        {"loss_type": "kto"},
        {"loss_type": "nft"},
        {"loss_type": "csft"},
        {"loss_type": "dpo", "group_size": 2},
        {"loss_type": "tgol_pairs", "group_size": 2},
        {"precompute_ref_log_probs": True},
        {"random_flip": True, "caption_dropout": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_no_loss_waits_for_the_device(config, dataset, monkeypatch, options):
    trainer = TGOLTrainer(stable_diffusion(), config(**options), dataset)
    if trainer.args.value_baseline:
        trainer._value.fit(trainer.train_dataset, 1.0)
        trainer._value.regression = trainer._value.regression.to("meta")
    assert step_without_waiting(trainer, monkeypatch)


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(use_cpu=False, dataloader_pin_memory=True), dataset)
    batches = iter(trainer.get_train_dataloader())
    trainer.compute_loss(trainer.model, next(batches)).backward()  # the first one chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.compute_loss(trainer.model, next(batches)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_reference_stays_the_base_model_while_the_policy_moves(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    trainer.train()
    family = trainer.family
    with trainer.reference_policy():
        reference = family.probe()
    base = TGOLTrainer(stable_diffusion(), config(), dataset).family
    with adapters.reference_policy(base.denoiser):
        assert torch.equal(reference, base.probe())
    assert not torch.equal(family.probe(), reference)


def test_syncing_each_epoch_makes_the_policy_the_reference_and_the_first_loss_ln_2_again(config, dataset):
    args = config(max_steps=-1, num_train_epochs=2, reference_update="epoch", learning_rate=1e-3)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 8
    fifth = lines[4]
    assert fifth["loss"] == pytest.approx(fifth["weights/mean"] * math.log(2), rel=1e-6)
    assert lines[3]["rewards/positive"] != 0


def test_full_finetuning_trains_every_weight_against_a_frozen_copy(config, dataset, tmp_path):
    trainer = TGOLTrainer(stable_diffusion(), config(full_finetuning=True, learning_rate=1e-4), dataset)
    assert all(p.requires_grad for p in trainer.model.parameters())
    trainer.train()
    line = first_line(trainer)
    # Weights with gradient may take another kernel than the copy's, and 1/T = 1000 multiplies the rounding.
    assert line["loss"] == pytest.approx(line["weights/mean"] * math.log(2), rel=1e-4)
    base, reference = stable_diffusion().unet.state_dict(), trainer.reference_model.state_dict()
    assert all(torch.equal(base[name], reference[name]) for name in base)
    moved = trainer.model.state_dict()
    assert not all(torch.equal(base[name], moved[name]) for name in base)
    trainer.save_model(str(tmp_path / "full"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "full" / "unet").state_dict()
    assert all(torch.equal(loaded[name], moved[name]) for name in moved)


# ---- Resuming and splitting ----


RESUMED = {
    "lora": {},
    "full": {"full_finetuning": True, "learning_rate": 1e-4},
    "synced": {"reference_update": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "caption_dropout": 0.5, "random_flip": True},
    "valued": {"loss_type": "tgol_anchored", "value_baseline": True, "reference_update": "epoch"},
}


@pytest.mark.parametrize(
    ("at", "options"),
    quick(list(itertools.product([3, 4], RESUMED)), *((3, name) for name in RESUMED), (4, "synced")),
)
def test_stopping_and_resuming_equals_never_having_stopped(config, dataset, options, at):
    """32 rows at batch 8 are 4 steps an epoch: step 3 lies inside the first, step 4 at its very end."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": at, **RESUMED[options]}
    whole = TGOLTrainer(stable_diffusion(), config(**settings), dataset)
    whole.train()
    torch.manual_seed(12345)  # whatever happened to the global generator in between
    resumed = TGOLTrainer(stable_diffusion(), config(**settings), dataset)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{at}")
    assert losses(resumed) == losses(whole)
    policy, again = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(policy[name], again[name]) for name in policy if "reference" not in name)


@pytest.mark.parametrize(("batch", "accumulation"), quick([(4, 2), (2, 4), (1, 8)], (2, 4)))
def test_splitting_a_batch_into_accumulated_parts_changes_only_rounding(config, dataset, batch, accumulation):
    settings = {"max_steps": 8, "caption_dropout": 0.3, "random_flip": True}
    whole = TGOLTrainer(stable_diffusion(), config(**settings), dataset)
    whole.train()
    split = TGOLTrainer(
        stable_diffusion(),
        config(**settings, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation),
        dataset,
    )
    split.train()
    np.testing.assert_allclose(losses(split), losses(whole), rtol=1e-3)


def test_workers_do_not_change_what_is_trained(config, dataset):
    alone = TGOLTrainer(stable_diffusion(), config(), dataset)
    alone.train()
    workers = TGOLTrainer(stable_diffusion(), config(dataloader_num_workers=2), dataset)
    workers.train()
    assert losses(workers) == losses(alone)


def test_the_threshold_of_the_checkpoint_wins_over_changed_data(config, dataset, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = TGOLTrainer(stable_diffusion(), config(**settings), dataset)
    first.train()
    changed = config(**settings, allow_changed=["train_dataset"])
    other = TGOLTrainer(stable_diffusion(), changed, scored_dataset(seed=1))
    caplog.set_level(logging.WARNING)
    other.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert "The checkpoint's threshold is" in caplog.text
    assert other.threshold.value == first.threshold.value == other.labeler.threshold.value


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(config, dataset, tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    with pytest.raises(FileNotFoundError, match=r"holds no pytorch_lora_weights\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_the_best_checkpoint_is_loaded_at_the_end(config, dataset):
    args = config(
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer = TGOLTrainer(stable_diffusion(), args, dataset, eval_dataset=dataset)
    trainer.train()
    history = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert history[-1] != max(history)
    assert trainer.evaluate()["eval_loss"] == max(history)


# ---- Evaluation ----


def test_evaluation_gives_the_same_numbers_each_time_and_counts_the_last_incomplete_batch(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(per_device_eval_batch_size=7), dataset, eval_dataset=dataset)
    randomize(trainer)
    once, twice = trainer.evaluate(), trainer.evaluate()
    assert once["eval_loss"] == twice["eval_loss"]
    assert once["eval_labels/positive_share"] == 0.5
    trainer.args.per_device_eval_batch_size = 32
    whole = trainer.evaluate()
    for key in ("eval_loss", "eval_rewards/margins", "eval_weights/mean"):
        assert once[key] == pytest.approx(whole[key], rel=1e-3)


def test_evaluation_labels_with_the_training_threshold(config, dataset):
    shifted = dataset.map(lambda row: {"score": row["score"] + 100})
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset, eval_dataset={"same": dataset, "high": shifted})
    metrics = trainer.evaluate()
    assert metrics["eval_same_labels/positive_share"] == 0.5
    assert metrics["eval_high_labels/positive_share"] == 1.0


def test_evaluate_takes_a_dataset_as_the_constructor_does(config, dataset):
    given = TGOLTrainer(stable_diffusion(), config(), dataset, eval_dataset=dataset)
    later = TGOLTrainer(stable_diffusion(), config(), dataset)
    assert later.evaluate(dataset)["eval_loss"] == given.evaluate()["eval_loss"]
    assert later.evaluate({"high": dataset})["eval_high_loss"] == given.evaluate()["eval_loss"]


def test_evaluation_data_without_training_data_are_refused(config, dataset):
    """Nothing would tell their threshold: they would be labelled by 0."""
    with pytest.raises(ValueError, match="`eval_dataset` needs a `train_dataset`"):
        TGOLTrainer(stable_diffusion(), config(), eval_dataset=dataset)


def test_evaluating_between_steps_does_not_change_training(config, dataset):
    plain = TGOLTrainer(stable_diffusion(), config(), dataset)
    plain.train()
    evaluated = TGOLTrainer(
        stable_diffusion(), config(eval_strategy="steps", eval_steps=1), dataset, eval_dataset=dataset
    )
    evaluated.train()
    assert losses(evaluated) == losses(plain)


# ---- Options ----


@pytest.mark.parametrize("dtype", quick([torch.bfloat16, torch.float16], torch.bfloat16))
def test_the_adapter_is_float32_on_a_base_of_lower_precision(config, dataset, dtype):
    trainer = TGOLTrainer(stable_diffusion().to(dtype), config(max_steps=1), dataset)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {dtype}
    trainer.train()
    line = first_line(trainer)
    assert line["loss"] == pytest.approx(line["weights/mean"] * math.log(2), rel=1e-6)


def test_gradient_checkpointing_changes_memory_and_not_the_losses(config, dataset):
    plain = TGOLTrainer(stable_diffusion(), config(), dataset)
    plain.train()
    args = config(gradient_checkpointing=True)
    checkpointed = TGOLTrainer(stable_diffusion(), args, dataset)
    assert checkpointed.model.is_gradient_checkpointing
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)


def test_checkpointing_stays_set_in_the_arguments_so_that_it_is_recorded_and_a_second_trainer_has_it(config, dataset):
    args = config(gradient_checkpointing=True)
    first = TGOLTrainer(stable_diffusion(), args, dataset)
    first.train()
    first.save_model()
    assert json.loads(Path(args.output_dir, "training_args.json").read_text())["gradient_checkpointing"] is True
    second = TGOLTrainer(stable_diffusion(), args, dataset)
    assert args.gradient_checkpointing is True and second.model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row, index: {"score": 1000 * row["score"]}, "Scores are spread too wide for c = 5"),
        (lambda row, index: {"score": row["score"] / 1000}, "Scores are spread too narrowly for c = 5"),
        (
            lambda row, index: {"score": float(index % 5 > 1) + index / 1e3, "prompt": f"prompt {index % 5}"},
            "have positive labels alone and",
        ),
    ],
)
def test_what_looks_wrong_with_the_labels_is_a_warning_with_its_flag(config, dataset, caplog, change, message):
    with caplog.at_level("WARNING", logger="tgol_trainer"):
        TGOLTrainer(stable_diffusion(), config(), dataset.map(change, with_indices=True))
    found = [record.getMessage() for record in caplog.records if message in record.getMessage()]
    assert len(found) == 1 and "To change that: " in found[0] and "--" in found[0]


def test_bf16_autocast_trains(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(bf16=True), dataset)
    trainer.train()
    line = first_line(trainer)
    assert line["loss"] == pytest.approx(line["weights/mean"] * math.log(2), rel=1e-6)
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_the_8_bit_optimizer_trains(config, dataset):
    pytest.importorskip("bitsandbytes")
    trainer = TGOLTrainer(stable_diffusion(), config(optim="adamw_bnb_8bit"), dataset)
    trainer.train()
    assert trainer.optimizer.optimizer.args.optim_bits == 8
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.slow
def test_compiling_changes_only_rounding(config, dataset, tmp_path):
    plain = TGOLTrainer(stable_diffusion(), config(), dataset)
    plain.train()
    compiled = TGOLTrainer(stable_diffusion(), config(torch_compile=True), dataset)
    compiled.train()
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=5e-3)
    compiled.save_model(str(tmp_path / "compiled"))
    fresh = stable_diffusion()
    fresh.load_lora_weights(tmp_path / "compiled")
    with compiled.family.whole():
        assert torch.equal(load_family(fresh).probe(), compiled.family.probe())


def test_tensorboard_gets_every_logged_metric(config, dataset, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    TGOLTrainer(
        stable_diffusion(), config(report_to="tensorboard", hub_token="hf_secretsecretsecret1"), dataset
    ).train()
    files = list(tmp_path.rglob("events.out*"))
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    assert {f"train/{key}" for key in LOGGED_METRICS} <= set(events.Tags()["scalars"])
    assert not any(b"hf_secretsecretsecret1" in path.read_bytes() for path in files)


def test_a_users_callback_sees_every_step(config, dataset):
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    count = Count()
    TGOLTrainer(stable_diffusion(), config(), dataset, callbacks=[count]).train()
    assert count.steps == 4


def test_a_users_optimizer_is_used(config, dataset):
    pipe = stable_diffusion()
    trainer = TGOLTrainer(pipe, config(), dataset)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    trainer.optimizer = optimizer
    before = [p.detach().clone() for p in parameters]
    trainer.train()
    assert all(torch.equal(b, p) for b, p in zip(before, parameters, strict=True))


def test_caption_dropout_of_one_encodes_only_the_empty_prompt(config, dataset, monkeypatch):
    trainer = TGOLTrainer(stable_diffusion(), config(caption_dropout=1.0), dataset)
    seen = []
    encode = trainer.family.encode_unique_prompts
    monkeypatch.setattr(
        trainer.family, "encode_unique_prompts", lambda prompts: seen.append(prompts) or encode(prompts)
    )
    trainer.model.train()
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert seen == [[""]]
    assert decode_prompts(batch["prompt_bytes"], batch["prompt_length"])[0] == dataset["prompt"][0]


def test_a_loss_that_is_not_finite_stops_training_with_its_causes(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset)
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"loss is nan at step 1.*lower `learning_rate`.*No checkpoint"):
        trainer.train()


# ---- Thresholds ----


def test_a_proxy_set_gives_the_threshold(config, dataset):
    proxy = datasets.Dataset.from_dict({"score": [0.0, 0.2, 0.4, 0.9]})
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset, proxy_dataset=proxy)
    assert trainer.threshold.value == pytest.approx(0.3)
    assert trainer.threshold.source == "proxy"
    assert trainer.threshold.num_positive == int((np.asarray(dataset["score"]) >= trainer.threshold.value).sum())


def test_normalisation_takes_its_statistics_from_the_data_that_gave_the_threshold(config, dataset):
    proxy = datasets.Dataset.from_dict({"score": [-1.0, 0.0, 1.0]})
    trainer = TGOLTrainer(stable_diffusion(), config(score_normalization="zscore"), dataset, proxy_dataset=proxy)
    assert (trainer.labeler.normalization.center, trainer.labeler.normalization.scale) == pytest.approx(
        (0.0, math.sqrt(2 / 3))
    )


def test_a_proxy_function_is_called_again_after_each_sync(config, dataset):
    calls = []

    def proxy(pipe):
        calls.append(pipe)
        return datasets.Dataset.from_dict({"score": [-0.1, 0.1 * len(calls)]})

    args = config(max_steps=-1, num_train_epochs=2, reference_update="epoch", threshold_update="epoch")
    pipe = stable_diffusion()
    trainer = TGOLTrainer(pipe, args, dataset, proxy_dataset=proxy)
    first = trainer.threshold.value
    trainer.train()
    assert calls == [pipe, pipe]
    assert trainer.threshold.value > first


def test_ratings_full_of_ties_train_and_say_that_the_threshold_moved(config, caplog):
    ratings = [1] * 20 + [2, 3, 3, 4, 5, 5, 1, 1, 1, 1, 2, 5]
    data = scored_dataset(32).remove_columns("score").add_column("score", ratings)
    caplog.set_level(logging.WARNING)
    trainer = TGOLTrainer(stable_diffusion(), config(), data)
    assert "would make every sample positive. τ was moved to 1.5" in caplog.text
    assert (trainer.threshold.num_positive, trainer.threshold.num_negative) == (8, 24)
    trainer.train()


@pytest.mark.parametrize(
    ("options", "proxy", "message"),
    [
        ({"threshold": 50.0}, None, "leaves the positive side empty"),
        ({"threshold": 0.0}, datasets.Dataset.from_dict({"score": [1.0, 2.0]}), "both set τ"),
        (
            {"threshold_strategy": "oracle", "reference_samples": True},
            datasets.Dataset.from_dict({"score": [1.0, 2.0]}),
            "both name samples of the reference",
        ),
        (
            {"score_columns": ["score", "score_b"]},
            lambda pipeline: datasets.Dataset.from_dict({"score": [1.0, 2.0]}).to_iterable_dataset(),
            "proxy_dataset: `score_columns` are standardised",
        ),
        ({"threshold_update": "epoch"}, None, "would give the same τ each time"),
        ({"resolution": 17}, None, "not a multiple of 2"),
        ({"per_device_train_batch_size": 64}, None, "do not fill one batch of 64"),
    ],
)
def test_arguments_that_would_train_something_else_are_refused(config, dataset, options, proxy, message):
    with pytest.raises((ValueError, ThresholdError), match=message):
        rows = dataset.add_column("score_b", dataset["score"])
        TGOLTrainer(stable_diffusion(), config(**options), rows, proxy_dataset=proxy).train()


def test_an_unsupported_pipeline_is_told_what_is_supported(config, dataset):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(
        ValueError, match=r"is not supported\. It takes no `prompt`.*Supported pipelines: .*StableDiffusion"
    ):
        TGOLTrainer(DDPMPipeline(unet, DDPMScheduler()), config(), dataset)


def test_an_unsupported_pipeline_is_refused_before_its_weights_are_read(config, dataset, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "PRXPipeline", "transformer": ["x", "y"]}')
    with pytest.raises(ValueError, match=r"PRXPipeline is not supported\. Its transformer takes no adapters"):
        TGOLTrainer(str(tmp_path), config(), dataset)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            lambda: stable_diffusion().unet,
            TypeError,
            "`model` is a UNet2DConditionModel; it must be .*whole",
        ),
        (lambda: "no/such/folder", FileNotFoundError, "does not exist, and it is not a Hub id"),
        (lambda: str(Path(__file__).parent), FileNotFoundError, "holds no model_index.json.*from_single_file"),
    ],
    ids=["denoiser alone", "no folder", "another folder"],
)
def test_what_is_no_pipeline_says_what_is_wanted(config, dataset, model, error, message):
    with pytest.raises(error, match=message):
        TGOLTrainer(model(), config(), dataset)


def test_more_processes_than_this_one_sees_is_an_error_that_names_use_cpu(config, dataset, monkeypatch):
    args = config()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--use_cpu true"):
        TGOLTrainer(stable_diffusion(), args, dataset)


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"fp16": True}, {}, "`fp16=True` has no effect on a CPU"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "'bf16', and the run's settings for none. Add `--bf16 true`"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO stage 0 is not supported. Use stage 2"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "`fsdp` is of version 1.*Use version 2"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "`fsdp` is of version 1.*Use version 2"),
        ({"fsdp": True}, {}, "there is one. Leave it out"),
    ],
)
def test_a_precision_and_shards_that_would_not_be_what_was_asked_for_are_refused(
    config, dataset, monkeypatch, settings, environment, message
):
    args = config(**settings)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        TGOLTrainer(stable_diffusion(), args, dataset)


ZERO2 = {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}


@pytest.mark.parametrize(
    ("settings", "deepspeed", "message"),
    [
        ({}, {"zero_optimization": {"stage": 3}}, "ZeRO stage 3 is not supported. Use stage 2"),
        ({}, {"zero_optimization": {**ZERO2, "offload_optimizer": {"device": "cpu"}}}, "`offload_optimizer` is not"),
        ({}, {"zero_optimization": ZERO2, "scheduler": {"type": "WarmupLR"}}, "name a `scheduler`"),
        ({}, {"zero_optimization": ZERO2, "bf16": {"enabled": True}}, "16 bits of `bf16`"),
        ({"bf16": True}, {"zero_optimization": ZERO2}, "16 bits of `bf16`"),
        ({"optim": "adafactor"}, {"zero_optimization": ZERO2}, "`optim` is 'adafactor'"),
        ({"on_nan": "skip"}, {"zero_optimization": ZERO2}, "`on_nan='skip'` comes too late"),
    ],
)
def test_deepspeed_with_what_was_not_seen_to_train_the_same_is_refused(
    config, monkeypatch, settings, deepspeed, message
):
    args = config(**settings)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=deepspeed)
    with pytest.raises(ValueError, match=message):
        check_processes(args)


def test_fsdp_that_accelerate_leaves_out_is_an_error(config, dataset, monkeypatch):
    """As on several CPUs, where it runs DistributedDataParallel instead."""
    monkeypatch.setattr("tgol_trainer.trainer.check_processes", lambda args: None)
    args = config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`fsdp` was asked for and does not run"):
        TGOLTrainer(stable_diffusion(), args, dataset)


def test_deepspeed_that_accelerate_leaves_out_is_an_error(config, monkeypatch):
    args = config()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_sharding(args, fsdp=False, deepspeed=True)
    with pytest.raises(ValueError, match="`deepspeed` was asked for and does not run"):
        check_sharding(args, fsdp=False, deepspeed=False)


def test_long_prompts_and_prompts_of_other_programs_are_counted(config, dataset, caplog, monkeypatch):
    long = dataset.map(
        lambda row, index: {
            "prompt": {3: "word " * 100, 4: "a (cat:1.3)", 5: "a <lora:x:1> (dog:1.1)"}.get(index, row["prompt"])
        },
        with_indices=True,
    )
    caplog.set_level(logging.WARNING)
    family = TGOLTrainer(stable_diffusion(), config(), long).family
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="diffusers")  # commands in other tests make it quieter
    family.encode_prompts(["word " * 100])
    assert "following part of your input was truncated" not in caplog.text  # counted, instead of a line for each
    family.pipeline.encode_prompt("word " * 100, "cpu", 1, False)
    assert "following part of your input was truncated" in caplog.text
    assert "1 of 8 different prompts are longer than the text encoder's 77 tokens" in caplog.text
    assert "2 of 8 different prompts hold instructions for other programs" in caplog.text
    assert "a weight such as (word:1.3) in 2, 'a (cat:1.3)'" in caplog.text
    assert "a network such as <lora:name:0.8> in 1, 'a <lora:x:1> (dog:1.1)'" in caplog.text


# ---- Streams ----


def test_a_stream_trains_with_the_threshold_of_a_first_pass_over_its_scores(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(), dataset.to_iterable_dataset(num_shards=2))
    assert trainer.threshold.value == np.median(dataset["score"])
    trainer.train()
    line = first_line(trainer)
    assert line["loss"] == pytest.approx(line["weights/mean"] * math.log(2), rel=1e-6)


def test_a_stream_whose_threshold_is_estimated_at_each_pass_is_labelled_with_the_new_one(config, dataset, monkeypatch):
    """Every time the stream is read, its scores are 100 higher: first for τ, then in training, and so on."""
    passes = []

    def rows():
        passes.append(len(passes))
        for row in dataset:
            yield {**row, "score": row["score"] + 100 * len(passes)}

    stream = datasets.IterableDataset.from_generator(rows, features=dataset.features)
    trainer = TGOLTrainer(stable_diffusion(), config(max_steps=8, threshold_update="epoch"), stream)
    met, compute = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        met.extend((inputs["score"] - inputs["margin"]).tolist())
        return compute(model, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    trainer.train()
    median = np.median(dataset["score"])
    assert met[:32] == pytest.approx([median + 100] * 32, abs=1e-3)  # 32 rows are 4 steps
    assert met[32:] == pytest.approx([median + 300] * 32, abs=1e-3)


def test_a_stream_with_a_fixed_threshold_is_not_read_beforehand(config):
    def rows():
        raise RuntimeError("read before training")
        yield

    features = datasets.Features(
        {"prompt": datasets.Value("string"), "image": datasets.Image(), "score": datasets.Value("float64")}
    )
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    trainer = TGOLTrainer(stable_diffusion(), config(threshold=0.0), stream)
    assert trainer.threshold.source == "fixed"


def test_a_stream_of_two_passes_resumes_where_it_stopped(config, dataset):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = TGOLTrainer(stable_diffusion(), config(**settings), dataset.to_iterable_dataset())
    whole.train()
    resumed = TGOLTrainer(stable_diffusion(), config(**settings), dataset.to_iterable_dataset())
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert losses(resumed) == losses(whole)


def test_the_state_file_holds_threshold_and_normalisation_as_json(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(score_normalization="zscore"), dataset)
    trainer.save_model()
    state = json.loads((Path(trainer.args.output_dir) / "tgol_state.json").read_text())
    assert state["threshold"]["value"] == trainer.threshold.value
    assert state["normalization"] == {
        "method": "zscore",
        "center": trainer.labeler.normalization.center,
        "scale": trainer.labeler.normalization.scale,
    }
