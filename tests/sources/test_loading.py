"""Names and paths to datasets: spreadsheets and folders as people have them."""

import json
import re

import datasets
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image

from tgol_trainer.data import Columns, DataError, ScoredStream, open_image, prepare_dataset
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.thresholds import estimate_threshold

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder of six images, pics/0.png to pics/5.png, of grey levels 0, 10, ... 50."""
    (tmp_path / "data" / "pics").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", SIZE, (number * 10,) * 3).save(tmp_path / "data" / "pics" / f"{number}.png")
    return tmp_path / "data"


def levels(rows):
    return [open_image(row["image"]).getpixel((0, 0))[0] for row in rows]


RATINGS = [3, 1, 5, 3, 3, 4]


def write_jsonl(path, key="file_name", prefix="pics/"):
    rows = [{key: f"{prefix}{i}.png", "prompt": f"prompt {i}", "score": rating} for i, rating in enumerate(RATINGS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_of_images_with_star_ratings_and_ties(folder):
    """Sorted 1 3 3 3 4 5: the median is 3 and the three 3s are positive with the 4 and the 5."""
    write_jsonl(folder / "metadata.jsonl")
    dataset, report = prepare_dataset(load_scored_dataset(str(folder)), Columns(), SIZE)
    assert dataset.scores.tolist() == RATINGS and levels(dataset) == [0, 10, 20, 30, 40, 50]
    threshold = estimate_threshold(dataset.scores)
    assert (threshold.value, threshold.num_positive, threshold.num_ties) == (3, 5, 3)
    assert report.num_unique_prompts == 6


def test_a_folder_may_hold_a_folder_a_split(folder):
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / "pics" / f"{1 if split == 'train' else 2}.png").rename(folder / split / "a.png")
        line = json.dumps({"file_name": "a.png", "prompt": split, "score": 1})
        (folder / split / "metadata.jsonl").write_text(line)
    for split, level in (("train", 10), ("test", 20)):
        dataset, _ = prepare_dataset(load_scored_dataset(str(folder), split=split), Columns(), SIZE)
        assert dataset.prompts == [split] and levels(dataset) == [level]


SPREADSHEET = (
    "\ufeffprompt,image,score,notes\n"
    '"a dog, running",pics/0.png,4,\n'
    '"a sign that says ""stop""",pics/1.png,4,fine\n'
    "no score,pics/2.png,,\n"
    "blank score,pics/3.png, ,\n"
    "not available,pics/4.png,n/a,\n"
    "file is gone,pics/none.png,4,\n"
    ",pics/5.png,2,\n"
    '"two\nlines", pics/5.png, 2.5,\n'
)


def test_a_spreadsheet_with_ties_blanks_quotes_and_a_missing_file(folder):
    (folder / "ratings.csv").write_text(SPREADSHEET, encoding="utf-8")
    table = load_scored_dataset(str(folder / "ratings.csv"))
    assert isinstance(table.features["image"], datasets.Image) and table.num_rows == 8
    with pytest.raises(DataError) as caught:
        prepare_dataset(table, Columns(), SIZE)
    message = str(caught.value)
    assert "5 of 8 rows" in message and "none.png" in message
    assert "column 'score', missing score: 3 (row 2: None, row 3: None, row 4: None)" in message
    assert "missing prompt: 1 (row 6: None)" in message
    dataset, report = prepare_dataset(table, Columns(), SIZE, on_bad_sample="skip")
    assert dataset.prompts == ["a dog, running", 'a sign that says "stop"', "two\nlines"]
    assert dataset.scores.tolist() == [4, 4, 2.5] and levels(dataset) == [0, 10, 50]
    assert report.dropped == {"missing prompt": 1, "image file not found": 1, "missing score": 3}


def test_a_score_column_with_words_is_kept_for_the_check_that_names_the_rows(folder):
    rows = "".join(f"p,pics/0.png,{i % 5}\n" for i in range(10_050))  # more than the reader's usual piece
    (folder / "a.csv").write_text(f"prompt,image,score\n{rows}p,pics/1.png,good\n")
    with pytest.raises(DataError, match=r"1 of 10051 rows does not read as a number \(row 10050: 'good'"):
        prepare_dataset(load_scored_dataset(str(folder / "a.csv")), Columns(), SIZE)


@pytest.mark.parametrize("first", [True, False])
def test_a_comma_in_a_prompt_without_quotes_is_refused_with_its_line(folder, first):
    """In the first row, pandas would make the file names row names, and images of the prompts."""
    lines = ["pics/0.png,a dog, running,4", "pics/1.png,a cat,2"]
    text = "\n".join(["image,prompt,score", *(lines if first else reversed(lines))])
    (folder / "a.csv").write_text(text)
    with pytest.raises(
        DataError, match=rf"line {2 if first else 3} of .*a\.csv' has 4 values.*header names 3: .*quotation"
    ):
        load_scored_dataset(str(folder / "a.csv"))


@pytest.mark.parametrize(
    "text",
    [
        "\n\nimage,prompt,score\n\npics/0.png,a dog,4\n\npics/1.png,a cat,2\n",
        " image , prompt , score \npics/0.png,a dog,4\npics/1.png,a cat,2\n",
        "image,prompt,score\npics\\0.png,a dog,4\n.\\pics\\1.png,a cat,2\n",
    ],
    ids=["blank lines", "blanks in the header", "paths of Windows"],
)
def test_what_an_export_puts_around_the_rows_does_not_change_them(folder, text):
    (folder / "a.csv").write_text(text)
    dataset, _ = prepare_dataset(load_scored_dataset(str(folder / "a.csv")), Columns(), SIZE)
    assert dataset.prompts == ["a dog", "a cat"] and levels(dataset) == [0, 10]


def test_a_comma_at_the_end_of_every_row_moves_no_column(folder):
    (folder / "a.csv").write_text("image,prompt,score\npics/0.png,a dog,4,\npics/1.png,a cat,2,\n")
    dataset, _ = prepare_dataset(load_scored_dataset(str(folder / "a.csv")), Columns(), SIZE)
    assert dataset.prompts == ["a dog", "a cat"] and dataset.scores.tolist() == [4, 2]


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ";"), ("a.tsv", "\t"), ("a.csv", "\t")])
def test_other_separators_of_spreadsheets_are_seen(folder, name, sign):
    lines = [("prompt", "image", "score"), ("a, b", "pics/3.png", "2")]
    (folder / name).write_text("\r\n".join(sign.join(line) for line in lines))
    dataset, _ = prepare_dataset(load_scored_dataset(str(folder / name)), Columns(), SIZE)
    assert dataset.prompts == ["a, b"] and levels(dataset) == [30]


def test_a_json_lines_file_counts_paths_from_its_own_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_jsonl(folder / "rows.jsonl", key="image")
    columns = Columns(image="image")
    dataset, _ = prepare_dataset(load_scored_dataset("data/rows.jsonl", columns=columns), columns, SIZE)
    assert levels(dataset) == [0, 10, 20, 30, 40, 50]
    absolute = folder / "absolute.jsonl"
    write_jsonl(absolute, key="image", prefix=f"{folder}/pics/")
    assert levels(prepare_dataset(load_scored_dataset(str(absolute)), Columns(), SIZE)[0])[5] == 50


def test_a_folder_of_tables_is_read_whole(folder):
    for number in range(2):
        (folder / f"part{number}.csv").write_text(f'prompt, image, score\n"a, b", pics/{number}.png, {number}\n')
    dataset, _ = prepare_dataset(load_scored_dataset(str(folder)), Columns(), SIZE)
    assert levels(dataset) == [0, 10] and dataset.prompts == ["a, b", "a, b"]


def test_tables_beside_images_are_told_apart_by_the_split_in_their_names(folder):
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        (folder / f"ratings_{split}.csv").write_text(f"prompt,image,score\n{split},pics/{number}.png,1\n")
    for split, number in (("train", 1), ("validation", 2), ("test", 3)):
        dataset, _ = prepare_dataset(load_scored_dataset(str(folder), split=split), Columns(), SIZE)
        assert levels(dataset) == [number * 10]
    (folder / "ratings_val.csv").unlink()
    with pytest.raises(DataError, match=r"`split`.*ratings_test\.csv.*ratings_train\.csv.*'validation'"):
        load_scored_dataset(str(folder), split="validation")
    (folder / "ratings_train.csv").rename(folder / "ratings_train.json")
    with pytest.raises(DataError, match=r"tables of several kinds.*Name one file"):
        load_scored_dataset(str(folder))


def rows_of(n=6):
    rows = [{"prompt": f"p{i}", "image": Image.new("RGB", SIZE, (i * 10,) * 3), "score": float(i)} for i in range(n)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_files_and_folders_of_them_hold_their_images(tmp_path, plain):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    dataset = rows_of()
    if plain:  # written by another program: no trace of the Image type
        pyarrow.parquet.write_table(dataset.with_format("arrow")[:].replace_schema_metadata(None), path)
    else:
        dataset.to_parquet(path)
    for source in (path, tmp_path / "data"):
        loaded = load_scored_dataset(str(source))
        assert isinstance(loaded.features["image"], datasets.Image)
        assert levels(prepare_dataset(loaded, Columns(), SIZE)[0]) == [0, 10, 20, 30, 40, 50]


def test_a_saved_dataset_and_its_splits_are_found(tmp_path):
    rows_of().save_to_disk(str(tmp_path / "one"))
    assert load_scored_dataset(str(tmp_path / "one")).num_rows == 6
    DatasetDict({"train": rows_of(2), "test": rows_of(3)}).save_to_disk(str(tmp_path / "two"))
    assert load_scored_dataset(str(tmp_path / "two"), split="test").num_rows == 3
    with pytest.raises(DataError, match=r"`split`.*\['train', 'test'\], not 'validation'"):
        load_scored_dataset(str(tmp_path / "two"), split="validation")
    stream = load_scored_dataset(str(tmp_path / "one"), streaming=True)
    assert isinstance(stream, IterableDataset) and stream.num_shards == 6
    assert levels(ScoredStream(stream)) == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("kind", ["metadata.jsonl", "rows.csv", "rows.parquet"])
def test_files_stream_to_the_same_rows(folder, kind):
    path = folder / kind
    if kind == "rows.csv":
        lines = [f"prompt {i},pics/{i}.png,{rating}\n" for i, rating in enumerate(RATINGS)]
        path.write_text("prompt,file_name,score\n" + "".join(lines))
    elif kind == "rows.parquet":
        rows_of().to_parquet(path)
    else:
        write_jsonl(path)
    whole, _ = prepare_dataset(load_scored_dataset(str(path)), Columns(), SIZE)
    rows = list(ScoredStream(load_scored_dataset(str(path), streaming=True)))
    assert levels(rows) == levels(whole) == [0, 10, 20, 30, 40, 50]
    assert [row["score"] for row in rows] == whole.scores.tolist()


def test_a_slice_of_a_file_is_possible_and_its_split_has_any_name(folder):
    write_jsonl(folder / "rows.jsonl", key="image")
    assert load_scored_dataset(str(folder / "rows.jsonl"), split="test[:2]").num_rows == 2


@pytest.mark.parametrize("source", ["nothing", "./here/it/is", "/no/such/folder", "data/rows.csv", "~/x", "a/b/c", ""])
def test_a_source_that_is_nothing_is_refused_before_the_hub_is_asked(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("asked the Hub"))
    if source == "":
        (tmp_path / "a.txt").write_text("the empty source is this folder")
    with pytest.raises(DataError, match=re.escape(repr(source)) if source else "holds no data"):
        load_scored_dataset(source)


def test_a_file_of_another_kind_and_an_empty_folder_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"0\.png.*give one of \.csv"):
        load_scored_dataset(str(folder / "pics" / "0.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        load_scored_dataset(str(tmp_path / "empty"))


def test_an_unreadable_table_is_refused_with_the_readers_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,image,score\n"a,b,1\nc,d,2,3,4,5\n')
    with pytest.raises(DataError, match=r"(?s)a\.csv.*Error.*UTF-8") as caught:
        load_scored_dataset(str(path))
    assert caught.value.__cause__ is not None


def test_errors_of_the_hub_come_through_with_what_to_check(monkeypatch):
    reason = datasets.exceptions.DatasetNotFoundError("Dataset 'some/where' doesn't exist on the Hub")

    def load_dataset(*args, **options):
        assert (args, options) == (("some/where", "fine"), {"split": "train", "streaming": True})
        raise reason

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"(?s)'some/where'.*doesn't exist on the Hub.*hf auth login") as caught:
        load_scored_dataset("some/where", name="fine", split="train", streaming=True)
    assert caught.value.__cause__ is reason
    with pytest.raises(DataError, match=r"a stream takes no slice such as 'train\[:5\]'"):
        load_scored_dataset("some/where", split="train[:5]", streaming=True)
