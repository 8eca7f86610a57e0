"""The journal of `tgol rate`: what was said stays said, and training reads it without another step."""

import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tgol_trainer.data import DataError
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.sources.loading import load_columns
from tgol_trainer.sources.ratings import JOURNAL, SETTINGS, Journal, RateSettings, write_settings


@pytest.fixture
def folder(tmp_path):
    """An empty folder of ratings with four images, each of one value."""
    path = tmp_path / "rated"
    (path / "images").mkdir(parents=True)
    for value in range(4):
        Image.new("RGB", (4, 4), (value, value, value)).save(path / "images" / f"{value}.png")
    write_settings(path, RateSettings("ratings", "pictures"))
    return path


def rate(journal, rater, image, rating, prompt="a cat"):
    content = {"prompt": prompt, "image": f"images/{image}.png", "rating": rating}
    journal.append(rater, f"task {image}", content)


def values(dataset):
    return [int(np.asarray(image)[0, 0, 0]) for image in dataset["image"]]


def test_the_score_is_the_mean_over_raters_of_the_last_that_each_said(folder):
    journal = Journal(folder)
    rate(journal, "anna", 0, 1)
    rate(journal, "anna", 0, 5)  # she has changed her mind
    rate(journal, "bob", 0, 2)
    rate(journal, "anna", 1, 4)
    journal.append("bob", "task 1", {"skipped": True})
    rate(journal, "anna", 2, 3)
    journal.append("anna", "task 2", {"undone": True})
    dataset = load_scored_dataset(str(folder))
    assert dataset["score"][:] == [3.5, 4.0] and dataset["num_ratings"][:] == [2, 1]
    assert dataset["score_std"][:] == [1.5, 0.0]
    assert values(dataset) == [0, 1] and dataset["prompt"][:] == ["a cat"] * 2


def test_the_folder_its_journal_and_a_stream_give_the_same_rows(folder):
    journal = Journal(folder)
    for image in range(4):
        rate(journal, "anna", image, image + 1)
    scores = [1.0, 2.0, 3.0, 4.0]
    assert load_scored_dataset(str(folder))["score"][:] == scores
    assert load_scored_dataset(str(folder / JOURNAL))["score"][:] == scores
    assert [row["score"] for row in load_scored_dataset(str(folder), streaming=True)] == scores
    assert load_columns(str(folder), ["score"])["score"][:] == scores  # as `tgol label` reads


def test_thumbs_are_shares_and_pairs_are_win_rates(folder):
    write_settings(folder, RateSettings("thumbs", "pictures"))
    journal = Journal(folder)
    for rater, thumb in (("anna", "up"), ("bob", "up"), ("carl", "down")):
        rate(journal, rater, 0, thumb)
    assert load_scored_dataset(str(folder))["score"][:] == [pytest.approx(2 / 3)]
    (folder / JOURNAL).unlink()
    write_settings(folder, RateSettings("pairs", "pictures"))
    journal = Journal(folder)
    for first, second, choice in ((0, 1, "first"), (1, 2, "tie"), (2, 0, "first")):
        content = {"prompt": "a cat", "image_0": f"images/{first}.png", "image_1": f"images/{second}.png"}
        journal.append("anna", f"{first} and {second}", {**content, "choice": choice})
    dataset = load_scored_dataset(str(folder))
    # Image 0 won one of two; 1 lost one and tied one; 2 tied one and won one.
    assert dict(zip(values(dataset), dataset["score"], strict=True)) == {0: 0.5, 1: 0.25, 2: 0.75}


KILLED = """
import sys
from tgol_trainer.sources.ratings import Journal
journal = Journal(sys.argv[1])
for number in range(100_000):
    image = number % 4
    journal.append("anna", f"task {number}", {"prompt": "a cat", "image": f"images/{image}.png", "rating": 1 + image})
    print(number, flush=True)
"""


def test_what_was_answered_is_there_after_a_kill(folder):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    seen = [int(process.stdout.readline()) for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    seen += [int(line) for line in process.stdout.read().split()]
    process.wait()
    there = {entry["task"] for entry in Journal(folder).rated()}
    assert {f"task {number}" for number in seen} <= there and len(there) <= len(seen) + 1


def test_a_line_that_was_cut_off_costs_itself_alone(folder, caplog):
    rate(Journal(folder), "anna", 0, 5)
    whole = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(whole + whole[:40])
    rate(Journal(folder), "anna", 1, 2)
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        assert load_scored_dataset(str(folder))["score"][:] == [5.0, 2.0]
    assert f"{folder / JOURNAL}: lines that are no ratings and are left out: 1 (2)." in caplog.text


def test_what_cannot_be_read_says_why(folder):
    with pytest.raises(DataError, match=r"nothing in .* is rated yet. Run `tgol rate pictures` first"):
        load_scored_dataset(str(folder))
    rate(Journal(folder), "anna", 0, 5)
    with pytest.raises(DataError, match="one split, 'train', without 'test'"):
        load_scored_dataset(str(folder), split="test")
    (folder / "images" / "0.png").unlink()
    with pytest.raises(DataError, match="image file not found: 1"):
        load_scored_dataset(str(folder))
    write_settings(folder, RateSettings("pairs", "pictures"))
    with pytest.raises(DataError, match="a rating lacks 'image_0', so it is not of the kind 'pairs'"):
        load_scored_dataset(str(folder))
    (folder / SETTINGS).write_text(json.dumps({"kind": "stars", "source": "pictures"}))
    with pytest.raises(DataError, match="kind 'stars' is not known"):
        load_scored_dataset(str(folder))
