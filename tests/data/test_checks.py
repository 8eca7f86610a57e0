"""The shape of a dataset: every refusal names the column, the rows, the cause and code that mends it, which is run."""

import logging
import math
import os
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from tgol_trainer.data import Columns, DataError, check_columns, prepare_dataset

SIZE = (8, 8)


def image(level=0, size=(8, 8)):
    return Image.new("RGB", size, (level, level, level))


def good(n=4, **more):
    rows = {"prompt": [f"prompt {i}" for i in range(n)], "image": [image(i) for i in range(n)]}
    return Dataset.from_dict({**rows, "score": [float(i) for i in range(n)], **more})


def refusal(dataset, **options):
    with pytest.raises(DataError) as caught:
        check_columns(dataset, Columns(), **options)
    return str(caught.value)


def run_remedy(message, dataset):
    """Run the code of a message on the dataset, as a user who pastes it."""
    lines = message.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("dataset = ", "def ", "from ")))
    stop = next((i for i, line in enumerate(lines) if line.startswith("Or leave")), len(lines))
    names = {"dataset": dataset, "datasets": datasets, "math": math, "os": os}
    exec("\n".join(lines[start:stop]), names)
    return names["dataset"]


def test_a_good_dataset_passes_in_silence(caplog):
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        check_columns(good(extra=list("abcd")), Columns())
        check_columns(good().to_iterable_dataset(), Columns())
        check_columns(good().remove_columns("score"), Columns(), scored=False)
    assert not caplog.records


def test_a_missing_column_is_named_with_the_code_that_renames_the_likely_one():
    dataset = good().rename_columns({"prompt": "caption", "score": "rating"})
    message = refusal(dataset, name="eval_dataset")
    assert message.startswith("eval_dataset: no column 'prompt' (prompt) and 'score' (score)")
    assert "['caption', 'image', 'rating']" in message
    check_columns(run_remedy(message, dataset), Columns())
    check_columns(dataset, Columns(prompt="caption", score="rating"))


def test_a_missing_column_that_nothing_resembles_gets_a_place_to_fill_in():
    message = refusal(good().rename_column("image", "x17"))
    assert 'rename_column("your_image_column", "image")' in message


def test_the_same_column_twice_is_refused():
    with pytest.raises(DataError, match=r"three different ones.*score='image'"):
        Columns(score="image")


def pairs(first, second, **more):
    rows = {first: [image(10), image(20)], second: [image(30), image(40)]}
    return Dataset.from_dict({"caption": ["a", "b"], **rows, **more})


def levels(dataset):
    """(prompt, grey level of the image, score) of every row."""
    return [(row["prompt"], row["image"].getpixel((0, 0))[0], row["score"]) for row in dataset]


def test_chosen_and_rejected_become_one_row_per_image_with_wins_as_score():
    message = refusal(pairs("chosen", "rejected"))
    assert "pairs (columns 'chosen' and 'rejected')" in message and "one image and its score per row" in message
    mended = run_remedy(message, pairs("chosen", "rejected"))
    assert levels(mended) == [("a", 10, 1.0), ("a", 30, 0.0), ("b", 20, 1.0), ("b", 40, 0.0)]
    prepare_dataset(mended, Columns(), SIZE)


def test_labelled_pairs_become_one_row_per_image_and_a_tie_is_half_a_win():
    dataset = pairs("image_0", "image_1", label_0=[0.0, 0.5])
    mended = run_remedy(refusal(dataset), dataset)
    assert levels(mended) == [("a", 10, 0.0), ("a", 30, 1.0), ("b", 20, 0.5), ("b", 40, 0.5)]


def test_pairs_with_image_ids_count_the_wins_of_an_image_over_its_comparisons():
    dataset = Dataset.from_dict(
        {
            "caption": ["a", "a", "a"],
            "jpg_0": [image(10), image(10), image(20)],
            "jpg_1": [image(20), image(30), image(30)],
            "image_0_uid": ["x", "x", "y"],
            "image_1_uid": ["y", "z", "z"],
            "label_0": [1.0, 0.5, 1.0],
        }
    ).cast_column("jpg_0", datasets.Image(decode=False))
    mended = run_remedy(refusal(dataset), dataset)
    assert Counter(levels(mended)) == Counter([("a", 10, 1.5), ("a", 20, 1.0), ("a", 30, 0.5)])


def test_a_dataset_that_has_image_and_score_beside_pairs_is_not_refused():
    check_columns(good(chosen=list("abcd"), rejected=list("abcd")), Columns())


def test_a_dataset_dictionary_is_refused_with_how_to_pick_a_split():
    both = datasets.DatasetDict({"train": good(), "test": good()})
    message = refusal(both)
    assert "['train', 'test']" in message and "train_dataset=dataset['train']" in message
    streams = datasets.IterableDatasetDict({"validation": good().to_iterable_dataset()})
    assert "dataset['validation']" in refusal(streams)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ([{"prompt": "a"}], "Dataset.from_list"),
        ({"prompt": ["a"]}, "Dataset.from_dict"),
        (pd.DataFrame({"prompt": ["a"]}), "Dataset.from_pandas"),
        ("folder/of/mine", "load_scored_dataset('folder/of/mine')"),
        (torch.utils.data.TensorDataset(torch.zeros(2)), "Dataset.from_list([dataset[i] for i"),
        (torch.utils.data.ChainDataset([]), "IterableDataset.from_generator"),
        (None, "Dataset.from_list"),
    ],
)
def test_other_classes_are_refused_with_how_to_convert_them(value, remedy):
    message = refusal(value)
    assert message.startswith("train_dataset: expected a datasets.Dataset") and remedy in message


def test_a_transform_on_the_fly_is_refused_because_training_would_ignore_it():
    assert "with_format(None)" in refusal(good().with_transform(lambda batch: batch))


def test_other_formats_make_no_difference():
    for kind in ("torch", "numpy", "arrow"):
        dataset, _ = prepare_dataset(good().with_format(kind), Columns(), SIZE)
        assert dataset.prompts == [f"prompt {i}" for i in range(4)] and type(dataset[2]["score"]) is float


@pytest.mark.parametrize("kind", ["float32", "int8", "bool", "decimal128(5, 2)"])
def test_every_type_of_number_is_a_score_and_bools_are_zero_and_one(kind):
    dataset = good().cast_column("score", datasets.Value("float64" if kind == "bool" else kind))
    if kind == "bool":
        dataset = good().remove_columns("score").add_column("score", [False, True, True, False])
    scored, _ = prepare_dataset(dataset, Columns(), SIZE)
    assert scored.scores.tolist() == ([0, 1, 1, 0] if kind == "bool" else [0, 1, 2, 3])
    assert scored.scores.dtype == np.float64


def with_scores(values):
    return good(len(values)).remove_columns("score").add_column("score", values)


def test_numbers_stored_as_text_are_refused_with_a_cast():
    dataset = with_scores(["4", "3.5", "1e-3"])
    message = refusal(dataset)
    assert "column 'score' must hold numbers, it holds text (row 0: '4', row 1: '3.5'" in message
    mended = run_remedy(message, dataset)
    assert prepare_dataset(mended, Columns(), SIZE)[0].scores.tolist() == [4, 3.5, 1e-3]


def test_text_between_numbers_is_listed_and_left_out_by_the_remedy():
    dataset = with_scores(["4", " ", "n/a", None, "5", "-", "?", "x"])
    message = refusal(dataset)
    assert (
        "in 6 of 8 rows does not read as a number (row 1: ' ', row 2: 'n/a', row 3: None, row 5: '-', row 6: '?', ...;"
        in message
    )
    mended = run_remedy(message, dataset)
    assert prepare_dataset(mended, Columns(), SIZE)[0].scores.tolist() == [4, 5]


def test_decimal_commas_between_words_are_kept_by_the_remedy():
    dataset = with_scores(["1,5", "n/a", None, "2", "3,25"])
    message = refusal(dataset)
    assert "with decimal commas and other text that does not read as a number, 1 of 5 rows (row 0: '1,5'" in message
    mended = run_remedy(message, dataset)
    assert prepare_dataset(mended, Columns(), SIZE)[0].scores.tolist() == [1.5, 2, 3.25]


def test_commas_between_thousands_are_not_taken_for_decimal_ones_without_a_word():
    dataset = with_scores(["1,500", "900", "2,250"])
    message = refusal(dataset)
    assert 'If the commas part thousands, put "" for "."' in message
    mended = run_remedy(message.replace('replace(",", ".")', 'replace(",", "")'), dataset)
    assert prepare_dataset(mended, Columns(), SIZE)[0].scores.tolist() == [1500, 900, 2250]
    assert "thousands" not in refusal(with_scores(["0,125", "1,500"]))


@pytest.mark.parametrize(("column", "written"), [("image", "filename"), ("image", "File_Name"), ("prompt", "Prompt")])
def test_a_usual_name_in_other_letters_is_proposed(column, written):
    message = refusal(good().rename_column(column, written))
    assert f"`--{column}_column {written}`" in message


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("score", [[1.0, 2.0]] * 4, "must hold one number per row"),
        ("score", [{"a": 1}] * 4, "must hold one number per row"),
        ("prompt", [1, 2, 3, 4], "must hold text"),
        ("prompt", [["a", "b"]] * 4, "must hold text"),
        ("prompt", [[{"role": "user"}]] * 4, "store one text per row"),
        ("image", [1, 2, 3, 4], "must hold images"),
        ("image", [[1, 2]] * 4, "one list per row"),
        ("image", [["a.png", "b.png"]] * 4, "one list per row"),
        ("image", [{"url": "x"}] * 4, "must hold images"),
    ],
)
def test_a_column_of_another_type_is_named_with_its_type(column, values, words):
    dataset = good().remove_columns(column).add_column(column, values)
    message = refusal(dataset)
    assert f"column {column!r}" in message and words in message and str(dataset.features[column]) in message


def test_remedies_for_prompts_of_another_type_work():
    for values, expected in [([1, 2, 3, 4], "1"), ([["a", "b"]] * 4, "a")]:
        dataset = good().remove_columns("prompt").add_column("prompt", values)
        assert prepare_dataset(run_remedy(refusal(dataset), dataset), Columns(), SIZE)[0].prompts[0] == expected


def test_classes_as_scores_are_used_with_a_warning_that_names_their_order(caplog):
    dataset = good().cast_column("score", datasets.Value("int64"))
    dataset = dataset.cast_column("score", datasets.ClassLabel(names=["good", "fair", "bad", "worst"]))
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        check_columns(dataset, Columns())
    assert "from 0 for 'good' to 3 for 'worst'" in caplog.text


def test_a_stream_with_unknown_features_is_checked_by_its_first_row():
    def rows():
        yield {"caption": "a", "image": image(), "score": 1}

    stream = IterableDataset.from_generator(rows)
    assert stream.features is None
    assert "no column 'prompt'" in refusal(stream)
    check_columns(stream, Columns(prompt="caption"))
    assert "the stream has no rows" in refusal(IterableDataset.from_generator(lambda: iter(())))


# --- bad rows -----------------------------------------------------------------------------------------------------


def bad_rows(dataset, **options):
    with pytest.raises(DataError) as caught:
        prepare_dataset(dataset, Columns(), SIZE, **options)
    return str(caught.value)


def test_bad_scores_are_listed_by_cause_and_the_remedy_leaves_them_out():
    dataset = with_scores([1.0, math.nan, 2.0, None, math.inf, -math.inf])
    message = bad_rows(dataset)
    assert message.startswith("train_dataset: 4 of 6 rows cannot be used (rows are counted from 0).")
    assert "column 'score', NaN score: 1 (row 1: nan)" in message
    assert "column 'score', missing score: 1 (row 3: None)" in message
    assert "column 'score', infinite score: 2 (row 4: inf, row 5: -inf)" in message
    assert message.count("math.isfinite") == 1 and "on_bad_sample='skip'" in message
    assert prepare_dataset(run_remedy(message, dataset), Columns(), SIZE)[0].scores.tolist() == [1, 2]


def test_bad_prompts_are_listed_by_cause_and_the_remedy_leaves_them_out():
    dataset = good().remove_columns("prompt").add_column("prompt", ["a", None, "", " \n"])
    message = bad_rows(dataset)
    assert "column 'prompt', missing prompt: 1 (row 1: None)" in message
    assert "column 'prompt', empty prompt: 2 (row 2: '', row 3: ' \\n')" in message
    assert prepare_dataset(run_remedy(message, dataset), Columns(), SIZE)[0].prompts == ["a"]


def test_five_rows_are_shown_and_all_are_counted():
    message = bad_rows(with_scores([1.0] * 3 + [None] * 9))
    assert "missing score: 9 (row 3: None, row 4: None, row 5: None, row 6: None, row 7: None, ...)" in message


def test_everything_wrong_in_a_row_and_in_a_dataset_is_said_in_one_go(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    rows = [
        {"prompt": "fine", "image": image(), "score": 1.0},
        {"prompt": " ", "image": {"bytes": None, "path": str(tmp_path / "none.png")}, "score": math.nan},
        {"prompt": "b", "image": {"bytes": None, "path": str(tmp_path / "broken.png")}, "score": 2.0},
        {"prompt": "c", "image": None, "score": 3.0},
    ]
    features = datasets.Features(
        prompt=datasets.Value("string"), image=datasets.Image(), score=datasets.Value("float64")
    )
    message = bad_rows(Dataset.from_list(rows, features=features), name="eval_dataset")
    assert message.startswith("eval_dataset: 3 of 4 rows")
    for words in (
        "empty prompt: 1 (row 1: ' ')",
        "column 'image', image file not found: 1 (row 1: '",
        "/none.png')",
        "NaN score: 1 (row 1: nan)",
        "column 'image', undecodable image: 1 (row 2: ",
        "cannot identify image file",
        "column 'image', missing image: 1 (row 3: None)",
        f"looked up in the\n# working directory, {os.getcwd()}",
    ):
        assert words in message


def test_the_remedy_for_missing_files_makes_relative_paths_absolute(tmp_path):
    image(7).save(tmp_path / "a.png")
    strings = Dataset.from_dict({"prompt": ["a", "b"], "image": ["a.png", str(tmp_path / "a.png")], "score": [1, 2]})
    for dataset in (strings, strings.cast_column("image", datasets.Image())):
        message = bad_rows(dataset)
        assert "image file not found: 1 (row 0: 'a.png')" in message
        mended = run_remedy(message.replace("/folder/of/the/images", str(tmp_path)), dataset)
        prepare_dataset(mended, Columns(), SIZE)


def test_an_empty_dataset_and_one_without_a_usable_row_are_errors():
    assert "it has no rows" in bad_rows(good().select([]))
    for policy in ("raise", "skip"):
        message = bad_rows(with_scores([None, math.nan]), on_bad_sample=policy)
        assert "2 of 2 rows cannot be used" in message and "on_bad_sample" not in message


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="`on_bad_sample` must be 'raise' or 'skip', got 'ignore'"):
        prepare_dataset(good(), Columns(), SIZE, on_bad_sample="ignore")
