"""Tables of folders that lack prompts or scores: what their files say fills them, row by row."""

import json

import pytest

from tests.sources.pictures import PARAMETERS, image, rows, stars
from tgol_trainer import cli
from tgol_trainer.data import Columns, DataError, prepare_dataset
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.sources.found import found_in
from tgol_trainer.sources.loading import load_columns


def table(folder, *records, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    """Three images: a text beside the first, a prompt inside the second; one, two and five stars."""
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("beside")
    image(tmp_path / "b.png", {"parameters": PARAMETERS})
    image(tmp_path / "c.png")
    for name, number in zip("abc", (1, 2, 5), strict=True):
        (tmp_path / f"{name}.xmp").write_text(stars(number))
    return tmp_path


def test_a_table_without_prompts_gets_each_from_its_file_and_keeps_its_scores(folder, said):
    table(folder, *({"file_name": f"{name}.png", "score": score} for name, score in (("b", 0.5), ("a", 7), ("c", 3))))
    found = rows(folder)
    assert [(row["prompt"], row["score"]) for row in found.values()] == [
        *(("a fox, (red:1.2) in the snow", 0.5), ("beside", 7.0), (None, 3.0))
    ]
    counts = found_in(load_scored_dataset(str(folder)))
    assert counts["prompts"].places == {"A1111 parameters": 1, ".txt files": 1}
    assert counts["prompts"].lacking == ["c.png"]
    assert counts["scores"].places == {"metadata.jsonl": 3}
    assert "prompts: 1 from A1111 parameters, 1 from .txt files; none in 1 file (c.png)" in said.text


def test_a_table_without_scores_gets_the_stars_and_a_new_star_is_seen(folder):
    table(folder, *({"file_name": f"{name}.png", "prompt": f"my {name}"} for name in "cab"))
    assert [(row["prompt"], row["score"]) for row in rows(folder).values()] == [
        *(("my c", 5.0), ("my a", 1.0), ("my b", 2.0))
    ]
    assert load_columns(str(folder), ["score"])["score"] == [5.0, 1.0, 2.0]
    assert [row["score"] for row in load_scored_dataset(str(folder), streaming=True)] == [5.0, 1.0, 2.0]
    assert load_scored_dataset(str(folder), split="train[:2]")["score"] == [5.0, 1.0]
    (folder / "c.xmp").write_text(stars(3) + " ")
    assert prepare_dataset(load_scored_dataset(str(folder)), Columns(), (8, 8))[0].scores.tolist() == [3.0, 1.0, 2.0]


def test_what_the_table_says_stays_and_scores_are_never_mixed(folder):
    records = [("a", "mine", None), ("b", " ", 0.9), ("c", None, 0.1)]
    table(folder, *({"file_name": f"{name}.png", "prompt": text, "score": score} for name, text, score in records))
    found = [(row["prompt"], row["score"]) for row in rows(folder).values()]
    assert found == [("mine", None), ("a fox, (red:1.2) in the snow", 0.9), (None, 0.1)]
    places = found_in(load_scored_dataset(str(folder)))
    assert places["prompts"].places == {"metadata.jsonl": 1, "A1111 parameters": 1}
    assert places["scores"].places == {"metadata.jsonl": 2} and places["scores"].lacking == ["a.png"]


def test_a_csv_table_with_empty_cells_is_filled(folder):
    (folder / "metadata.csv").write_text("file_name; prompt ;score\na.png;;\nb.png;mine;\n")
    assert [(row["prompt"], row["score"]) for row in rows(folder).values()] == [("beside", 1.0), ("mine", 2.0)]


@pytest.mark.parametrize("other", [{"caption": "x", "rating": 3}, {"Text": "x", "Stars": 3}])
def test_another_column_that_may_be_meant_is_asked_for_and_not_passed_over(folder, other):
    table(folder, {"file_name": "a.png", **other})
    text, number = other
    dataset = load_scored_dataset(str(folder))
    assert not {"prompt", "score"} & set(dataset.column_names)
    with pytest.raises(DataError, match=f"--prompt_column {text} --score_column {number}"):
        prepare_dataset(dataset, Columns(), (8, 8))
    with pytest.raises(DataError, match="no column 'quality'"):
        columns = Columns(prompt=text, score="quality")
        prepare_dataset(load_scored_dataset(str(folder), columns=columns), columns, (8, 8))


def test_names_of_folders_fill_a_table_without_scores_and_yield_to_its_own(folder, said):
    for name in ("good/x.png", "bad/y.png"):
        image(folder / name)
    records = [{"file_name": name, "prompt": "p"} for name in ("good/x.png", "bad/y.png", "a.png")]
    table(folder, *records)
    assert [row["score"] for row in rows(folder, folder_scores=True).values()] == [1.0, 0.0, None]
    table(folder, *({**record, "score": 9} for record in records))
    assert [row["score"] for row in rows(folder, folder_scores=True).values()] == [9, 9, 9]
    assert "its scores are used, and not the names of folders" in said.text


def test_of_files_that_say_nothing_no_column_comes_and_the_remedy_is_told(tmp_path):
    image(tmp_path / "a.png")
    table(tmp_path, {"file_name": "a.png", "prompt": "p"}, {"file_name": "gone.png", "prompt": "p"})
    dataset = load_scored_dataset(str(tmp_path))
    assert "score" not in dataset.column_names
    with pytest.raises(DataError, match=r"(?s)no column 'score'.*No image that the table names has.*tgol rate"):
        prepare_dataset(dataset, Columns(), (8, 8))


def test_pairs_and_splits_are_read_as_before(folder):
    table(folder, {"image_0": "a.png", "image_1": "b.png", "label_0": 1.0})
    assert "prompt_from" not in load_scored_dataset(str(folder)).column_names
    for name in ("train/d.png", "test/e.png"):
        image(folder / name, {"parameters": name})
    table(folder, *({"file_name": name, "score": 1} for name in ("train/d.png", "test/e.png")))
    assert [row["prompt"] for row in rows(folder, split="test").values()] == ["test/e.png"]


def test_check_says_what_came_from_where(folder, capsys):
    table(folder, *({"file_name": f"{name}.png", "score": score} for name, score in (("b", 0.5), ("a", 7))))
    cli.main(["check", str(folder)])
    said = capsys.readouterr().out
    assert "found    prompts: 1 from A1111 parameters, 1 from .txt files\n" in said
    assert "found    scores: 2 from metadata.jsonl\n" in said
