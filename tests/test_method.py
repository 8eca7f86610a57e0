"""Loss types, threshold strategies, weights and groups through the trainer, on a tiny pipeline."""

import logging
import math
import re

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.conftest import scored_dataset
from tests.tiny import amused, stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.config.method import LossType
from tgol_trainer.draws import EVALUATION_STEP
from tgol_trainer.thresholds import ThresholdError, estimate_group_thresholds, group_ids

LORA = LoraConfig(r=4, lora_alpha=8)
LOSS_TYPES = LossType.__args__


def first_line(trainer):
    return next(line for line in trainer.state.log_history if "loss" in line)


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def grouped():
    """64 rows, 8 of each of 8 prompts, whose scores differ more between prompts than within."""
    rows = scored_dataset(num_rows=64, num_prompts=8)
    rng = np.random.default_rng(0)
    scores = np.tile(rng.normal(size=8), 8) + 0.3 * rng.normal(size=64)
    return rows.remove_columns("score").add_column("score", scores)


def trained(config, rows, **settings):
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), rows, peft_config=LORA)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def prompt_thresholds(grouped):
    numbers, _ = group_ids(grouped["prompt"])
    return estimate_group_thresholds(grouped["score"], numbers).values[numbers]


# ---- Losses ----


def expected_first_loss(name, scores, reference_error):
    """At a log-ratio of zero, over one batch of all rows, τ the median, β = 1."""
    margin = scores - np.median(scores)
    if name == "tgol":
        return (1 + 5 * np.abs(margin)).mean() * math.log(2)
    if name == "tgol_pairs":  # eight prompts in turn, eight rows each
        differences = [abs(scores[i] - scores[j]) for i in range(64) for j in range(i % 8, 64, 8) if i != j]
        return (1 + 5 * np.mean(differences)) * math.log(2)
    if name == "kto":
        return 0.5
    if name == "dpo":
        return math.log(2)
    if name == "tgol_anchored":
        return 0.0
    if name == "sft":
        return (reference_error * (margin >= 0)).mean()
    return reference_error.mean()  # csft, nft


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_first_loss_is_what_zero_log_ratios_give(config, grouped, loss_type):
    settings = {"max_steps": 1, "per_device_train_batch_size": 64, "loss_type": loss_type}
    if loss_type in ("dpo", "tgol_pairs"):
        settings["group_size"] = 8
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), grouped, peft_config=LORA)
    with torch.no_grad():
        batch = trainer.collator([trainer.train_dataset[row] for row in range(64)])
        _, record = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    reference_error = record[:, 5].double().numpy()  # the policy's, which is still the reference
    trainer.train()
    expected = expected_first_loss(loss_type, np.asarray(grouped["score"]), reference_error)
    assert first_line(trainer)["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_eight_steps_lower_every_loss_on_its_own_batch(config, grouped, loss_type):
    """Error of the reference for the supervised losses starts at a finite value; the others at their zero value."""
    settings = {"max_steps": 8, "per_device_train_batch_size": 16, "loss_type": loss_type}
    if loss_type in ("dpo", "tgol_pairs"):
        settings["group_size"] = 8
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), grouped.select(range(16)), peft_config=LORA)
    batch = trainer.collator([trainer.train_dataset[row] for row in range(16)])
    trainer.model.train()

    def value():
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, batch).item()

    before = value()
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(8):
        optimizer.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        optimizer.step()
    assert value() < before


def test_nft_mixes_predictions_of_masked_models_as_well(config, grouped):
    args = config(max_steps=1, loss_type="nft")
    trainer = TGOLTrainer(amused(), args, grouped, peft_config=LORA)
    trainer.train()
    assert math.isfinite(first_line(trainer)["loss"])


def test_the_anchored_loss_of_masked_models_is_linear_in_the_logits_for_rows_at_the_threshold_and_beside_it(
    config, grouped
):
    """With p the reference's probabilities and y the true code, 2⟨e, D⟩ becomes the mean of (p - y)·Δlogits."""
    args = config(loss_type="tgol_anchored", anchor=0.25, learning_rate=1e-2, max_steps=2)
    trainer = TGOLTrainer(amused(), args, grouped, peft_config=LORA)
    trainer.train()
    batch = trainer.collator([trainer.train_dataset[row] for row in range(8)])
    with torch.no_grad():
        _, record = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
        draw, conditioning = trainer.draws(batch, EVALUATION_STEP)
        new = trainer.family.predict(trainer.model, draw, conditioning)
        with trainer.reference_policy() as reference:
            old = trainer.family.predict(reference, draw, conditioning)
    truth = torch.nn.functional.one_hot(draw.target, old.shape[1]).movedim(-1, 1)
    moved = ((old.softmax(1) - truth) * (new - old)).sum(1)
    linear = torch.stack([row[mask].mean() for row, mask in zip(moved, draw.mask, strict=True)])
    size, change = record[:, 6].sqrt(), record[:, 7]
    expected = (batch["margin"] / trainer.labeler.score_std * linear + 0.25 * change) / size
    assert change.min() > 1e-6
    torch.testing.assert_close(record[:, 0], expected, rtol=1e-3, atol=1e-6)


def test_csft_writes_the_label_behind_the_prompt(config, grouped, monkeypatch):
    trainer = TGOLTrainer(stable_diffusion(), config(loss_type="csft"), grouped, peft_config=LORA)
    seen = []
    condition = trainer.family.condition
    monkeypatch.setattr(
        trainer.family, "condition", lambda prompts, *rest: seen.extend(prompts) or condition(prompts, *rest)
    )
    rows = range(8)
    trainer.compute_loss(trainer.model.train(), trainer.collator([trainer.train_dataset[row] for row in rows]))
    median = np.median(grouped["score"])
    for row in rows:
        suffix = ", high quality" if grouped["score"][row] >= median else ", low quality"
        assert seen[row] == grouped["prompt"][row] + suffix


# ---- Thresholds ----


def test_thresholds_of_prompts_label_rows_and_evaluation_rows_alike(config, grouped, prompt_thresholds):
    unseen = scored_dataset(num_rows=8, num_prompts=8, seed=5).map(lambda row: {"prompt": f"unseen {row['prompt']}"})
    trainer = TGOLTrainer(
        stable_diffusion(),
        config(threshold_strategy="group"),
        grouped,
        {"seen": grouped.select(range(10, 20)), "unseen": unseen},
        peft_config=LORA,
    )
    margin = trainer.collator([trainer.train_dataset[row] for row in range(64)])["margin"].numpy()
    np.testing.assert_allclose(margin, np.asarray(grouped["score"]) - prompt_thresholds, rtol=1e-5, atol=1e-6)
    assert trainer.threshold.num_positive == (np.asarray(grouped["score"]) >= prompt_thresholds).sum()
    seen = trainer.collator(list(trainer.eval_dataset["seen"]))["margin"].numpy()
    np.testing.assert_allclose(seen, margin[10:20], rtol=1e-6)
    other = trainer.collator(list(trainer.eval_dataset["unseen"]))["margin"].numpy()
    np.testing.assert_allclose(other, np.asarray(unseen["score"]) - np.median(grouped["score"]), rtol=1e-5)


def test_a_group_column_other_than_the_prompt_is_read(config, grouped):
    domains = [f"domain {index % 2}" for index in range(64)]
    rows = grouped.add_column("domain", domains)
    trainer = TGOLTrainer(
        stable_diffusion(), config(threshold_strategy="group", group_column="domain"), rows, peft_config=LORA
    )
    assert set(trainer.labeler.by_group) == {"domain 0", "domain 1"}


def test_oracle_thresholds_come_from_the_prompts_of_a_proxy_set(config, grouped):
    proxy = grouped.select(range(64)).map(lambda row: {"score": row["score"] + 0.1})
    trainer = TGOLTrainer(
        stable_diffusion(),
        config(threshold_strategy="oracle", oracle_beta=1e6),
        grouped.select(range(32)),
        proxy_dataset=proxy,
        peft_config=LORA,
    )
    scores, prompts = np.asarray(proxy["score"]), np.asarray(proxy["prompt"])
    for row in range(32):
        own = scores[prompts == grouped["prompt"][row]].mean()
        assert trainer.labeler.rows[row] == pytest.approx(own, abs=1e-3)
        assert trainer.train_dataset[row]["margin"] == pytest.approx(grouped["score"][row] - own, abs=1e-3)


@pytest.mark.parametrize("loss_type", ["nft", "tgol_anchored"])
def test_a_fixed_threshold_on_a_stream_still_reads_the_scores_that_the_loss_needs(config, grouped, loss_type):
    settings = {"loss_type": loss_type, "threshold": 0.0, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), grouped.to_iterable_dataset(), peft_config=LORA)
    trainer.train()
    scores = np.asarray(grouped["score"])
    assert trainer.labeler.score_std == pytest.approx(scores.std())


@pytest.mark.parametrize("loss_type", ["dpo", "tgol_pairs"])
def test_groups_without_two_different_scores_are_refused(config, grouped, loss_type):
    """They would give a loss of 0 for ever, or train on nothing but labels at random."""
    rows = grouped.remove_columns("prompt").add_column("prompt", [f"prompt {index // 2}" for index in range(64)])
    rows = rows.remove_columns("score").add_column("score", [float(index // 2) for index in range(64)])
    with pytest.raises(ValueError, match="none of the 32 groups"):
        TGOLTrainer(stable_diffusion(), config(group_size=2, loss_type=loss_type), rows, peft_config=LORA)


def test_the_sampler_is_told_each_epoch_by_the_trainer_itself(config, grouped):
    trainer = TGOLTrainer(stable_diffusion(), config(loss_type="dpo", group_size=4), grouped, peft_config=LORA)
    loader = trainer.get_train_dataloader()
    trainer._on_epoch_begin(1.25, True)
    assert loader.batch_sampler.sampler.epoch == 1


def test_a_proxy_set_of_the_moved_reference_labels_training_and_evaluation_and_is_made_again_on_resume(
    config, grouped, tmp_path
):
    """The scores say how far the network that the pipeline holds lies from the first one: 0 at the first call."""
    weights = []

    def proxy(pipeline):
        active = [module for module in pipeline.unet.modules() if getattr(module, "lora_B", None)]
        disabled = active[0].disable_adapters
        name = active[0].active_adapters[0]
        size = 0.0 if disabled else sum(module.lora_B[name].weight.abs().sum().item() for module in active)
        weights.append(size)
        return grouped.map(lambda row: {"score": row["score"] + 0.2 * size / (1 + size)})

    settings = {"reference_update": "epoch", "threshold_update": "epoch", "threshold_strategy": "group"}
    settings |= {"max_steps": 14, "save_strategy": "steps", "save_steps": 12, "learning_rate": 1e-3}
    settings |= {"output_dir": str(tmp_path)}

    def trainer_of():
        train, evaluation = grouped.select(range(64)), grouped.select(range(8))
        return TGOLTrainer(stable_diffusion(), config(**settings), train, evaluation, proxy, peft_config=LORA)

    whole = trainer_of()
    whole.train()
    assert weights[0] == 0 < weights[1]
    np.testing.assert_allclose(whole.eval_dataset.labels.margin, whole.train_dataset.labels.margin[:8])
    again = trainer_of()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert weights[2:] == [0, pytest.approx(weights[1], rel=1e-6)]
    np.testing.assert_allclose(again.labeler.rows, whole.labeler.rows, rtol=1e-6)
    assert losses(again)[-2:] == losses(whole)[-2:]


def test_an_oracle_without_samples_of_the_reference_is_refused(config, grouped):
    with pytest.raises(ValueError, match="reference_samples=True"):
        TGOLTrainer(stable_diffusion(), config(threshold_strategy="oracle"), grouped)


def test_a_running_threshold_follows_the_stream(config, grouped):
    """Window of 8 after a first pass over 8 rows: row i meets the median of the 8 scores that end with it."""
    stream = grouped.to_iterable_dataset()
    settings = {"threshold_strategy": "running", "threshold_window": 8, "max_threshold_samples": 8, "max_steps": 2}
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), stream, peft_config=LORA)
    scores = np.asarray(grouped["score"])
    history = np.concatenate([scores[:8], scores])
    for row, sample in enumerate(trainer.train_dataset):
        assert sample["margin"] == pytest.approx(scores[row] - np.median(history[row + 1 : row + 9]), rel=1e-5)
    trainer.train()


def test_the_dead_zone_drops_rows_near_the_threshold_before_training(config, grouped):
    trainer = TGOLTrainer(stable_diffusion(), config(dead_zone=0.5), grouped, peft_config=LORA)
    scores = np.asarray(grouped["score"])
    far = np.flatnonzero(np.abs(scores - np.median(scores)) >= 0.5)
    assert [row["row_id"] for row in trainer.train_dataset] == far.tolist()
    assert trainer.threshold.num_scores == far.size < 64
    with pytest.raises(ThresholdError, match="dead zone"):
        TGOLTrainer(stable_diffusion(), config(dead_zone=100.0), grouped, peft_config=LORA)


def test_normalised_weights_have_mean_one_and_class_weights_multiply(config, grouped):
    settings = {"normalize_weights": True, "desirable_weight": 2.0, "undesirable_weight": 0.5, "max_steps": 1}
    trainer = trained(config, grouped, per_device_train_batch_size=64, **settings)
    scores = np.asarray(grouped["score"])
    margin = scores - np.median(scores)
    weights = (1 + 5 * np.abs(margin)) * np.where(margin >= 0, 2.0, 0.5)
    line = first_line(trainer)
    assert line["weights/mean"] == pytest.approx(1.0, rel=1e-5)
    assert line["weights/max"] == pytest.approx(weights.max() / weights.mean(), rel=1e-5)
    rows, trainer.train_dataset.labels = trainer.train_dataset.labels, None
    again = trainer.labeler(trainer.train_dataset.scores)  # as a resumed run labels them
    assert np.array_equal(again.weight, rows.weight)


def test_a_mean_of_weights_is_refused_where_images_are_compared(config):
    """The weights of s - τ, which it would divide by, are not those of the differences within a batch."""
    with pytest.raises(ValueError, match="known only in their batch"):
        config(normalize_weights=True, group_size=2, loss_type="tgol_pairs")


def test_normalised_weights_of_a_stream_are_divided_by_their_mean_over_its_rows(config, grouped):
    """Also with a fixed threshold or a proxy set, which alone would not need the scores."""
    scores, settings = np.asarray(grouped["score"]), {"normalize_weights": True, "max_steps": 1}
    for fixed, proxy in ((0.5, None), (None, datasets.Dataset.from_dict({"score": [0.0, 0.5, 1.0]}))):
        args, stream = config(threshold=fixed, **settings), grouped.to_iterable_dataset()
        trainer = TGOLTrainer(stable_diffusion(), args, stream, proxy_dataset=proxy, peft_config=LORA)
        assert trainer.labeler.weighting.divisor == pytest.approx((1 + 5 * np.abs(scores - 0.5)).mean())


@pytest.mark.parametrize("source", ["fixed", "proxy"])
def test_a_limit_of_scores_read_is_refused_where_none_are_read(config, grouped, source):
    proxy = datasets.Dataset.from_dict({"score": [0.0, 1.0]}) if source == "proxy" else None
    args = config(max_threshold_samples=8, threshold=0.0 if source == "fixed" else None)
    with pytest.raises(ValueError, match="there is none: leave it out"):
        TGOLTrainer(stable_diffusion(), args, grouped.to_iterable_dataset(), proxy_dataset=proxy)


@pytest.mark.parametrize("tau", [0.3, 0.7])  # float32 lies above the first and below the second
def test_advice_in_training_counts_labels_as_training_does(config, grouped, caplog, tau):
    """Half of each prompt's rows lie below τ; the others lie at it, and for every second prompt above it."""
    above = np.where(np.arange(64) % 2, 0.1, 0.0)
    scores = tau + np.where(np.arange(64) // 8 % 2, above, -0.1)
    rows = grouped.remove_columns("score").add_column("score", scores)
    caplog.set_level(logging.WARNING)
    trainer = TGOLTrainer(stable_diffusion(), config(threshold=tau), rows, peft_config=LORA)
    assert trainer.threshold.num_positive == 32
    assert "nothing contrasts" not in caplog.text
    assert re.findall("--threshold ([0-9.]+)", caplog.text) == [f"{tau + 0.05:.2f}"]


# ---- Groups ----


def loss_of_a_moved_policy(args, dataset, rows):
    """Loss of some rows at random weights, their log-ratios from the logged errors at T = 0.001, and their scores."""
    trainer = TGOLTrainer(stable_diffusion(), args, dataset, peft_config=LORA)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = trainer.collator([trainer.train_dataset[row] for row in rows])
    loss, record = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    return loss, -(record[:, 5] - record[:, 6]).double().numpy() / 0.001, np.asarray(dataset["score"])[rows]


def test_pairs_take_each_other_sample_of_the_group_for_threshold(config, grouped):
    """A group of eight and a row that is alone, everything again in loops: Eq. 10 of each difference, then means."""
    settings = {"loss_type": "tgol_pairs", "group_size": 8}
    rows = [*range(0, 64, 8), 1]
    loss, log_ratio, scores = loss_of_a_moved_policy(config(**settings), grouped, rows)
    margin = scores - np.median(grouped["score"])

    def eq_10(ratio: float, distance: float) -> float:
        return (1 + 5 * abs(distance)) * math.log1p(math.exp(-ratio if distance >= 0 else ratio))

    expected = [
        np.mean([eq_10(log_ratio[row] - log_ratio[i], scores[row] - scores[i]) for i in range(8) if i != row])
        for row in range(8)
    ]
    assert loss.item() == pytest.approx(np.mean([*expected, eq_10(log_ratio[8], margin[8])]), rel=1e-3)


def test_batches_hold_whole_groups_which_share_noise_when_asked(config, grouped, monkeypatch):
    settings = {"loss_type": "dpo", "group_size": 8, "share_group_noise": True, "max_steps": 8}
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), grouped, peft_config=LORA)
    draws = []
    draw = trainer.family.likelihood.draw
    monkeypatch.setattr(trainer.family.likelihood, "draw", lambda *args: draws.append(draw(*args)) or draws[-1])
    batches = list(trainer.get_train_dataloader())
    assert all(len(set(batch["group"].tolist())) == 1 for batch in batches)
    trainer.compute_loss(trainer.model.train(), batches[0])
    noise, times = draws[-1].target, draws[-1].timesteps
    assert len(set(times.tolist())) == 1
    assert (noise == noise[:1]).all()


def test_training_in_groups_resumes_as_if_it_had_never_stopped(config, grouped, tmp_path):
    settings = {"loss_type": "dpo", "group_size": 4, "max_steps": 12, "save_strategy": "steps", "save_steps": 5}
    whole = trained(config, grouped, output_dir=str(tmp_path / "a"), **settings)
    again = TGOLTrainer(
        stable_diffusion(), config(output_dir=str(tmp_path / "a"), **settings), grouped, peft_config=LORA
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert losses(again)[-7:] == losses(whole)[-7:]


@pytest.mark.parametrize("settings", [{"loss_type": "dpo", "group_size": 4}, {"threshold_strategy": "group"}])
def test_groups_need_a_dataset_with_a_length(config, grouped, settings):
    with pytest.raises(ValueError, match="streaming=True"):
        TGOLTrainer(stable_diffusion(), config(**settings), grouped.to_iterable_dataset())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "dpo"}, "group_size"),
        ({"group_size": 3}, "must divide"),
        ({"loss_type": "tgol_pairs"}, "group_size"),
        ({"threshold_strategy": "group", "threshold": 0.1}, "leave one out"),
        ({"csft_suffixes": ["one"]}, "two texts"),
        ({"oracle_beta": -1.0}, "larger than 0"),
        ({"threshold_strategy": "running", "threshold_update": "epoch"}, "follows the scores"),
        (
            {"threshold_strategy": "group", "threshold_update": "epoch", "dataloader_persistent_workers": True}
            | {"dataloader_num_workers": 1},
            "labels of the first epoch",
        ),
    ],
)
def test_contradictions_are_refused_with_the_remedy(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


def test_a_checkpoint_names_no_prompt(config, grouped, tmp_path):
    trainer = trained(config, grouped, threshold_strategy="group", output_dir=str(tmp_path))
    trainer.save_model()
    text = (tmp_path / "tgol_state.json").read_text()
    assert "prompt number" not in text
    assert '"row_thresholds_blake2b"' in text


def test_other_scores_at_resume_are_told(config, grouped, tmp_path, caplog):
    settings = {"threshold_strategy": "group", "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    trained(config, grouped, **settings)
    changed = grouped.map(lambda row, index: {"score": row["score"] + (index % 3)}, with_indices=True)
    again = TGOLTrainer(
        stable_diffusion(),
        config(**settings, allow_changed=["all"]),
        datasets.Dataset.from_dict(changed[:]),
        peft_config=LORA,
    )
    with caplog.at_level("WARNING", logger="tgol_trainer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "have other thresholds than the checkpoint was trained with" in caplog.text


@pytest.mark.parametrize(
    ("settings", "there", "absent"),
    [
        ({}, ["threshold-guided optimization (TGO", "`1 + c·abs(score − τ)` with c = 5"], ["an alternative to"]),
        (
            {"loss_type": "tgol_anchored"},
            ["threshold-guided optimization (TGO", "an anchored form of TGO by tgol_trainer", "No pairs of samples"],
            ["with c =", "an alternative to"],
        ),
        ({"loss_type": "kto"}, ["the loss `kto`, an alternative"], ["No pairs of samples"]),
        (
            {"loss_type": "tgol_pairs", "group_size": 8},
            ["threshold-guided optimization (TGO", "samples are compared in pairs"],
            ["No pairs of samples", "an alternative to"],
        ),
        (
            {"threshold_strategy": "group", "weight_form": "abs", "normalize_weights": True},
            [
                "source `group`",
                "| `threshold_strategy` | group |",
                "`num_groups`: 8",
                "`abs(score − τ), over their mean`",
            ],
            ["with c ="],
        ),
    ],
)
def test_the_card_says_which_loss_threshold_and_weights_were_used(config, grouped, tmp_path, settings, there, absent):
    trainer = TGOLTrainer(stable_diffusion(), config(output_dir=str(tmp_path), **settings), grouped, peft_config=LORA)
    trainer.create_model_card()
    text = " ".join((tmp_path / "README.md").read_text().replace("of tgol_trainer", "").split()).replace(" ,", ",")
    for words in there:
        assert words in text
    for words in absent:
        assert words not in text
