"""The value baseline: out of fold, calibrated by noise, without a change of the mean gradient, exact over a resume."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.tiny import amused, stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.draws import EVALUATION_STEP
from tgol_trainer.likelihoods import Draw
from tgol_trainer.value_baseline import FOLDS, ValueRegression, folds_of, pooled

LORA = LoraConfig(r=4, lora_alpha=8)


def rows_of(count=400, seed=0):
    """Latents (N, 2, 3, 3), whose grid of 8 repeats its fields, and an advantage that is half linear in them."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 2, 3, 3, generator=generator)
    linear = latents.flatten(1) @ torch.randn(18, generator=generator)
    noise = torch.randn(count, generator=generator)
    return latents, linear / linear.std() + noise / noise.std(), torch.arange(count)


def test_features_are_means_over_an_8_by_8_grid_and_a_coarser_one_where_channels_are_many():
    latents = torch.arange(4 * 16 * 16, dtype=torch.float32).reshape(1, 4, 16, 16)
    expected = [
        latents[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for c in range(4) for i, j in np.ndindex(8, 8)
    ]
    torch.testing.assert_close(pooled(latents)[0], torch.stack(expected))
    assert pooled(torch.zeros(2, 128, 8, 8)).shape == (2, 128 * 16)
    video = torch.stack([latents, latents + 2], 2)  # the mean of two frames
    torch.testing.assert_close(pooled(video), pooled(latents) + 1)


def test_a_rows_value_does_not_change_with_its_own_score_but_with_those_of_other_folds():
    latents, advantage, ids = rows_of()
    before = ValueRegression.fit(pooled(latents), advantage, ids)
    own = folds_of(ids) == 2
    changed = advantage.clone()
    changed[own] = changed[own].flip(0)  # the mean stays
    after = ValueRegression.fit(pooled(latents), changed, ids)
    torch.testing.assert_close(before.predict(latents, ids)[own], after.predict(latents, ids)[own])
    assert (before.predict(latents, ids) - after.predict(latents, ids))[~own].abs().max() > 0.01
    assert torch.bincount(folds_of(ids)).min() > 400 / FOLDS / 2


def test_values_are_those_of_kernel_ridge_regression_on_the_other_folds():
    """By the textbook: k(x, X)(K + rI)⁻¹y over the rows of the other folds, with the r of the least error."""
    latents, advantage, ids = rows_of(150)
    found = ValueRegression.fit(pooled(latents), advantage, ids)
    inputs = pooled(latents).double()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0, unbiased=False)
    kernel = torch.exp(-0.3 * ((inputs[:, None] - inputs[None]) ** 2).mean(2))
    target, folds = (advantage - advantage.mean()).double(), folds_of(ids)
    tried = []
    for noise in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
        values = torch.zeros(150, dtype=torch.float64)
        for fold in range(FOLDS):
            seen = folds != fold
            weights = torch.linalg.solve(kernel[seen][:, seen] + noise * torch.eye(int(seen.sum())), target[seen])
            values[~seen] = kernel[~seen][:, seen] @ weights
        tried.append((((values - target) ** 2).mean().item(), values))
    missed, expected = min(tried, key=lambda each: each[0])
    torch.testing.assert_close(found.predict(latents, ids), expected.float(), rtol=1e-3, atol=1e-3)
    assert found.explained == pytest.approx(1 - missed / target.var(unbiased=False).item(), abs=1e-3)


def test_the_share_explained_is_large_where_latents_tell_the_score_and_about_zero_for_noise_with_few_landmarks(
    monkeypatch,
):
    monkeypatch.setattr("tgol_trainer.value_baseline.MAX_LANDMARKS", 300)
    latents, advantage, ids = rows_of(1000)  # an oracle explains half
    found = ValueRegression.fit(pooled(latents), advantage, ids)
    assert found.landmarks.shape == (250, 128) and 0.35 < found.explained < 0.55
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(9))
    assert abs(ValueRegression.fit(pooled(latents), noise, ids).explained) < 0.05


def test_the_slope_falls_with_the_noise_as_the_advantage_does_and_lies_from_0_to_2():
    latents, advantage, ids = rows_of()
    regression = ValueRegression.fit(pooled(latents), advantage, ids)
    predicted = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    level = torch.arange(2000) / 2000
    assert regression.calibrate(predicted, (1.6 - 2 * level) * predicted, level) == pytest.approx(1.0, abs=0.02)
    draw = Draw(latents, torch.zeros(3), latents, noise_level=torch.tensor([0.0, 0.5, 1.0]))
    regression.slopes[0] += 0.5  # 2.1, 1.1 and 0.1
    expected = torch.tensor([2.0, 1.1, 0.1]) * regression.predict(latents[:3], ids[:3])
    torch.testing.assert_close(regression(latents[:3], ids[:3], draw), expected, rtol=1e-2, atol=1e-3)


def test_a_row_that_is_not_finite_breaks_neither_the_fit_nor_the_values_of_other_rows():
    latents, advantage, ids = rows_of()
    latents[0], latents[1, 0, 0, 0], latents[2, 0, 0, 0] = float("nan"), float("inf"), 3e38
    found = ValueRegression.fit(pooled(latents), advantage, ids)
    assert torch.isfinite(found.predict(latents, ids)).all()


def test_noise_left_in_the_estimate_counts_for_nothing():
    latents, advantage, ids = rows_of()
    regression = ValueRegression.fit(pooled(latents), advantage, ids)
    assert regression.predict(100 * latents, ids).abs().max() < 1e-6 < regression.predict(latents, ids).abs().max()


# ---- Through the trainer ----


def anchored(config, rows, pipeline=stable_diffusion, **settings):
    args = config(loss_type="tgol_anchored", value_baseline=True, **settings)
    return TGOLTrainer(pipeline(), args, rows, peft_config=LORA)


def test_the_loss_in_training_counts_the_advantage_from_the_value_and_evaluation_does_not(config, dataset):
    """Both from the predictions of policy and reference themselves, after two steps that part them."""
    trainer = anchored(config, dataset, anchor=0.25, learning_rate=1e-2, max_steps=2)
    trainer.train()
    regression = trainer._value.regression
    regression.scale *= 100  # a random network's estimates are far from all rows, and scores at random
    regression.slopes = torch.tensor([1.0, -0.5, 0.0])
    batch, likelihood = trainer.collator([trainer.train_dataset[row] for row in range(8)]), trainer.family.likelihood
    for training, step in ((True, trainer.state.global_step), (False, EVALUATION_STEP)):
        with torch.no_grad():
            _, record = trainer.compute_loss(trainer.model.train(training), batch, return_outputs=True)
            draw, conditioning = trainer.draws(batch, step)
            new = trainer.family.predict(trainer.model, draw, conditioning)
            with trainer.reference_policy() as reference:
                old = trainer.family.predict(reference, draw, conditioning)
        alpha = likelihood.alphas_cumprod[draw.timesteps].view(-1, 1, 1, 1)
        clean = (draw.inputs - (1 - alpha).sqrt() * old) / alpha.sqrt()
        value = regression(clean, batch["row_id"], draw)
        assert value.abs().max() > 0.01
        counted = batch["margin"] / trainer.labeler.score_std - (value if training else 0)
        mistake, change = old - draw.target, new - old
        linear, moved = 2 * (mistake * change).flatten(1).mean(1), change.square().flatten(1).mean(1)
        expected = (counted * linear + 0.25 * moved) / mistake.square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(record[:, 0], expected, rtol=1e-3, atol=1e-6)


def test_a_baseline_is_fitted_to_images_of_several_sizes_without_a_cache(config, dataset):
    rows = dataset.map(
        lambda row, index: {"image": row["image"].resize(((24, 12), (16, 16))[index % 2])}, with_indices=True
    )
    trainer = anchored(config, rows, cache=False, aspect_buckets=True, max_steps=1)
    trainer.train()
    assert len({trainer.train_dataset[row]["resolution"] for row in range(len(rows))}) == 2
    assert trainer._value.regression.mean.shape == (4 * 64,)


def test_a_stream_and_a_model_of_tokens_are_refused_with_the_remedy(config, dataset):
    with pytest.raises(ValueError, match="`value_baseline` needs a dataset with a length"):
        anchored(config, dataset.to_iterable_dataset(), max_steps=1)
    with pytest.raises(ValueError, match="this model has masked tokens: set it to False"):
        anchored(config, dataset, amused)
