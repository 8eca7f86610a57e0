"""The check before training and its cache; datasets and streams that rows are read from."""

import dataclasses
import json
import logging
import math
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch._utils import ExceptionWrapper

from tgol_trainer.data import (
    Collator,
    Columns,
    DataError,
    ImageError,
    ScoredStream,
    open_image,
    prepare_dataset,
    stream_scores,
)
from tgol_trainer.data import datasets as module

SIZE = (8, 8)
FEATURES = datasets.Features(prompt=datasets.Value("string"), image=datasets.Image(), score=datasets.Value("float64"))


def plain_image(level=0, size=(8, 8)):
    return Image.new("RGB", size, (level, level, level))


def rows_of(n):
    return [{"prompt": f"prompt {i % 3}", "image": plain_image(i), "score": float(i)} for i in range(n)]


def saved(folder, rows):
    Dataset.from_list(rows, features=FEATURES).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="tgol_trainer")
    return caplog


# --- prepare_dataset ----------------------------------------------------------------------------------------------


def test_a_fine_dataset_is_reported_in_full_and_in_silence(warnings):
    dataset, report = prepare_dataset(Dataset.from_list(rows_of(5)), Columns(), SIZE)
    assert report.to_dict() == {
        "name": "train_dataset",
        "num_rows": 5,
        "num_kept": 5,
        "dropped": {},
        "num_smaller": 0,
        "mean_cropped_share": 0.0,
        "num_unique_prompts": 3,
        "resolution": [8, 8],
    }
    json.dumps(report.to_dict())
    assert len(dataset) == 5 and dataset.scores.tolist() == [0, 1, 2, 3, 4] and dataset.scores.dtype == np.float64
    assert dataset.prompts == ["prompt 0", "prompt 1", "prompt 2", "prompt 0", "prompt 1"]
    row = dataset[4]
    assert (row["prompt"], row["score"], row["row_id"]) == ("prompt 1", 4.0, 4)
    assert isinstance(row["image"]["bytes"], bytes)  # still encoded
    assert open_image(row["image"]).getpixel((0, 0)) == (4, 4, 4)
    assert not warnings.records


def test_row_ids_are_the_numbers_in_the_users_dataset_after_bad_rows_are_left_out(warnings):
    rows = rows_of(6)
    rows[1]["score"], rows[2]["prompt"], rows[4]["image"], rows[4]["score"] = None, "", None, math.nan
    dataset, report = prepare_dataset(Dataset.from_list(rows), Columns(), SIZE, on_bad_sample="skip")
    assert [row["row_id"] for row in dataset] == [0, 3, 5] == dataset.scores.tolist()
    assert [open_image(row["image"]).getpixel((0, 0))[0] for row in dataset] == [0, 3, 5]
    assert dataset.prompts == ["prompt 0", "prompt 0", "prompt 2"] == [row["prompt"] for row in dataset]
    assert report.dropped == {"missing score": 1, "empty prompt": 1, "missing image": 1, "NaN score": 1}
    assert (report.num_rows, report.num_kept) == (6, 3)
    assert "3 of 6 rows are left out" in warnings.text and "column 'score', NaN score: 1 (row 4: nan)" in warnings.text


@pytest.mark.parametrize("kind", ["paths", "files", "bytes", "pil", "arrays", "floats", "array3d", "structs"])
def test_in_memory_datasets_of_every_kind_of_image_work(kind, tmp_path):
    images = [plain_image(i * 10) for i in range(3)]
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    arrays = [np.asarray(image) for image in images]
    encoded = [Path(path).read_bytes() for path in paths]
    values = {
        "paths": paths,
        "files": [Image.open(path) for path in paths],
        "bytes": encoded,
        "pil": images,
        "arrays": arrays,
        "floats": [(array / 255).astype(np.float32) for array in arrays],
        "array3d": arrays,
        "structs": [{"bytes": data, "path": None} for data in encoded],
    }[kind]
    dataset = Dataset.from_dict({"prompt": list("abc"), "image": values, "score": [1, 2, 3]})
    if kind == "array3d":
        dataset = dataset.cast_column("image", datasets.Array3D((8, 8, 3), "uint8"))
    scored, _ = prepare_dataset(dataset, Columns(), SIZE)
    assert [open_image(row["image"]).getpixel((3, 3)) for row in scored] == [(i * 10,) * 3 for i in range(3)]
    if kind in ("arrays", "floats", "array3d"):
        assert isinstance(scored[0]["image"], np.ndarray)  # not 192 Python numbers


def test_ragged_and_missing_arrays_are_bad_rows_among_good_ones():
    good = np.zeros((8, 8, 3), np.uint8).tolist()
    rows = {"prompt": list("abc"), "image": [good, [[[0, 0, 0]], [[0, 0, 0], [1, 1, 1]]], None], "score": [1, 2, 3]}
    _, report = prepare_dataset(Dataset.from_dict(rows), Columns(), SIZE, on_bad_sample="skip")
    assert report.dropped == {"undecodable image": 1, "missing image": 1}


def test_other_column_names_and_unreadable_extra_columns_do_not_matter():
    dataset = Dataset.from_list(rows_of(3)).rename_columns({"prompt": "p", "image": "i", "score": "s"})
    dataset = dataset.add_column("sound", [b"not a sound"] * 3).cast_column("sound", datasets.Image())
    scored, _ = prepare_dataset(dataset, Columns("p", "i", "s"), SIZE)
    assert scored[1]["score"] == 1.0 and set(scored[1]) == {"prompt", "image", "score", "row_id", "image_key"}


def test_the_second_check_of_a_dataset_on_disk_opens_no_image(tmp_path, monkeypatch):
    _, first = prepare_dataset(saved(tmp_path / "data", rows_of(20)), Columns(), SIZE)
    files = sorted(tmp_path.rglob("*"))
    opened = []
    monkeypatch.setattr(module, "read_row", lambda *row: opened.append(row))
    scored, second = prepare_dataset(datasets.load_from_disk(str(tmp_path / "data")), Columns(), SIZE)
    assert first == second and not opened and sorted(tmp_path.rglob("*")) == files
    assert scored.scores.tolist() == list(range(20))
    # Another resolution needs no image opened again either: sizes are what is kept.
    _, wide = prepare_dataset(datasets.load_from_disk(str(tmp_path / "data")), Columns(), (4, 8))
    assert not opened and wide.mean_cropped_share == 0.5


def test_a_file_mended_since_the_cached_check_is_good_again(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"not yet")
    plain_image(0).save(tmp_path / "b.png")
    paths = [str(tmp_path / "b.png")] * 3 + [str(path)]
    rows = Dataset.from_dict({"prompt": ["x"] * 4, "image": paths, "score": [1, 2, 3, 4]})
    rows.save_to_disk(str(tmp_path / "data"))
    dataset = datasets.load_from_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match="row 3"):
        prepare_dataset(dataset, Columns(), SIZE)
    plain_image(77, (12, 8)).save(path)
    scored, report = prepare_dataset(datasets.load_from_disk(str(tmp_path / "data")), Columns(), SIZE)
    assert report.num_kept == 4 and report.mean_cropped_share == pytest.approx((4 / 12) / 4)
    assert open_image(scored[3]["image"]).getpixel((0, 0)) == (77, 77, 77)


def test_data_on_a_read_only_disk_is_checked_without_writing_there(tmp_path, monkeypatch):
    dataset = saved(tmp_path / "data", rows_of(3))
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(module.os, "access", lambda folder, mode: False)
    assert prepare_dataset(dataset, Columns(), SIZE)[1].num_kept == 3
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("named", [[7, 8, 7, None], ["a", "b", "a", None], [[1, 2], [3], [1, 2], None]])
def test_equal_prompts_are_one_object_and_groups_are_named_by_the_text_of_any_value(named):
    rows = [{**row, "prompt": row["prompt"] + "!", "set": name} for row, name in zip(rows_of(4), named, strict=True)]
    del rows[1]["image"]
    dataset, _ = prepare_dataset(
        Dataset.from_list(rows), dataclasses.replace(Columns(), group="set"), SIZE, on_bad_sample="skip"
    )
    assert dataset.prompts == ["prompt 0!", "prompt 2!", "prompt 0!"]
    prompts = dataset.prompts
    assert prompts[0] is prompts[2]  # text of its own for each of millions of rows would be gigabytes
    assert dataset.groups == [str(named[0]), str(named[2]), "None"]
    assert [dataset[index]["group"] for index in range(3)] == dataset.group_ids


def test_several_processes_find_what_one_finds(tmp_path):
    rows = rows_of(40)
    rows[3]["score"], rows[30]["prompt"], rows[39]["image"] = math.inf, None, None
    options = {"on_bad_sample": "skip"}
    one, report = prepare_dataset(Dataset.from_list(rows), Columns(), SIZE, **options)
    two, same = prepare_dataset(saved(tmp_path / "data", rows), Columns(), SIZE, num_proc=2, **options)
    assert report == same
    assert one.row_ids.tolist() == two.row_ids.tolist() and one.scores.tolist() == two.scores.tolist()


def test_selected_and_shuffled_rows_keep_their_images():
    dataset = Dataset.from_list(rows_of(10)).shuffle(seed=3).select(range(2, 8))
    scored, _ = prepare_dataset(dataset, Columns(), SIZE)
    assert [row["row_id"] for row in scored] == list(range(6))
    assert [open_image(row["image"]).getpixel((0, 0))[0] for row in scored] == scored.scores.tolist()
    assert scored.prompts == dataset["prompt"][:]


def test_small_images_are_counted_and_shown_in_a_warning(warnings):
    sizes = [(8, 8), (7, 8), (8, 7), (16, 16), (2, 2)]
    rows = [{"prompt": "p", "image": plain_image(0, size), "score": 1.0} for size in sizes]
    _, report = prepare_dataset(Dataset.from_list(rows), Columns(), SIZE, name="eval_dataset")
    assert report.num_smaller == 3
    assert "eval_dataset: 3 of 5 images are smaller than they are trained at" in warnings.text
    assert "row 1: 7x8, row 2: 8x7, row 4: 2x2" in warnings.text and "lower `resolution`" in warnings.text


def test_the_mean_share_cut_away_is_reported_and_beyond_ten_per_cent_warned_about(warnings):
    def report(widths):
        rows = [{"prompt": "p", "image": plain_image(0, (width, 100)), "score": 1.0} for width in widths]
        return prepare_dataset(Dataset.from_list(rows), Columns(), (50, 50))[1]

    assert report([100, 125]).mean_cropped_share == pytest.approx(0.1)  # 0 and 1 - 100/125
    assert not warnings.records
    assert report([100, 200, 200]).mean_cropped_share == pytest.approx(1 / 3)
    assert "cuts away 33 % of the image area on average" in warnings.text and "`resolution`" in warnings.text


def test_streams_and_datasets_point_to_each_other():
    with pytest.raises(DataError, match="use ScoredStream"):
        prepare_dataset(Dataset.from_list(rows_of(2)).to_iterable_dataset(), Columns(), SIZE)
    with pytest.raises(DataError, match="Use prepare_dataset"):
        ScoredStream(Dataset.from_list(rows_of(2)))


def test_a_scored_dataset_survives_pickling(tmp_path):
    for dataset in (Dataset.from_list(rows_of(4)), saved(tmp_path / "data", rows_of(4))):
        scored, _ = prepare_dataset(dataset, Columns(), SIZE)
        twin = pickle.loads(pickle.dumps(scored))
        assert twin[3] == scored[3] and twin.prompts == scored.prompts


# --- streams ------------------------------------------------------------------------------------------------------


def stream_of(rows, shards=4):
    return Dataset.from_list(rows, features=FEATURES).to_iterable_dataset(num_shards=min(shards, len(rows)))


def test_row_ids_do_not_depend_on_workers_or_processes():
    rows = rows_of(24)
    alone = {row["score"]: row["row_id"] for row in ScoredStream(stream_of(rows))}
    assert len(set(alone.values())) == 24 and all(0 <= row_id < 2**63 for row_id in alone.values())
    for workers in (0, 2):
        seen = []
        for rank in range(2):
            part = ScoredStream(stream_of(rows)).split(rank, 2)
            loader = torch.utils.data.DataLoader(part, batch_size=5, collate_fn=Collator(SIZE), num_workers=workers)
            for batch in loader:
                seen += zip(batch["score"].tolist(), batch["row_id"].tolist(), strict=True)
        assert sorted(seen) == sorted(alone.items())


def test_row_ids_tell_prompts_scores_pixels_and_shapes_apart():
    rows = [
        {"prompt": "a", "image": plain_image(1), "score": 1.0},
        {"prompt": "b", "image": plain_image(1), "score": 1.0},
        {"prompt": "a", "image": plain_image(2), "score": 1.0},
        {"prompt": "a", "image": plain_image(1), "score": 2.0},
        {"prompt": "a", "image": plain_image(1, (4, 16)), "score": 1.0},
        {"prompt": "a", "image": plain_image(1), "score": 1.0},
    ]
    row_ids = [row["row_id"] for row in ScoredStream(stream_of(rows, 1))]
    assert len(set(row_ids)) == 5 and row_ids[0] == row_ids[5]


def test_a_stream_skips_and_counts_bad_rows_before_batching(warnings):
    rows = rows_of(8)
    rows[1]["score"], rows[2]["prompt"], rows[5]["image"] = math.nan, None, None
    stream = ScoredStream(stream_of(rows, 1), on_bad_sample="skip")
    batches = list(torch.utils.data.DataLoader(stream, batch_size=5, collate_fn=Collator(SIZE)))
    assert [batch["score"].tolist() for batch in batches] == [[0, 3, 4, 6, 7]]
    assert stream.dropped == {"NaN score": 1, "missing prompt": 1, "missing image": 1}
    assert "3 of 8 rows that this process read are left out" in warnings.text


def test_a_stream_raises_at_the_first_bad_row_with_its_index():
    rows = rows_of(8)
    rows[5]["score"] = math.nan
    read = []
    with pytest.raises(DataError, match=r"(?s)1 of the 6 rows.*'score', NaN score: 1 \(row 5: nan\).*on_bad_sample"):
        read.extend(ScoredStream(stream_of(rows, 1)))
    assert len(read) == 5


def test_errors_keep_their_class_on_the_way_from_a_worker():
    # What a DataLoader does with a worker's exception; a loader itself takes 5 s to wind up after one.
    for error in (DataError("row 5"), ImageError("row 5", cause="truncated image")):
        with pytest.raises(type(error), match="row 5"):
            ExceptionWrapper((type(error), error, None)).reraise()


def test_a_broken_image_in_a_stream_is_a_bad_row_and_does_not_end_the_stream(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    rows = rows_of(4)
    rows[1]["image"] = {"bytes": None, "path": str(tmp_path / "a.png")}
    stream = ScoredStream(stream_of(rows, 1), on_bad_sample="skip")
    assert [row["score"] for row in stream] == [0, 2, 3]
    assert stream.dropped == {"undecodable image": 1}


def generated():
    yield from rows_of(5)
    yield {"prompt": "no image", "score": 3}


def test_a_stream_with_unknown_features_is_read_as_it_comes():
    stream = ScoredStream(IterableDataset.from_generator(generated), on_bad_sample="skip")
    assert [row["score"] for row in stream] == [0, 1, 2, 3, 4]
    known = [row["row_id"] for row in ScoredStream(stream_of(rows_of(5), 1))]
    assert [row["row_id"] for row in stream] == known
    assert stream.dropped == {"missing image": 2}  # of two passes


def test_set_epoch_reaches_the_shuffling_of_the_stream():
    stream = ScoredStream(stream_of(rows_of(16)).shuffle(seed=0, buffer_size=16))
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([row["score"] for row in stream])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(16))


def test_a_stream_survives_pickling():
    stream = ScoredStream(stream_of(rows_of(4), 2))
    assert [row["row_id"] for row in pickle.loads(pickle.dumps(stream))] == [row["row_id"] for row in stream]
    assert stream.num_shards == 2


# --- stream_scores ------------------------------------------------------------------------------------------------


def test_scores_of_a_stream_are_read_without_opening_an_image(tmp_path):
    rows = [{**row, "image": {"bytes": b"no image", "path": None}} for row in rows_of(6)]
    for stream in (stream_of(rows), IterableDataset.from_generator(lambda: iter(rows))):
        scores, _ = stream_scores(stream, Columns())
        assert scores.tolist() == [0, 1, 2, 3, 4, 5] and scores.dtype == np.float64
        assert stream_scores(stream, Columns(), limit=2)[0].tolist() == [0, 1]


def test_bad_scores_of_a_stream_raise_or_are_left_out(warnings):
    rows = [{**row, "score": math.nan if i % 2 else 1.0} for i, row in enumerate(rows_of(20))]
    with pytest.raises(DataError, match=r"5 of 10 rows read.*\n.*row 1: nan, row 3: nan.*row 9: nan"):
        stream_scores(stream_of(rows), Columns(), on_bad_sample="raise")
    scores, _ = stream_scores(stream_of(rows), Columns(), on_bad_sample="skip")
    assert scores.tolist() == [1.0] * 10 and "10 of 20 scores are left out" in warnings.text


def test_a_stream_without_rows_without_usable_scores_or_with_text_is_refused():
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(DataError, match="the stream has no rows"):
        stream_scores(empty, Columns(), on_bad_sample="skip")
    with pytest.raises(DataError, match="3 of 3 rows read cannot be used"):
        rows = [{**row, "score": None} for row in rows_of(3)]
        stream_scores(stream_of(rows), Columns(), on_bad_sample="skip")
    texts = Dataset.from_dict({"prompt": ["a"], "image": ["a"], "score": ["4"]}).to_iterable_dataset()
    for read in (stream_scores, ScoredStream):
        with pytest.raises(DataError, match=r"(?s)column 'score' must hold numbers.*def to_number"):
            read(texts, Columns())
    with pytest.raises(DataError, match="no column 'rating'"):
        stream_scores(stream_of(rows_of(2)), dataclasses.replace(Columns(), score="rating"))
