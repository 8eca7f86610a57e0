"""Folders and text files as people have them: splits by folder, other encodings, odd names, what would go unsaid."""

import json
import logging
import tarfile
import zipfile

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from tgol_trainer.data import Columns, DataError, ScoredStream, open_image, prepare_dataset
from tgol_trainer.sources import load_prompts, load_scored_dataset
from tgol_trainer.sources.loading import load_columns

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def images(folder, *names):
    """Images of grey levels 0, 10, 20, ..."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (number * 10,) * 3).save(folder / name)


def metadata(folder, *names, prompts=None, file="metadata.jsonl", **more):
    rows = [
        {"file_name": name, "prompt": prompts[i] if prompts else f"p{i}", "score": float(i), **more}
        for i, name in enumerate(names)
    ]
    (folder / file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def levels(dataset):
    rows, _ = prepare_dataset(dataset, Columns(), SIZE)
    return [open_image(row["image"]).getpixel((0, 0))[0] for row in rows]


# ---- Splits ----


@pytest.mark.parametrize("streaming", [False, True])
def test_one_metadata_file_above_the_folders_of_splits_gives_each_split_its_own_rows(tmp_path, streaming):
    names = ["train/0.png", "val\\1.png", "train/2.png", "test/3.png"]
    images(tmp_path, *(name.replace("\\", "/") for name in names))
    metadata(tmp_path, *names)
    for split, expected in (("train", [0, 2]), ("validation", [1]), ("test", [3])):
        rows = list(load_scored_dataset(str(tmp_path), split=split, streaming=streaming))
        assert [row["score"] for row in rows] == expected
        assert [row["score"] for row in load_columns(str(tmp_path), ["prompt", "score"], split=split)] == expected
    with pytest.raises(
        DataError, match=r"`split`.*no rows in a folder of 'holdout'.*\['test', 'train', 'validation'\]"
    ):
        load_scored_dataset(str(tmp_path), split="holdout", streaming=streaming)
    if not streaming:
        assert levels(load_scored_dataset(str(tmp_path), split="test")) == [30]
        with pytest.raises(DataError, match="takes no slice such as 'train"):
            load_scored_dataset(str(tmp_path), split="train[:1]")


def flat(folder):
    images(folder, "a.png", "b.png")
    return metadata(folder, "a.png", "b.png")


def tables(folder):
    images(folder, "a.png")
    (folder / "ratings.csv").write_text("prompt,image,score\np,a.png,1\n")
    return folder


def saved(folder):
    Dataset.from_dict({"prompt": ["a"], "image": ["a.png"], "score": [1.0]}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("make", [flat, tables, saved])
def test_what_has_no_splits_is_not_handed_out_for_evaluation_too(tmp_path, make):
    folder = str(make(tmp_path / "data"))
    assert load_scored_dataset(folder).num_rows == (2 if make is flat else 1)
    with pytest.raises(DataError, match=r"`split`.*'test'"):
        load_scored_dataset(folder, split="test")
    if make is flat:
        assert load_scored_dataset(folder, split="train[:1]").num_rows == 1


# ---- Names ----


@pytest.mark.parametrize("name", ["cats [512]", "a*b"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "parquet", "shards"])
def test_a_folder_is_no_pattern_whatever_its_name(tmp_path, name, kind):
    folder, twin = tmp_path / name, tmp_path / "axb"  # which a*b would match
    for place in (folder, twin):
        images(place, "a.png")
    if kind.startswith("metadata"):
        metadata(folder, "a.png", file="rows.jsonl")
        rows = Dataset.from_json(str(tmp_path / "*" / "rows.jsonl"))
        (folder / "rows.jsonl").unlink()
        getattr(rows, "to_csv" if kind.endswith("csv") else "to_json")(str(folder / kind))
        (twin / kind).write_text((folder / kind).read_text().replace("p0", "of the twin"))
    else:
        (folder / "a.png").unlink()
        rows = Dataset.from_dict({"prompt": ["p0"], "image": [Image.new("RGB", SIZE)], "score": [1.0]})
        place = folder / "data" if kind == "shards" else folder
        rows.to_parquet(str(place / "train-00000-of-00001.parquet"))
        if kind == "shards":  # as `tgol score` leaves it
            (folder / "rewards.json").write_text("{}")
            (folder / "other.json").write_text("{}")
    loaded = load_scored_dataset(str(folder))
    assert loaded["prompt"][:] == ["p0"] and levels(loaded) == [0]
    assert next(iter(load_scored_dataset(str(folder), streaming=True)))["prompt"] == "p0"


# ---- Encodings ----

WRITE = {
    "Windows-1252": lambda text: text.encode("cp1252"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
}


@pytest.mark.parametrize("encoding", WRITE)
@pytest.mark.parametrize(
    "file", ["prompts.txt", "metadata.jsonl", "rows.json", "rows.csv", "many/a.csv", "many/a.jsonl"]
)
def test_every_reader_of_text_names_file_line_and_character_where_it_is_not_utf8(tmp_path, encoding, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    text = {
        "txt": "a dog\nthe café\n",
        "csv": "prompt,image,score\nthe café,a.png,1\n",
    }.get(path.suffix[1:], '{"prompt": "a dog", "image": "a.png", "score": 1}\n{"prompt": "the café", "score": 1}\n')
    path.write_bytes(WRITE[encoding](text))
    with pytest.raises(DataError, match="UTF-8") as caught:
        if path.suffix == ".txt":
            load_prompts(str(path))
        else:
            load_scored_dataset(str(path.parent if path.stem in ("a", "metadata") else path))
    message = str(caught.value)
    assert path.name in message
    if encoding == "Windows-1252":
        line = text.splitlines()[1]
        assert f"line 2, character {line.index('é') + 1} is the byte 0xe9 ('é' in Windows-1252)" in message
    else:
        assert "UTF-16" in message


def test_a_prompt_may_hold_what_other_programs_take_for_line_ends(tmp_path):
    text = "a\u2028b\x0bc\x0cd\x85e"
    (tmp_path / "prompts.txt").write_bytes(f"{text}\r\nsecond\rthird\n\nfourth".encode())
    assert load_prompts(str(tmp_path / "prompts.txt")).texts == [text, "second", "third", "fourth"]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv", "rows.csv", "rows.jsonl"])
def test_an_empty_table_is_called_empty(tmp_path, file, content):
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"`source`: .*{file}' is empty"):
        load_scored_dataset(str(tmp_path if file.startswith("metadata") else tmp_path / file))
    if file.endswith("csv"):
        (tmp_path / file).write_text("prompt,image,score\n")
        with pytest.raises(DataError, match="has no rows"):
            load_scored_dataset(str(tmp_path / file))


# ---- What would go unsaid ----


@pytest.fixture
def said(tmp_path, caplog):
    """Load a folder and return what was warned of."""

    def load(source):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
            load_scored_dataset(str(source))
        return caplog.text

    return load


@pytest.mark.parametrize("climbs", [True, False], ids=["above", "absolute"])
def test_rows_that_name_files_outside_of_the_folder_are_said(tmp_path, said, climbs):
    images(tmp_path / "data", "a.png", "sub/b.png")
    images(tmp_path, "secret.png")
    other = "../secret.png" if climbs else str(tmp_path / "secret.png")
    metadata(tmp_path / "data", "a.png", "sub/../sub/b.png", other)
    assert f"1 of 3 rows name files outside of its folder, such as {other!r}" in said(tmp_path / "data")
    metadata(tmp_path / "data", "a.png", "sub/../sub/b.png")
    assert "outside" not in said(tmp_path / "data")


def test_images_that_no_row_names_a_second_metadata_file_and_an_archive_are_said(tmp_path, said):
    images(tmp_path, "a.png", "sub/b.png", "c.png")
    metadata(tmp_path, "a.png", "sub/b.png")
    assert "1 of 3 images and videos beside it are named by no row and are not used (c.png)" in said(tmp_path)
    (tmp_path / "c.png").unlink()
    assert not said(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,prompt,score\na.png,p,1\n")
    assert "metadata.jsonl is read, metadata.csv is not" in said(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    assert not said(tmp_path)
    (tmp_path / "a.png").unlink()
    assert "all.zip beside it is not opened, and 'a.png' is not in the folder. Unpack" in said(tmp_path)


def test_one_file_with_several_scores_is_said_and_with_several_prompts_is_not(tmp_path, said):
    images(tmp_path, "a.png", "b.png")
    metadata(tmp_path, "a.png", "a.png", "b.png", prompts=["p", "p", "q"])
    assert "files that are listed with one prompt and several scores: 1 (such as 'a.png': 0 and 1)" in said(tmp_path)
    metadata(tmp_path, "a.png", "a.png", "b.png", prompts=["p", "o", "q"])
    assert not said(tmp_path)


def test_two_columns_of_scores_with_one_name_are_refused_and_two_that_are_not_read_are_not(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_text("prompt,image,score, score\np,a.png,1,2\n")
    with pytest.raises(DataError, match="2 columns called 'score'"):
        load_scored_dataset(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("prompt,image,score,note,note\np,a.png,1,x,y\n")
    assert load_scored_dataset(str(tmp_path / "rows.csv"))["score"][:] == [1]


@pytest.mark.parametrize(
    ("scores", "warned"), [(["1,000", "2,500"], True), (["1,000", "2,5"], False), (["0,125"], False)]
)
def test_commas_that_may_part_thousands_are_said_where_they_are_read_as_decimal_signs(tmp_path, said, scores, warned):
    images(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_text("prompt;image;score\n" + "".join(f"p;a.png;{score}\n" for score in scores))
    assert ("If they part thousands" in said(tmp_path / "rows.csv")) == warned


@pytest.mark.parametrize("streaming", [False, True])
def test_a_webdataset_is_read_with_the_fields_of_its_json_as_columns(tmp_path, streaming):
    (tmp_path / "tars").mkdir()
    images(tmp_path, "0.png", "1.png", "2.png")
    with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as tar:
        for number in range(3):
            (tmp_path / "row.json").write_text(json.dumps({"prompt": f"p{number}", "score": number + 0.5}))
            tar.add(tmp_path / f"{number}.png", f"{number:03}.png")
            tar.add(tmp_path / "row.json", f"{number:03}.json")
    columns = Columns("json.prompt", "png", "json.score")
    for source in (tmp_path / "tars", tmp_path / "tars" / "train-0.tar"):
        loaded = load_scored_dataset(str(source), streaming=streaming, columns=columns)
        rows = list(ScoredStream(loaded, columns)) if streaming else list(prepare_dataset(loaded, columns, SIZE)[0])
        assert [(row["prompt"], row["score"]) for row in rows] == [("p0", 0.5), ("p1", 1.5), ("p2", 2.5)]
        assert [open_image(row["image"]).getpixel((0, 0))[0] for row in rows] == [0, 10, 20]
        meant = load_scored_dataset(str(source), streaming=streaming)  # columns that are plainly meant
        assert [(row["prompt"], row["score"]) for row in meant] == [("p0", 0.5), ("p1", 1.5), ("p2", 2.5)]
        assert "image" in meant.column_names
        scores = load_columns(str(source), ["score"], streaming=streaming)
        assert [row["score"] for row in scores] == [0.5, 1.5, 2.5]
        alone = load_columns(str(source), ["json.prompt", "json.score"], streaming=streaming)
        assert [row["json.score"] for row in alone] == [0.5, 1.5, 2.5]
