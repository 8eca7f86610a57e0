"""Batches of tensors: images, prompts, labels, sizes."""

import pytest
import torch
from PIL import Image

from tgol_trainer.data import Collator, DataError, decode_prompts
from tgol_trainer.labels import Labeler
from tgol_trainer.thresholds import apply_threshold


def row(score=1.0, prompt="a cat", row_id=0, image=None):
    return {"prompt": prompt, "image": image or Image.new("RGB", (8, 8)), "score": score, "row_id": row_id}


def test_a_batch_is_tensors_of_the_promised_shapes_and_types():
    batch = Collator((6, 8))([row(1.5, "a", 7), row(-2.0, "ab", 2**62)])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "pixel_values": ((2, 3, 6, 8), torch.float32),
        "prompt_bytes": ((2, 2), torch.uint8),
        "prompt_length": ((2,), torch.int64),
        "score": ((2,), torch.float32),
        "row_id": ((2,), torch.int64),
        "geometry": ((2, 4), torch.int64),
        "resolution": ((2, 2), torch.int64),
    }
    assert batch["prompt_bytes"].tolist() == [[97, 0], [97, 98]]
    assert batch["row_id"].tolist() == [7, 2**62]
    assert batch["score"].tolist() == [1.5, -2.0]


def test_the_geometry_is_the_images_own_size_and_where_its_crop_begins():
    """30 wide, 20 high, to 10x10: resized to 15x10, of which the columns 2.5 to 12.5 remain."""
    batch = Collator((10, 10))([row(image=Image.new("RGB", (30, 20))), row(image=Image.new("RGB", (10, 40)))])
    assert batch["geometry"].tolist() == [[20, 30, 0, 2], [40, 10, 15, 0]]


def test_prompts_of_any_script_come_back_whole():
    prompts = ["a cat", "дом", "猫" * 300, "a\0b\0", "👩‍🚀 on the moon", " spaces stay "]
    batch = Collator((4, 4))([row(prompt=prompt) for prompt in prompts])
    assert decode_prompts(batch["prompt_bytes"], batch["prompt_length"]) == prompts


def test_labels_are_stacked_as_they_are():
    labels = Labeler(apply_threshold([1.5, -2.0], 0.0), cut_points=[0.0, 1.0])([1.5, -2.0])
    batch = Collator((4, 4))([{**row(), **labels.row(index)} for index in range(2)])
    assert batch["score"].tolist() == [1.5, -2.0]
    assert batch["margin"].tolist() == [[1.5, 0.5], [-2.0, -3.0]]
    assert batch["weight"].tolist() == [[8.5, 3.5], [11.0, 16.0]]
    assert {batch[name].dtype for name in ("score", "margin", "weight")} == {torch.float32}


def test_an_image_that_breaks_after_the_check_names_its_row(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(DataError, match=r"(?s)row 41 .*gone\.png.*image file not found.*Put the file back"):
        Collator((4, 4))([row(), row(row_id=41, image=str(path))])
