"""Runs pushed to the loopback Hub: every family and strategy, what failed or was left out, and no token anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import LoopbackHub
from tests.pipelines import FAMILIES
from tgol_trainer.backbones import BACKBONES

pytestmark = pytest.mark.xdist_group("hub training")

ROOT = Path(__file__).parents[1]
RUN = {"README.md", "card_facts.json", "pytorch_lora_weights.safetensors", "tgol_state.json", "training_args.json"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
PUSHED = ("sd", "sdxl", "sd3", "flux", "wan", "amused", "meissonic")


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


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pushed")


@pytest.fixture(scope="module")
def results(hub, folder):
    (folder / "runs").mkdir()
    done = client(hub, folder / "home", "tests.hub.trainings", folder / "runs")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_family_is_pushed_with_card_picture_metrics_and_settings(results):
    assert {type(FAMILIES[name].build()).__name__ for name in PUSHED} == set(BACKBONES)
    for name in PUSHED:
        assert set(results["families"][name]["files"]) == RUN | {"before_after.png", "metrics.json"}
        assert results["families"][name]["commits"] == ["End of training", "initial commit"]


def test_a_fresh_process_with_an_empty_cache_loads_exactly_what_was_trained(results, hub, folder):
    done = client(hub, folder / "other-home", "tests.hub.loads", folder / "runs", *PUSHED, "sd=refused")
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == {name: [True, True] for name in (*PUSHED, "refused")}


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
        assert set(found["files"]) == RUN | {f"{part}/{file}" for part in checkpoints for file in RUN | STATE}
        assert [name for name in found["left"] if name.startswith(("_", "checkpoint"))] == ["checkpoint-3"]


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
    assert RUN | {f"last-checkpoint/{file}" for file in RUN | STATE} == set(found["after"]["files"])


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
    """The output of the processes is searched where they run."""
    found = results["secrets"]
    assert all("failed" in text and "hf_" + "loop" not in text for text in found["said"])
    assert "***" in found["said"][0]
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if "tfevents" in path.name]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()]
    for kind, name in hub.store.repositories:
        for path, content in hub.files(name, kind).items():
            assert hub.token.encode() not in content, path


ROW = '{{"file_name": "{0}.png", "prompt": "a red circle", "score": {0}}}\n'


def test_tgol_train_ends_with_3_where_a_push_failed_and_tgol_push_goes_on(results, hub, folder):
    from PIL import Image

    tgol = [sys.executable, "-c", "from tgol_trainer.cli import main; exit(main())"]
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (number * 30, 0, 0)).save(pictures / f"{number}.png")
    (pictures / "metadata.jsonl").write_text("".join(ROW.format(number) for number in range(8)))
    options = "--model_name_or_path shapes --dataset_name pictures --output_dir run --hub_model_id tester/shell "
    options += "--per_device_train_batch_size 4 --max_steps 2 --save_steps 1 --hub_strategy every_save --use_cpu "
    options += "--hub_always_push --report_to none --disable_tqdm true --push_to_hub"
    # The first two commits are those of the checkpoints, the third that of the end.
    hub.fail("commit", status=403, times=None, skip=1)
    done = client(hub, folder / "home", "train", *options.split(), command=tgol)
    assert done.returncode == 3, done.stderr[-3000:]
    assert done.stderr.count("The token may not write there (403)") == 2  # of checkpoint-2, and of the end
    assert "`tgol push run --hub_model_id tester/shell` pushes run again" in done.stderr
    assert "Saved to run" in done.stdout and "Traceback" not in done.stderr
    hub.faults.clear()
    done = client(hub, folder / "home", "push", "run", "--hub_model_id", "tester/shell", command=tgol)
    assert done.returncode == 0 and "Pushed and compared: http" in done.stdout
    weights = "pytorch_lora_weights.safetensors"
    assert hub.files("tester/shell")[weights] == (folder / "run" / weights).read_bytes()
    titles = [commit.title for commit in hub.repository("tester/shell").history("main")]
    assert titles == ["Push run", "Training in progress, step 1", "initial commit"]
