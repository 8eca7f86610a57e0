"""Training sizes by aspect ratio: nothing above the area, little cut away, batches of one size, every row once."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.helpers import over
from tests.pipelines import TINY
from tests.tiny import stable_diffusion, stable_diffusion_xl
from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.data import Buckets, SizeSampler, cropped_share


@pytest.mark.parametrize(
    ("resolution", "multiple", "step"), [((1024, 1024), 8, 64), ((512, 512), 8, 32), ((480, 832), 16, 32)]
)
def test_sizes_keep_the_area_the_step_and_the_ratio(resolution, multiple, step):
    sizes = Buckets(resolution, multiple).sizes
    assert tuple(sizes[0]) == resolution
    assert len({tuple(size) for size in sizes.tolist()}) == len(sizes) > 9
    area = resolution[0] * resolution[1]
    for height, width in sizes[1:].tolist():
        assert height % step == width % step == 0
        assert area * 0.85 < height * width <= area
        assert 0.5 <= height / width <= 2
        assert height * (width + step) > area  # no wider one would do


def test_an_image_goes_where_least_of_it_is_cut_away():
    """By trying every size; the centre crop to a square cuts a quarter of 4:3."""
    buckets, rng = Buckets((512, 512), 8), np.random.default_rng(0)
    images = np.concatenate([rng.integers(300, 2000, (200, 2)), [[640, 480], [480, 640], [512, 512], [3000, 3000]]])
    chosen = buckets.sizes[buckets.of(images)]
    for (width, height), (tall, wide) in zip(images.tolist(), chosen.tolist(), strict=True):
        least = min(cropped_share(width, height, tuple(size)) for size in buckets.sizes.tolist())
        assert cropped_share(width, height, (tall, wide)) == pytest.approx(least, abs=1e-9)
        if 0.5 <= width / height <= 2:
            assert least < 0.08
    assert chosen[-2:].tolist() == [[512, 512]] * 2
    assert cropped_share(640, 480, (512, 512)) == 0.25
    photo = Buckets((1024, 1024), 8)
    assert photo.sizes[photo.of(np.array([[3000, 2000]]))].tolist() == [[832, 1216]]


def test_images_of_one_shape_need_no_buckets_and_rare_shapes_join_the_nearest(caplog):
    buckets = Buckets((512, 512), 8)
    assert buckets.resolutions(np.full((9, 2), 700), 4) is None
    assert not caplog.text
    wide, wider, tall = [600, 450], [600, 400], [400, 600]
    found = buckets.resolutions(np.array([wide] * 5 + [wider] * 2 + [tall] * 4), 4)
    own = buckets.sizes[buckets.of(np.array([wide, wider, tall]))]
    assert found.tolist() == [own[0].tolist()] * 7 + [own[2].tolist()] * 4
    assert "2 of 11 images have a shape that too few share to fill a batch of 4" in caplog.text
    # No shape fills a batch: the commonest takes all.
    few = buckets.resolutions(np.array([wide, wide, tall]), 4)
    assert few.tolist() == [own[0].tolist()] * 3


@pytest.mark.parametrize("group_size", [None, 2])
def test_batches_are_of_one_size_and_an_epoch_has_each_row_once(group_size):
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 3, 50)
    resolutions = np.array([[8, 8], [8, 16], [16, 8]])[numbers]
    groups = rng.integers(0, 6, 50) if group_size else None
    counts = np.bincount(numbers)
    for drop_last in (True, False):
        sampler = SizeSampler(resolutions, 4, drop_last, 7, groups, group_size)
        epochs = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert order == list(sampler)  # a resumed run goes on with it
            assert len(order) == len(sampler) == sum((n // 4 if drop_last else -(-n // 4)) * 4 for n in counts)
            batches = np.array(order).reshape(-1, 4)
            assert all(len(set(numbers[batch].tolist())) == 1 for batch in batches)
            if drop_last:
                assert max(Counter(order).values()) == 1
            else:
                assert set(order) == set(range(50))
            if groups is not None:
                pairs = np.array(order).reshape(-1, 2)
                assert (groups[pairs[:, 0]] == groups[pairs[:, 1]]).mean() > 0.7
            epochs.append(order)
        assert epochs[0] != epochs[1]
    plain = SizeSampler(resolutions, 4, drop_last=False)
    assert list(plain) == list(plain)


def shaped(sizes, prompts=3):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    rows = {"prompt": [f"prompt {i % prompts}" for i in range(len(sizes))], "image": images}
    return Dataset.from_dict({**rows, "score": rng.normal(size=len(sizes))})


def watched(trainer):
    """Return a list that collects what the denoiser is called with."""
    seen, predict = [], trainer.family.predict

    def call(model, draw, conditioning):
        seen.append((draw, conditioning))
        return predict(model, draw, conditioning)

    trainer.family.predict = call
    return seen


SETTINGS = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


@over(TINY, ("sd", "sdxl", "sd3", "flux", "amused"))
def test_every_family_trains_images_at_their_own_shape_cached_or_not(name, tmp_path):
    facts = TINY[name]
    if name.startswith("wan"):
        pytest.skip("videos: see test_wan.py")
    losses = []
    for cache in (True, False):
        settings = {**facts.settings, **SETTINGS, "per_device_train_batch_size": 4, "max_steps": 3, "cache": cache}
        args = TGOLConfig(output_dir=str(tmp_path), **{**settings, "resolution": 24 if "sd3" in name else 48})
        trainer = TGOLTrainer(facts.build(), args, shaped([(64, 40)] * 5 + [(40, 64)] * 4 + [(50, 50)] * 4))
        seen = watched(trainer)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len({tuple(draw.inputs.shape[1:]) for draw, _ in seen}) == 3
    assert losses[0] == losses[1]


def test_sdxl_is_told_the_size_of_the_bucket(config):
    rows = shaped([(96, 48)] * 4 + [(64, 64)] * 4)
    trainer = TGOLTrainer(stable_diffusion_xl(), config(per_device_train_batch_size=4, resolution=64), rows)
    calls = watched(trainer)
    trainer.train()
    seen = {tuple(row) for _, conditioning in calls for row in conditioning["time_ids"].tolist()}
    sizes = {(original[:2], original[4:]) for original in seen}  # height, width of the image; of the training pixels
    assert ((64.0, 64.0), (64.0, 64.0)) in sizes
    (wide,) = {target for original, target in sizes if original == (48.0, 96.0)}
    assert wide[1] > wide[0] and wide[0] * wide[1] <= 64 * 64


def test_evaluation_counts_each_row_once_whatever_fills_the_batches(config):
    rows = shaped([(96, 48)] * 5 + [(64, 64)] * 6 + [(48, 96)] * 4)
    found = []
    for batch in (1, 4):
        args = config(resolution=64, per_device_eval_batch_size=batch, temperature=1.0)
        trainer = TGOLTrainer(stable_diffusion(), args, rows, eval_dataset=rows)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        found.append(trainer.evaluate())
    assert found[0]["eval_scores/mean"] == pytest.approx(np.mean(rows["score"]), rel=1e-5)
    for key in ("eval_loss", "eval_scores/mean", "eval_weights/mean", "eval_errors/positive"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4)


def test_evaluating_the_training_rows_leaves_their_sizes_as_they_are(config):
    """Three tall images fill no batch in training and join another size; evaluation gives them their own."""
    rows = shaped([(96, 48)] * 9 + [(64, 64)] * 4 + [(48, 96)] * 3)
    trainer = TGOLTrainer(stable_diffusion(), config(resolution=64, per_device_train_batch_size=4), rows)
    trainer.get_train_dataloader()
    before = trainer.train_dataset.resolutions.copy()
    assert len(np.unique(before, axis=0)) == 2
    trainer.evaluate(trainer.train_dataset)
    assert np.array_equal(trainer.train_dataset.resolutions, before)


def test_without_buckets_every_image_is_cut_to_one_size(config, caplog):
    rows = shaped([(128, 64)] * 4 + [(64, 64)] * 4)
    trainer = TGOLTrainer(stable_diffusion(), config(resolution=64, aspect_buckets=False), rows)
    assert "the centre crop cuts away 25 % of the image area on average" in caplog.text
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["resolution"].tolist() == [[64, 64]] * 8
    caplog.clear()
    TGOLTrainer(stable_diffusion(), config(resolution=64), rows)
    assert "cuts away" not in caplog.text
