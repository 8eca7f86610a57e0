"""Comparisons, ratings and thumbs become one row per image; expectations are counted by hand or by SciPy."""

import io
import logging
import re
import sys

import datasets
import numpy as np
import pytest
from datasets import Dataset, load_dataset
from PIL import Image
from scipy.optimize import minimize

from tgol_trainer.cli import main
from tgol_trainer.converters import PairColumns, RatingColumns, pairs_to_scores, ratings_to_scores, thumbs_to_scores
from tgol_trainer.data import Columns, DataError, prepare_dataset
from tgol_trainer.sources import load_scored_dataset

RAW = datasets.Image(decode=False)


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(dataset, *columns):
    """(prompt, bytes, *columns) of every row."""
    dataset = dataset.cast_column("image", RAW)
    return [(row["prompt"], row["image"]["bytes"], *(row[column] for column in columns)) for row in dataset]


# x beats y twice, y beats z, x and z tie, all of one prompt; under another prompt w beats v.
GAMES = [("p", "x", "y", 1.0), ("p", "y", "x", 0.0), ("p", "y", "z", 1.0), ("p", "z", "x", 0.5), ("q", "v", "w", 0.0)]
WINS = {"x": 2.5, "y": 1.0, "z": 0.5, "v": 0.0, "w": 1.0}
PLAYED = {"x": 3, "y": 3, "z": 2, "v": 1, "w": 1}
LEVEL = {name: 20 * i for i, name in enumerate(WINS)}
PROMPT = {"x": "p", "y": "p", "z": "p", "v": "q", "w": "q"}


def pickapic(games=GAMES, same_bytes=True, **more):
    def image(name, game):
        return png(LEVEL[name]) if same_bytes else png(LEVEL[name]) + bytes([game])

    return Dataset.from_dict(
        {
            "caption": [prompt for prompt, *_ in games],
            "jpg_0": [image(first, i) for i, (_, first, _, _) in enumerate(games)],
            "jpg_1": [image(second, i) for i, (_, _, second, _) in enumerate(games)],
            "image_0_uid": [first for _, first, _, _ in games],
            "image_1_uid": [second for _, _, second, _ in games],
            "label_0": [won for *_, won in games],
            "label_1": [1 - won for *_, won in games],
            "has_label": [True] * len(games),
            "best_image_uid": [{1.0: first, 0.0: second}.get(won, "tie") for _, first, second, won in games],
            **more,
        }
    )


def expected(scores):
    return [(PROMPT[name], png(LEVEL[name]), score, PLAYED[name]) for name, score in scores.items()]


def test_wins_of_a_tournament_in_the_layout_of_pick_a_pic():
    scored = pairs_to_scores(pickapic())
    assert scored.column_names == ["prompt", "image", "score", "num_comparisons"]
    assert isinstance(scored.features["image"], datasets.Image)
    in_order = {name: WINS[name] for name in "xyzvw"}
    assert rows_of(scored, "score", "num_comparisons") == expected(in_order)


def test_win_rate_is_wins_over_comparisons():
    scored = pairs_to_scores(pickapic(), method="win_rate")
    assert scored["score"] == pytest.approx([WINS[name] / PLAYED[name] for name in "xyzvw"])


def test_without_ids_the_same_bytes_under_the_same_prompt_are_one_image():
    dataset = pickapic().remove_columns(["image_0_uid", "image_1_uid", "best_image_uid"])
    assert rows_of(pairs_to_scores(dataset), "score", "num_comparisons") == expected({n: WINS[n] for n in "xyzvw"})
    shared = Dataset.from_dict({"prompt": ["a", "b"], "chosen": [png(1), png(1)], "rejected": [png(2), png(3)]})
    found = [(prompt, score) for prompt, _, score in rows_of(pairs_to_scores(shared), "score")]
    assert found == [("a", 1), ("a", 0), ("b", 1), ("b", 0)]


def test_an_id_decides_over_the_bytes_and_the_first_file_is_kept_unchanged():
    scored = pairs_to_scores(pickapic(same_bytes=False))
    assert scored["score"] == [WINS[name] for name in "xyzvw"]
    # First seen in games 0 (x, y), 2 (z) and 4 (v, w).
    files = [png(LEVEL[name]) + bytes([game]) for name, game in zip("xyzvw", [0, 0, 2, 4, 4], strict=True)]
    assert [data for _, data in rows_of(scored)] == files


def test_images_are_not_decoded():
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": [b"no image"], "rejected": [b"nor this"]})
    assert rows_of(pairs_to_scores(dataset), "score") == [("a", b"no image", 1.0), ("a", b"nor this", 0.0)]


def test_images_paths_and_a_selection_of_rows_are_taken(tmp_path):
    (tmp_path / "one.png").write_bytes(png(1))
    (tmp_path / "two.png").write_bytes(png(2))
    dataset = Dataset.from_dict({"prompt": ["a"], "chosen": ["one.png"], "rejected": ["two.png"]})
    scored = pairs_to_scores(dataset, image_root=tmp_path)
    assert [image.getpixel((0, 0)) for image in scored["image"]] == [(1, 1, 1), (2, 2, 2)]
    images = Dataset.from_dict(
        {
            "prompt": ["a", "b", "c"],
            "chosen": [Image.new("RGB", (4, 4), (i, i, i)) for i in (1, 2, 3)],
            "rejected": [Image.new("RGB", (4, 4), (i, i, i)) for i in (4, 5, 6)],
        }
    ).select([2, 0])
    scored = pairs_to_scores(images)
    found = [(row["prompt"], row["image"].getpixel((0, 0))[0], row["score"]) for row in scored]
    assert found == [("c", 3, 1), ("c", 6, 0), ("a", 1, 1), ("a", 4, 0)]


def choices(values, **options):
    count = len(values)
    dataset = Dataset.from_dict(
        {
            "prompt": [f"p{i}" for i in range(count)],
            "image_0": [png(2 * i) for i in range(count)],
            "image_1": [png(2 * i + 1) for i in range(count)],
            "choice": values,
        }
    )
    return list(pairs_to_scores(dataset, **options)["score"][::2])


def test_words_of_a_choice_column():
    words = ["left", "Right", "tie", "both", "image_1", "win", "LOSS", "second", "first", "neither", "model_a"]
    assert choices(words) == [1, 0, 0.5, 0.5, 0, 1, 0, 0, 1, 0.5, 1]


@pytest.mark.parametrize("values", [[1, 0], [True, False], ["1", "0"], [1.0, 0.0]])
def test_numbers_of_a_choice_column_need_their_meaning(values):
    with pytest.raises(DataError, match=r"'choice' holds numbers.*choice_numbers='share'"):
        choices(values)
    assert choices(values, choice_numbers="share") == [1, 0]
    assert choices(values, choice_numbers="index") == [0, 1]


def test_a_number_is_a_label_where_ids_are_numbers_too():
    ids = {"image_0_uid": [0], "image_1_uid": [1], "label_0": [1]}
    dataset = Dataset.from_dict({"prompt": ["a"], "image_0": [png(1)], "image_1": [png(2)], **ids})
    assert list(pairs_to_scores(dataset)["score"]) == [1, 0]
    dataset = dataset.rename_column("label_0", "winner")
    assert list(pairs_to_scores(dataset)["score"]) == [0, 1]


def test_columns_can_be_named():
    names = {"caption": "text_of_it", "jpg_0": "up", "jpg_1": "down", "label_0": "verdict", "image_0_uid": "i"}
    dataset = pickapic().rename_columns({**names, "image_1_uid": "j"})
    scored = pairs_to_scores(
        dataset,
        PairColumns(prompt="text_of_it", first="up", second="down", choice="verdict", uids=("i", "j")),
        choice_numbers="share",
    )
    assert list(scored["score"]) == [WINS[name] for name in "xyzvw"]
    with pytest.raises(DataError, match=r"no column named image_0.*--first_column"):
        pairs_to_scores(dataset)


def test_rows_that_cannot_be_used_are_listed_by_cause_and_left_out_on_request(caplog):
    games = [("p", "x", "y", 1.0)] * 6
    dataset = pickapic(
        games,
        has_label=[True, False, True, True, True, True],
        label_1=[0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        best_image_uid=["x", "x", "x", "y", "x", "x"],
        jpg_1=[png(20)] * 4 + [None, png(20)],
        image_1_uid=["y"] * 5 + ["x"],
    )
    with pytest.raises(DataError) as caught:
        pairs_to_scores(dataset)
    message = str(caught.value)
    assert message.startswith("dataset: 5 of 6 rows cannot be used") and "on_bad_sample='skip'" in message
    assert "no label: 1 (row 1: 1.0)" in message
    assert "contradictory labels: 2 (row 2: 'label_0=1.0 label_1=1.0', row 3:" in message
    assert "missing image in 'jpg_1': 1 (row 4" in message
    assert "an image compared with itself: 1 (row 5: 'x')" in message
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        scored = pairs_to_scores(dataset, on_bad_sample="skip")
    assert rows_of(scored, "score", "num_comparisons") == [("p", png(0), 1, 1), ("p", png(20), 0, 1)]
    assert "5 of 6 rows" in caplog.text
    words = Dataset.from_dict({"prompt": ["a"], "image_0": [png(1)], "image_1": [png(2)], "choice": ["perhaps"]})
    with pytest.raises(DataError, match=r"unknown choice in 'choice': 1 \(row 0: 'perhaps'\)\nNo row is left"):
        pairs_to_scores(words, on_bad_sample="skip")


def test_a_stream_text_and_unknown_settings_are_refused():
    with pytest.raises(DataError, match="stream"):
        pairs_to_scores(pickapic().to_iterable_dataset())
    with pytest.raises(DataError, match="`method`"):
        pairs_to_scores(pickapic(), method="elo")
    with pytest.raises(DataError, match="`regularization`"):
        pairs_to_scores(pickapic(), regularization=0)
    with pytest.raises(DataError, match="`on_bad_sample`"):
        pairs_to_scores(pickapic(), on_bad_sample="drop")
    chat = Dataset.from_dict({"prompt": ["a"], "chosen": [[{"role": "user"}]], "rejected": [[{"role": "user"}]]})
    with pytest.raises(DataError, match="'chosen' must hold images"):
        pairs_to_scores(chat)
    with pytest.raises(DataError, match="column 'chosen' is named for images and for something else"):
        pairs_to_scores(chat, PairColumns(prompt="chosen"))


def strengths(games, names, penalty):
    """Bradley-Terry by SciPy on the written-out likelihood, a tie counting half each way."""

    def loss(values):
        of = dict(zip(names, values, strict=True))
        nll = sum(
            won * np.log1p(np.exp(of[second] - of[first])) + (1 - won) * np.log1p(np.exp(of[first] - of[second]))
            for _, first, second, won in games
        )
        return nll + penalty * np.sum(values**2)

    return minimize(loss, np.zeros(len(names)), method="BFGS", options={"gtol": 1e-8}).x


@pytest.mark.parametrize("penalty", [0.02, 0.5])
def test_bradley_terry_agrees_with_the_likelihood_maximised_by_scipy(penalty):
    pytest.importorskip("choix")
    scored = pairs_to_scores(pickapic(), method="bradley_terry", regularization=penalty)
    values = np.concatenate([strengths(GAMES[:4], "xyz", penalty), strengths(GAMES[4:], "vw", penalty)])
    np.testing.assert_allclose(scored["score"], values, atol=1e-4)
    assert np.isfinite(values).all() and scored["score"][4] > 0 > scored["score"][3]


def test_bradley_terry_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(ImportError, match=r"pip install 'tgol_trainer\[ranking\]'"):
        pairs_to_scores(pickapic(), method="bradley_terry")


# ---- Ratings and thumbs ----

RATING = RatingColumns("rating")


def rated(ratings, levels, **more):
    return Dataset.from_dict(
        {"prompt": ["p"] * len(levels), "image": [png(i) for i in levels], "rating": ratings, **more}
    )


def test_several_ratings_of_an_image_become_their_mean_number_and_deviation():
    scored = ratings_to_scores(rated([1, 4, 3, 2], [5, 6, 5, 5]), RATING)
    deviation = (((1 - 2) ** 2 + (3 - 2) ** 2) / 3) ** 0.5
    found = rows_of(scored, "score", "num_ratings", "score_std")
    assert found == [("p", png(5), 2, 3, pytest.approx(deviation)), ("p", png(6), 4, 1, 0)]


def test_lists_of_ratings_are_taken_without_their_missing_ones():
    scored = ratings_to_scores(rated([[1, 2, None], [5]], [5, 6]), RATING)
    assert rows_of(scored, "score", "num_ratings", "score_std") == [("p", png(5), 1.5, 2, 0.5), ("p", png(6), 5, 1, 0)]


def test_what_one_annotator_gave_an_image_counts_once():
    dataset = rated([1, 3, 5, 9], [5, 5, 5, 6], who=["ann", "ann", "bob", "ann"])
    scored = ratings_to_scores(dataset, RatingColumns("rating", annotator="who"))
    assert rows_of(scored, "score", "num_ratings") == [("p", png(5), 3.5, 2), ("p", png(6), 9, 1)]
    lists = rated([[1, 3, 5]], [5], who=[["ann", "ann", "bob"]])
    scored = ratings_to_scores(lists, RatingColumns("rating", annotator="who"))
    assert rows_of(scored, "score", "num_ratings") == [("p", png(5), 3.5, 2)]


def test_bad_ratings_are_listed():
    with pytest.raises(DataError) as caught:
        ratings_to_scores(rated(["4", "n/a", "", None], [1, 2, 3, 4]), RATING)
    assert "rating is not a number: 1 (row 1: 'n/a')" in str(caught.value)
    assert "no rating: 1 (row 2" in str(caught.value) and "missing rating: 1 (row 3" in str(caught.value)
    with pytest.raises(DataError, match=r"no column 'stars'.*--rating_column"):
        ratings_to_scores(rated([1], [1]), RatingColumns("stars"))


@pytest.mark.parametrize(
    ("votes", "scores"),
    [
        (["up", "Thumbs_Down", "like", "dislike", "👍"], [1, 0, 1, 0, 1]),
        ([True, False], [1, 0]),
        ([1, 0], [1, 0]),
        ([1, -1], [1, 0]),
        (["+1", "-1"], [1, 0]),
    ],
)
def test_thumbs_become_one_and_zero(votes, scores):
    assert list(thumbs_to_scores(rated(votes, range(len(votes))), RATING)["score"]) == scores


def test_zero_is_no_vote_beside_minus_one_and_several_votes_are_their_share():
    with pytest.raises(DataError, match=r"no vote \(0 beside -1\): 1 \(row 1"):
        thumbs_to_scores(rated([1, 0, -1], [1, 2, 3]), RATING)
    scored = thumbs_to_scores(rated(["up", "up", "down", "up"], [1, 1, 1, 2]), RATING)
    assert rows_of(scored, "score", "num_ratings") == [("p", png(1), pytest.approx(2 / 3), 3), ("p", png(2), 1, 1)]


# ---- The command ----


def test_the_command_writes_shards_that_load_dataset_and_training_read(tmp_path, capsys, monkeypatch):
    pickapic().to_parquet(tmp_path / "pairs.parquet")
    bars_of_datasets = sys.modules["datasets.utils.tqdm"]  # `datasets.utils.tqdm` is a class of it
    monkeypatch.setattr(bars_of_datasets, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars_of_datasets, "_hf_datasets_progress_bars_disabled", False)
    capsys.readouterr()
    out = tmp_path / "out"
    arguments = ["convert", "pairs", str(tmp_path / "pairs.parquet"), "--output_dir", str(out)]
    assert main([*arguments, "--rows_per_shard", "2"]) == 0
    printed, bars = capsys.readouterr()
    assert set(re.findall(r"([A-Z][\w ]+):", bars)) == {"Reading", "Writing"}  # none of `datasets`
    assert "5 rows, 0 left out; 5 comparisons (1 tie) of 5 images." in printed
    assert re.search(r"  2\.5  █+ +1\n", printed) and "The median is 1, above the minimum 0" in printed
    names = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert sorted(file.name for file in (out / "data").iterdir()) == names
    loaded = load_dataset(str(out), split="train")
    assert rows_of(loaded, "score", "num_comparisons") == expected({n: WINS[n] for n in "xyzvw"})
    rows, report = prepare_dataset(load_scored_dataset(str(out)), Columns(), (8, 8))
    assert rows.scores.tolist() == [WINS[name] for name in "xyzvw"] and report.num_kept == 5
    with pytest.raises(SystemExit):
        main(arguments)
    assert "holds files already" in capsys.readouterr().err


def test_the_command_embeds_the_images_of_a_table_of_paths(tmp_path, capsys):
    folder = tmp_path / "study"
    folder.mkdir()
    lines = ["prompt,image_0,image_1,choice"]
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
        lines.append(f"a,{i}.png,{(i + 1) % 3}.png,left")
    (folder / "pairs.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    assert main(["convert", "pairs", str(folder / "pairs.csv"), "--output_dir", str(out)]) == 0
    assert "No threshold divides these scores" in capsys.readouterr().out  # everyone beats one and loses to one
    for i in range(3):
        (folder / f"{i}.png").unlink()
    assert rows_of(load_dataset(str(out), split="train"), "score") == [("a", png(i), 1.0) for i in range(3)]


def test_the_command_says_where_the_median_equals_the_minimum(tmp_path, capsys):
    rated(["down", "down", "up"], [1, 2, 3]).to_parquet(tmp_path / "votes.parquet")
    source, out = str(tmp_path / "votes.parquet"), str(tmp_path / "out")
    assert main(["convert", "thumbs", source, "--thumbs_column", "rating", "--output_dir", out]) == 0
    printed = capsys.readouterr().out
    assert "The median equals the minimum, 0. Training moves τ to 0.5" in printed
    assert "1 positive, 2 negative" in printed


def test_the_command_averages_ratings(tmp_path, capsys):
    rated([1, 4, 3], [1, 2, 1]).to_parquet(tmp_path / "ratings.parquet")
    command = ["convert", "ratings", str(tmp_path / "ratings.parquet"), "--rating_column", "rating"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    assert "3 ratings of 2 images" in capsys.readouterr().out
    assert rows_of(load_dataset(str(tmp_path / "out"), split="train"), "score") == [("p", png(1), 2), ("p", png(2), 4)]
