"""Runs and datasets pushed to the loopback Hub: every family and strategy, failures, cards, no token anywhere."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml

from tests import ROOT
from tests.helpers import quick
from tests.hub import LoopbackHub

pytestmark = pytest.mark.xdist_group("hub training")

RUN = {"README.md", "card_facts.json", "pytorch_lora_weights.safetensors", "tgol_state.json", "training_args.json"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"}
PUSHED = {
    "some families": ("sd", "wan", "z-image", "meissonic"),
    "all families": ("sd", "sdxl", "sd3", "flux", "wan", "z-image", "amused", "meissonic"),
}
"""Some: an adapter that the pipeline loads, a video model, and an adapter that the denoiser loads."""


def client(hub, home, *arguments, command=(sys.executable, "-m"), **environment):
    """A fresh process with an empty cache; its output must not hold the token."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=home.parent,
        env={**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert hub.token not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", params=quick(PUSHED, "some families"))
def pushed(request):
    """The pipelines that are pushed: the push is the same code for all, so all of them are a slow test."""
    return PUSHED[request.param]


@pytest.fixture(scope="module")
def hub(pushed):
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pushed):
    return tmp_path_factory.mktemp("pushed")


@pytest.fixture(scope="module")
def results(hub, folder, pushed):
    """What the scenarios of a process that trains and pushes found, by name."""
    (folder / "runs").mkdir()
    done = client(hub, folder / "home", "tests.hub.trainings", folder / "runs", *pushed)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_family_is_pushed_with_card_image_metrics_and_settings(results, pushed):
    for name in pushed:
        twin = set() if name in ("amused", "meissonic") else {f"{name}_comfyui.safetensors"}
        assert set(results["families"][name]["files"]) == RUN | twin | {"before_after.png", "metrics.json"}
        assert results["families"][name]["commits"] == ["End of training", "initial commit"]


@pytest.fixture(scope="module")
def loaded(results, hub, folder, pushed):
    """What a fresh process with an empty cache finds on the Hub."""
    done = client(hub, folder / "other-home", "tests.hub.loads", folder / "runs", *pushed, "sd=refused")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(results):
    """Exit codes and output of the commands."""
    found = results["commands"]
    return found["codes"], SimpleNamespace(stdout=found["stdout"], stderr=found["stderr"])


def test_a_fresh_process_with_an_empty_cache_loads_exactly_what_was_trained(loaded, pushed):
    assert loaded["equal"] == {name: [True, True] for name in (*pushed, "refused")}


def test_no_program_of_a_repository_is_run(loaded):
    assert set(loaded["others"]["said"]) == {"model", "dataset"}
    assert not loaded["others"]["ran"]


def test_each_strategy_pushes_its_saves_also_of_checkpoints_that_were_deleted_meanwhile(results):
    steps = [f"Training in progress, step {step}" for step in (3, 2, 1)]
    both = [title for step in steps for title in (f"{step}, checkpoint", step)]
    wanted = {
        "every_save": (steps, []),
        "checkpoint": (both, ["last-checkpoint"]),
        "all_checkpoints": (both, ["checkpoint-1", "checkpoint-2", "checkpoint-3"]),
    }
    for strategy, (titles, checkpoints) in wanted.items():
        found = results["strategies"][strategy]
        assert found["commits"] == ["The end", *titles, "initial commit"]
        inside = {f"{part}/{file}" for part in checkpoints for file in RUN | STATE}
        assert set(found["files"]) == RUN | inside | {f"{strategy}_comfyui.safetensors"}
        left = [name for name in found["left"] if name.startswith(("_", "checkpoint"))]
        assert left == ["checkpoint-3"] + ["checkpoint_comfyui.safetensors"] * (strategy == "checkpoint")


def test_a_save_that_was_left_out_is_said_and_sent_by_the_last_push(results):
    during, after = results["left_out"]["during"], results["left_out"]["after"]
    assert "Training in progress, step 2" not in during["commits"]
    [said] = [line for line in during["log"] if line.startswith("Not pushed during training")]
    assert "checkpoint-2, checkpoint-3" in said and "hub_always_push=True" in said
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= set(after["files"])


def test_pushes_that_failed_are_said_and_the_command_sends_the_run_without_training(results, folder):
    found = results["failures"]
    assert found["failed"] == ["checkpoint-1"] and found["during"]["files"] == []
    [said] = [line for line in found["during"]["log"] if "in the background failed" in line]
    command = f"tgol push {folder / 'runs' / 'refused'} --hub_model_id tester/refused --hub_strategy checkpoint"
    for text in (said, found["said"]):
        assert "(403)" in text and command in text
    assert found["code"] == 0
    inside = {f"last-checkpoint/{file}" for file in RUN | STATE}
    assert set(found["after"]["files"]) == RUN | inside | {"refused_comfyui.safetensors"}


def test_visibility_access_branch_and_title_are_as_chosen_and_full_weights_go_as_a_folder(results):
    found = results["choices"]
    assert (found["private"], found["gated"]) == (True, "manual")
    assert found["main"] == [] and found["commits"][0] == "My title"
    weights = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert set(found["files"]) == RUN - {"pytorch_lora_weights.safetensors"} | weights


def test_the_command_points_the_snippet_of_the_card_at_the_repository(results):
    found = results["choices"]
    assert found["codes"] == [0, 0, 1]
    places = [".", "tester/quiet", "tester/loud"]
    assert found["snippets"] == [f"pipe.load_lora_weights({place!r})" for place in places]


def test_no_file_commit_log_or_message_of_a_run_holds_the_token(results, hub, folder):
    """The output of the processes, that of the commands included, is searched where they run."""
    found = results["secrets"]
    assert all("failed" in text and "hf_" + "loop" not in text for text in found["said"])
    assert "***" in found["said"][0]
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if "tfevents" in path.name]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()]
    for kind, name in hub.store.repositories:
        for path, content in hub.files(name, kind).items():
            assert hub.token.encode() not in content, path


# ---- By the commands ----


def test_tgol_train_ends_with_3_where_a_push_failed_and_tgol_push_goes_on(made, hub, folder):
    codes, done = made
    assert (codes["train"], codes["push the run"]) == (3, 0)
    assert done.stderr.count("to tester/shell. The token may not write there (403)") == 2  # checkpoint-2, and the end
    assert "`tgol push run --hub_model_id tester/shell` pushes run again" in done.stderr
    assert "Saved to run" in done.stdout and "Traceback" not in done.stderr
    weights = "pytorch_lora_weights.safetensors"
    assert hub.files("tester/shell")[weights] == (folder / "run" / weights).read_bytes()
    titles = [commit.title for commit in hub.repository("tester/shell").history("main")]
    assert titles == ["Push run", "Training in progress, step 1", "initial commit"]


def test_a_token_on_the_command_line_is_refused_and_not_repeated(made):
    codes, done = made
    assert codes["token"] == 1
    assert "error: --hub_token:" in done.stderr and "hf_0123" not in done.stderr


def test_only_the_first_process_pushes_and_only_when_every_shard_is_there(made, hub):
    codes, done = made
    assert (codes["rank 1"], codes["half"], codes["generate"]) == (0, 1, 0)
    assert "1 of 2 shards of images are not there, so nothing was pushed" in done.stderr
    assert ("datasets", "tester/half") not in hub.store.repositories
    titles = [commit.title for commit in hub.repository("tester/images", "datasets").history("main")]
    assert titles == ["Images", "initial commit"]
    shards = [f"data/train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    assert sorted(hub.files("tester/images", "datasets")) == ["README.md", *shards]


def test_a_push_that_failed_leaves_the_scores_and_goes_on_with_the_command(made, hub):
    codes, done = made
    assert (codes["refused"], codes["push"], codes["as a model"]) == (3, 0, 1)
    assert "`tgol push scored --hub_dataset_id tester/scored` pushes scored again" in done.stderr
    assert len(hub.files("tester/scored", "datasets")) == 4  # two shards, the card and the facts of the rewards


def test_a_hub_dataset_is_scored_as_a_stream_into_another_row_for_row(made, hub):
    codes, _ = made
    assert codes["streamed"] == 0
    source, streamed, whole = (hub.files(f"tester/{name}", "datasets") for name in ("images", "streamed", "scored"))
    tables = [
        [parquet.read_table(io.BytesIO(files[name])) for name in sorted(files) if name.endswith(".parquet")]
        for files in (streamed, whole)
    ]
    assert pa.concat_tables(tables[0]).equals(pa.concat_tables(tables[1]))
    assert len(tables[0]) == sum(name.endswith(".parquet") for name in source)
    card = streamed["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["source_datasets"] == ["tester/images"]
    assert "* Source: `tester/images`" in card


def test_what_a_score_of_a_hub_dataset_is_goes_along_into_the_folder_of_the_next_one(made, folder):
    codes, _ = made
    first, second = (json.loads((folder / name / "rewards.json").read_text()) for name in ("scored", "again"))
    assert codes["again"] == 0 and set(second) == {"background_darkness", "jpeg_compressibility"}
    assert second["background_darkness"] == first["background_darkness"]


def test_the_card_states_columns_scores_source_and_making_and_keeps_what_a_person_wrote(made, hub):
    files = hub.files("tester/scored", "datasets")
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert metadata["source_datasets"] == ["tester/images"] and "scored" in metadata["tags"]
    shards = [parquet.read_table(io.BytesIO(files[name])) for name in sorted(files) if name.endswith(".parquet")]
    scores = np.concatenate([shard["background_darkness"].to_numpy() for shard in shards])
    for value in (scores.mean(), scores.std(), np.median(scores), scores.max()):
        assert f"| {value:.5g} |" in card
    # The counts of the histogram stand at the ends of its lines.
    bars = card.split("```text\n")[1].split("```")[0].splitlines()
    assert sum(int(line.split()[-1]) for line in bars) == len(scores) == 8
    commit = hub.repository("tester/images", "datasets").branches["main"]
    assert f"`tester/images`, revision `{commit}`" in card
    assert "model `shapes`" in card and "license of the model: apache-2.0" in card
    assert "My own note." in card
    # Features in the file itself, from which the Hub's viewer knows that a column holds images.
    assert json.loads(shards[0].schema.metadata[b"huggingface"])["info"]["features"]["image"]["_type"] == "Image"


def test_a_dataset_of_the_hub_feeds_the_trainer_and_is_named_with_its_commit(loaded, hub):
    found = loaded["used"]
    assert (found["rows"], found["image"], found["size"], found["steps"]) == (8, "Image", [32, 32], 1)
    assert found["columns"][:2] == ["prompt", "image"] and found["columns"][-1] == "background_darkness"
    assert found["source"] == ["tester/scored", hub.repository("tester/scored", "datasets").branches["main"]]
