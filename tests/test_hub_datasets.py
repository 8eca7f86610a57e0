"""Datasets pushed by `tgol generate` and `tgol score`: complete or not at all, with a card, trained on."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import yaml

from tests.hub import LoopbackHub
from tests.test_hub_training import client

pytestmark = pytest.mark.xdist_group("hub datasets")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def made(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    done = client(hub, folder / "home", "tests.hub.datasets_client", "make")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done, folder


def test_only_the_first_process_pushes_and_only_when_every_shard_is_there(made, hub):
    codes, done, _ = made
    assert (codes["rank 1"], codes["half"], codes["generate"]) == (0, 1, 0)
    assert "1 of 2 shards of pictures are not there, so nothing was pushed" in done.stderr
    assert ("datasets", "tester/half") not in hub.store.repositories
    titles = [commit.title for commit in hub.repository("tester/pictures", "datasets").history("main")]
    assert titles == ["Pictures", "initial commit"]
    shards = [f"data/train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    assert sorted(hub.files("tester/pictures", "datasets")) == ["README.md", *shards]


def test_a_push_that_failed_leaves_the_scores_and_goes_on_with_the_command(made, hub):
    codes, done, _ = made
    assert (codes["refused"], codes["push"], codes["as a model"]) == (3, 0, 1)
    assert "`tgol push scored --hub_dataset_id tester/scored` pushes scored again" in done.stderr
    assert len(hub.files("tester/scored", "datasets")) == 3


def test_the_card_states_columns_scores_source_and_making_and_keeps_what_a_person_wrote(made, hub):
    files = hub.files("tester/scored", "datasets")
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert metadata["source_datasets"] == ["tester/pictures"] and "scored" in metadata["tags"]
    shards = [parquet.read_table(io.BytesIO(files[name])) for name in sorted(files) if name.endswith(".parquet")]
    scores = np.concatenate([shard["background_darkness"].to_numpy() for shard in shards])
    for value in (scores.mean(), scores.std(), np.median(scores), scores.max()):
        assert f"| {value:.5g} |" in card
    # The counts of the histogram stand at the ends of its lines.
    bars = card.split("```text\n")[1].split("```")[0].splitlines()
    assert sum(int(line.split()[-1]) for line in bars) == len(scores) == 8
    commit = hub.repository("tester/pictures", "datasets").branches["main"]
    assert f"`tester/pictures`, revision `{commit}`" in card
    assert "model `shapes`" in card and "license of the model: apache-2.0" in card
    assert "My own note." in card
    # Features in the file itself, from which the Hub's viewer knows that a column holds pictures.
    assert json.loads(shards[0].schema.metadata[b"huggingface"])["info"]["features"]["image"]["_type"] == "Image"


def test_a_dataset_of_the_hub_feeds_the_trainer_and_is_named_with_its_commit(made, hub):
    _, _, folder = made
    done = client(hub, folder / "other-home", "tests.hub.datasets_client", "use", command=(sys.executable, "-m"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"], found["image"], found["size"], found["steps"]) == (8, "Image", [32, 32], 1)
    assert found["columns"][:2] == ["prompt", "image"] and found["columns"][-1] == "background_darkness"
    assert found["source"] == ["tester/scored", hub.repository("tester/scored", "datasets").branches["main"]]
