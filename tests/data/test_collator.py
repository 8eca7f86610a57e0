"""Batches of tensors, the shared threshold, and the sign of the margin."""

import copy
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tgol_trainer.data import Collator, Columns, DataError, decode_prompts, prepare_dataset
from tgol_trainer.thresholds import ScoreNormalization


def row(score=1.0, prompt="a cat", row_id=0, image=None):
    return {"prompt": prompt, "image": image or Image.new("RGB", (8, 8)), "score": score, "row_id": row_id}


def test_a_batch_is_tensors_of_the_promised_shapes_and_types():
    batch = Collator((6, 8))([row(1.5, "a", 7), row(-2.0, "ab", 2**62)])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "pixel_values": ((2, 3, 6, 8), torch.float32),
        "prompt_bytes": ((2, 2), torch.uint8),
        "prompt_length": ((2,), torch.int64),
        "score": ((2,), torch.float32),
        "margin": ((2,), torch.float32),
        "row_id": ((2,), torch.int64),
        "geometry": ((2, 4), torch.int64),
    }
    assert batch["prompt_bytes"].tolist() == [[97, 0], [97, 98]]
    assert batch["row_id"].tolist() == [7, 2**62]
    assert batch["score"].tolist() == batch["margin"].tolist() == [1.5, -2.0]


def test_the_geometry_is_the_images_own_size_and_where_its_crop_begins():
    """30 wide, 20 high, to 10x10: resized to 15x10, of which the columns 2.5 to 12.5 remain."""
    batch = Collator((10, 10))([row(image=Image.new("RGB", (30, 20))), row(image=Image.new("RGB", (10, 40)))])
    assert batch["geometry"].tolist() == [[20, 30, 0, 2], [40, 10, 15, 0]]


def test_prompts_of_any_script_come_back_whole():
    prompts = ["a cat", "дом", "猫" * 300, "a\0b\0", "👩‍🚀 on the moon", " spaces stay "]
    batch = Collator((4, 4))([row(prompt=prompt) for prompt in prompts])
    assert decode_prompts(batch["prompt_bytes"], batch["prompt_length"]) == prompts


def test_scores_are_normalised_before_the_threshold():
    """(70 - 50) / 10 = 2 and 2 - 0.5 = 1.5; (45 - 50) / 10 = -0.5 and -0.5 - 0.5 = -1."""
    batch = Collator((4, 4), ScoreNormalization("zscore", 50.0, 10.0), 0.5)([row(70), row(45)])
    assert batch["score"].tolist() == [2.0, -0.5]
    assert batch["margin"].tolist() == [1.5, -1.0]


def test_the_sign_of_the_margin_is_that_of_the_float64_comparison():
    threshold = 0.1 + 0.2  # 0.30000000000000004: in float32 it equals 0.3
    assert np.float32(threshold) == np.float32(0.3)
    margins = Collator((4, 4), threshold=threshold)([row(0.3), row(threshold), row(np.nextafter(threshold, 1))])[
        "margin"
    ]
    assert margins.sign().tolist() == [-1.0, 0.0, 1.0]


def test_a_margin_below_float32_keeps_its_sign_and_a_margin_beyond_it_stays_finite():
    scores = [1e-60, -1e-60, 1e-40, -1e-40, 0.0, 1e300, -1e300]
    margins = Collator((4, 4))([row(score) for score in scores])["margin"]
    assert margins.sign().tolist() == np.sign(scores).tolist()
    assert torch.isfinite(margins).all()
    assert margins[:4].abs().tolist() == [torch.finfo(torch.float32).tiny] * 4  # normal: no device flushes it to 0


def test_an_image_that_breaks_after_the_check_names_its_row(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(DataError, match=r"(?s)row 41 .*gone\.png.*image file not found.*Put the file back"):
        Collator((4, 4))([row(), row(row_id=41, image=str(path))])


def test_copies_have_their_own_shared_threshold():
    collator = Collator((4, 6), ScoreNormalization("zscore", 1.0, 2.0), 0.25)
    for twin in (pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
        assert (twin.threshold, twin.resolution, twin.normalization) == (0.25, (4, 6), collator.normalization)
        twin.threshold = 3.0
        assert twin._threshold.is_shared()
    assert collator.threshold == 0.25


def test_persistent_workers_see_a_changed_threshold():
    rows = [{"prompt": "p", "image": Image.new("RGB", (4, 4)), "score": float(i)} for i in range(8)]
    dataset, _ = prepare_dataset(Dataset.from_list(rows), Columns(), (4, 4))
    collator = Collator((4, 4), threshold=1.0)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, collate_fn=collator, num_workers=2, persistent_workers=True
    )
    first = torch.cat([batch["margin"] for batch in loader])
    workers = [worker.pid for worker in loader._iterator._workers]
    collator.threshold = 5.0
    second = torch.cat([batch["margin"] for batch in loader])
    assert [worker.pid for worker in loader._iterator._workers] == workers
    assert first.tolist() == [i - 1.0 for i in range(8)]
    assert second.tolist() == [i - 5.0 for i in range(8)]
