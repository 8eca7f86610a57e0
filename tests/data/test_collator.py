"""Batches of tensors: images, prompts, labels, sizes."""

import os

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tgol_trainer.data import Collator, Columns, DataError, decode_prompts, prepare_dataset
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
    labels = Labeler(apply_threshold([1.5, -2.0], 0.0))([1.5, -2.0])
    batch = Collator((4, 4))([{**row(), **labels.row(index)} for index in range(2)])
    assert batch["score"].tolist() == [1.5, -2.0]
    assert batch["margin"].tolist() == [1.5, -2.0]
    assert batch["weight"].tolist() == [8.5, 11.0]
    assert {batch[name].dtype for name in ("score", "margin", "weight")} == {torch.float32}


def test_an_image_that_breaks_after_the_check_names_its_row(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(DataError, match=r"(?s)row 41 .*gone\.png.*image file not found.*Put the file back"):
        Collator((4, 4))([row(), row(row_id=41, image=str(path))])


def test_a_file_that_was_replaced_after_the_check_is_an_error_and_never_trained_on(tmp_path, clips):
    """With the name, the size and the date of the one that was checked."""
    paths = [tmp_path / f"{number}.bmp" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    columns = {"prompt": ["a"] * 3, "image": list(map(str, paths)), "score": [0.0, 1.0, 2.0]}
    rows, _ = prepare_dataset(Dataset.from_dict(columns), Columns(), (8, 8))
    collate = Collator((8, 8))
    whole, status = collate([rows[0], rows[1], rows[2]]), paths[1].stat()
    assert whole["pixel_values"].shape == (3, 3, 8, 8)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(paths[1])
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"(?s)row 1 .*1\.bmp.*is another one than the check.*Start again"):
        collate([rows[0], rows[1]])
    films, _ = prepare_dataset(clips, Columns(video="video", num_frames=5), (16, 32))
    collate, film = Collator((16, 32), num_frames=5), films[0]
    assert collate([film])["pixel_values"].shape == (1, 3, 5, 16, 32)
    with pytest.raises(DataError, match=r"video of row 0 .*is another one"):
        collate([{**film, "video": films[1]["video"]}])
