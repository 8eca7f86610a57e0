"""Two real processes on a CPU train what one process trains, and nothing is done twice."""

import importlib.util
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from tests.launch.processes import (
    PROGRAM,
    SCRIPT,
    alone,
    assert_same_log,
    flags_for,
    free_port,
    lines,
    records_of,
    succeed,
    torchrun,
    write_parquet,
)
from tgol_trainer.metrics import LOGGED_METRICS
from tgol_trainer.shapes import PROMPTS

# One worker runs them all: the launches are shared between tests, and two at a time would only slow each other down.
pytestmark = [pytest.mark.xdist_group("launch"), pytest.mark.timeout(3600)]  # `launch` notices what hangs

NUM_ROWS, NUM_EVAL_ROWS = 27, 11
"""27 rows are 3 updates of 8 and 3 rows too many, so that 4 updates reach into a second epoch."""

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
EVALUATED |= {"per_device_eval_batch_size": 4}

# Three batches of 4, 4 and 1 images for two processes; the best score chooses what is kept.
EVALUATED |= {"sample_prompts": list(PROMPTS[:3]), "sample_seeds": [0, 1, 2], "sample_num_inference_steps": 2}
EVALUATED |= {"reward_funcs": ["background_darkness", "colour_faithfulness"]}
EVALUATED |= {"metric_for_best_model": "samples/background_darkness/mean"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    scores = np.random.default_rng(1).normal(size=NUM_ROWS)
    write_parquet(folder / "data" / "train.parquet", scores)
    # Four of eleven are positive whatever the median of the training scores, 12 rows could not give that share.
    write_parquet(folder / "data" / "test.parquet", [9.0] * 4 + [-9.0] * 7, seed=2)
    # Rank 0 reads the rows 0-3, 8-11, ..., rank 1 the others.
    write_parquet(folder / "one_sided" / "train.parquet", [2.0, 2.1, 2.2, 2.3, 1.0, 1.1, 1.2, 1.3] * 3)
    # A file for each process of a stream.
    scores = np.random.default_rng(3).normal(size=40)
    write_parquet(folder / "uneven" / "train-00000-of-00002.parquet", scores[:8], seed=3)
    write_parquet(folder / "uneven" / "train-00001-of-00002.parquet", scores[8:], seed=4)
    # Four images of each of eight prompts: two updates of 16 rows an epoch, by halves of two groups.
    write_parquet(folder / "groups" / "train.parquet", np.random.default_rng(2).normal(size=32), prompts=PROMPTS[:8])
    return folder


PAIRED = {"loss_type": "dpo", "group_size": 4, "share_group_noise": "true"}
PAIRED |= {"gradient_accumulation_steps": 2, "max_steps": 3}


DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
DIVIDED = ["sharded", pytest.param("zero2", marks=pytest.mark.skipif(not DEEPSPEED, reason="needs DeepSpeed"))]
"""The runs that FSDP2 and ZeRO-2 divide."""

EPOCHS = {"reference_update": "epoch", "max_steps": 7, "save_strategy": "steps", "save_steps": 4}
"""Into a third epoch, so that the reference moves twice; the checkpoint lies in the second."""

UNEVEN = {"dataset_streaming": "true", "save_strategy": "epoch", "max_steps": 10}
"""A pass of 8 steps, at whose end all processes save together, and two of the next."""

ENDED = ("refused", "stopped")


@pytest.fixture(scope="module")
def launched(place):
    """One launch of two processes for every run, since most of its time goes to starting: records by name, output."""
    records = place / "launched"
    records.mkdir()
    forgotten = flags_for(place / "data", place / "forgotten", 4)
    position = forgotten.index("--use_cpu")
    runs = {
        "forgotten": ["refused", *forgotten[:position], *forgotten[position + 2 :]],
        "two": flags_for(place / "data", place / "two", 4, **EVALUATED),
        "one sided": flags_for(
            place / "one_sided", place / "sided", 4, max_steps=3, train_sampling_strategy="sequential"
        ),
        "stream": flags_for(place / "uneven", place / "stream", 4, **UNEVEN),
        "stream again": [
            *flags_for(place / "uneven", place / "stream_again", 4, **UNEVEN),
            *("--resume_from_checkpoint", str(place / "stream" / "checkpoint-8")),
        ],
        "offloaded": flags_for(place / "data", place / "offloaded", 4, group_offload="true", max_steps=2),
        "pairs": flags_for(place / "groups", place / "pairs", 4, **PAIRED),
        "stopped": ["stopped", *flags_for(place / "data", place / "stopped", 4)],
        "continued": flags_for(place / "data", place / "stopped", 4, resume_from_checkpoint="true"),
        "whole": flags_for(place / "data", place / "whole", 4, **EPOCHS),
    }
    for way in ("sharded", "zero2") if DEEPSPEED else ("sharded",):
        runs[way] = [way, *flags_for(place / "data", place / way, 4, **EPOCHS)]
        again = flags_for(place / "data", place / f"{way}_again", 4, **EPOCHS)
        runs[f"{way} again"] = [way, *again, "--resume_from_checkpoint", str(place / way / "checkpoint-4")]
    flags = [text for group in runs.values() for text in ("--", *group)][1:]
    done = succeed(torchrun(PROGRAM, records, 2, *flags), place)
    found = {name: records_of(records, run=number) for number, name in enumerate(runs) if runs[name][0] not in ENDED}
    return SimpleNamespace(records=found, out=done.out, err=done.err)


@pytest.fixture(scope="module")
def two(place, launched):
    """Two processes, batches of 4."""
    return SimpleNamespace(output=place / "two", records=launched.records["two"])


@pytest.fixture(scope="module")
def one(place):
    """One process, batches of 8."""
    record = alone(place / "one_records", flags_for(place / "data", place / "one", 8, **EVALUATED))
    return SimpleNamespace(output=place / "one", records=[record])


# ---- Two processes against one ----


def test_both_processes_see_the_rows_of_one_process_each_row_once(one, two):
    """Step for step: the two halves of a batch are the batch, also in the second epoch."""
    whole = [sorted(rows) for rows in one.records[0]["row_ids"]]
    halves = [sorted(left + right) for left, right in zip(*(r["row_ids"] for r in two.records), strict=True)]
    assert halves == whole
    assert [len(rows) for rows in whole] == [8] * 4
    first_epoch = [row for rows in whole[:3] for row in rows]
    assert len(set(first_epoch)) == 24
    assert set(whole[3]) & set(first_epoch)


def test_the_threshold_is_exactly_the_same_on_every_process_and_in_every_file(one, two):
    values = {record["threshold"] for record in [*one.records, *two.records]}
    for folder in (one.output, two.output, two.output / "checkpoint-2"):
        values.add(json.loads((folder / "tgol_state.json").read_text())["threshold"]["value"])
    assert len(values) == 1


def test_two_processes_log_the_losses_and_metrics_of_one(one, two):
    training = lines(one.records[0])
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert set(LOGGED_METRICS) <= set(training[0])
    assert training[-1]["rewards/positive"] != 0
    assert_same_log(training, lines(two.records[0]))


def test_two_processes_arrive_at_the_adapter_of_one(one, two):
    """The second halves start at 0, so their size is how far training went; Adam divides noise by noise near 0."""
    ours, theirs = (load_file(run.output / "pytorch_lora_weights.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    moved = [name for name in ours if name.endswith("lora_B.weight")]
    size = math.sqrt(sum(ours[name].square().sum().item() for name in moved))
    apart = math.sqrt(sum((ours[name] - theirs[name]).square().sum().item() for name in moved))
    assert size > 0
    assert apart <= 1e-2 * size
    for name in set(ours) - set(moved):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-4)


def test_only_the_first_process_writes_and_writes_each_folder_once(two):
    first, second = two.records
    assert first["adapters"] == first["cards"] == ["checkpoint-2", "checkpoint-4", "two"]
    assert sorted(first["states"]) == sorted([*first["cards"]] * 2)  # threshold and arguments
    assert second["adapters"] == second["cards"] == second["states"] == []
    assert (two.output / "README.md").read_text().startswith("---\n")
    assert "2 × CPU" in (two.output / "README.md").read_text()


def test_what_both_processes_know_is_said_once_a_run(launched):
    said = launched.out + launched.err
    for text in ("Threshold ", "Saved to ", "'train_runtime'"):
        assert said.count(text) == len(launched.records) + (text == "Threshold ")  # and the run that was stopped


def test_evaluation_on_two_processes_counts_each_of_eleven_rows_once(one, two):
    evaluations = lines(one.records[0], "eval_loss")
    assert [line["step"] for line in evaluations] == [2, 4]
    assert all(line["eval_labels/positive_share"] == 4 / 11 for line in evaluations)
    assert_same_log(evaluations, lines(two.records[0], "eval_loss"))
    for line in lines(two.records[0], "eval_loss"):
        assert line["eval_labels/positive_share"] == 4 / 11
        assert line["eval_scores/mean"] == pytest.approx((4 * 9 - 7 * 9) / 11)
    # The samplers did fill up to twelve: this is the case in which a row could count twice.
    assert sum(len(rows) for record in two.records for rows in record["eval_row_ids"]) > 2 * NUM_EVAL_ROWS


def test_two_processes_draw_their_shares_of_the_images_of_one_and_agree_on_their_scores(one, two):
    key = "samples/background_darkness/mean"
    alone, (left, right) = lines(one.records[0], key), (lines(record, key) for record in two.records)
    assert [line["step"] for line in alone] == [0, 2, 4]
    assert [{**line, "epoch": 0} for line in left] == [{**line, "epoch": 0} for line in right]
    assert_same_log(alone[1:], left[1:])
    assert alone[0] == left[0]
    files = sorted(file.relative_to(one.output) for file in (one.output / "samples").rglob("*.png"))
    assert len(files) == 3 * 9 + 1
    for file in files:
        if file.name != "strip.png":
            ours, theirs = (np.asarray(Image.open(run.output / file), dtype=int) for run in (one, two))
            assert abs(ours - theirs).max() <= (0 if "base" in file.parts else 2)
    evaluations = [lines(record, f"eval_{key}") for record in two.records]
    assert [[line[f"eval_{key}"] for line in found] for found in evaluations] == [[line[key] for line in left[1:]]] * 2
    assert (two.output / "samples" / "strip.png").is_file()


# ---- Resuming, with the other launcher ----


def test_accelerate_launch_resumes_a_checkpoint_of_two_processes_to_the_same_losses(place, two):
    """The script itself: that there were two is shown by their random states, one a process, in the checkpoint."""
    output = place / "resumed"
    output.mkdir()
    shutil.copytree(two.output / "checkpoint-2", output / "checkpoint-2")
    flags = flags_for(place / "data", output, 4, **EVALUATED, resume_from_checkpoint="true")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    succeed([*start, "--main_process_port", free_port(), SCRIPT, *flags], place, ACCELERATE_USE_CPU="true")
    saved = {file.name for file in (output / "checkpoint-4").glob("rng_state*")}
    assert saved == {"rng_state_0.pth", "rng_state_1.pth"}
    again = json.loads((output / "trainer_state.json").read_text())
    wanted = [line["loss"] for line in lines(two.records[0])]
    assert [line["loss"] for line in lines(again)] == pytest.approx(wanted, rel=1e-6)
    assert [line["eval_loss"] for line in lines(again, "eval_loss")] == pytest.approx(
        [line["eval_loss"] for line in lines(two.records[0], "eval_loss")], rel=1e-6
    )
    ours, theirs = (load_file(run / "pytorch_lora_weights.safetensors") for run in (two.output, output))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-8)


def test_a_signal_to_one_process_stops_both_at_one_step_and_the_run_goes_on_as_if_it_had_not(place, launched, two):
    assert launched.err.count("refused with exit code 143") == 2
    assert launched.err.count("is saved. Go on with the same command and --resume_from_checkpoint true.") == 1
    state = json.loads((place / "stopped" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3  # the step after the one that got the signal: then they agree
    wanted = [line["loss"] for line in lines(two.records[0])]
    assert [line["loss"] for line in lines(launched.records["continued"][0])] == pytest.approx(wanted, rel=1e-6)


# ---- FSDP2 and ZeRO-2 ----


@pytest.mark.parametrize("way", DIVIDED)
def test_divided_training_trains_what_whole_copies_train_and_moves_the_reference_with_the_epochs(launched, place, way):
    assert_same_log(lines(launched.records["whole"][0]), lines(launched.records[way][0]))
    ours, theirs = (load_file(place / run / "pytorch_lora_weights.safetensors") for run in (way, "whole"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    state = json.loads((place / way / "tgol_state.json").read_text())
    assert state["reference_epoch"] == 2


@pytest.mark.parametrize("way", DIVIDED)
def test_a_checkpoint_of_divided_training_holds_no_frozen_weight_and_goes_on_where_it_was(launched, place, way):
    folder = place / way / "checkpoint-4"
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "pytorch_lora_weights.safetensors",
        "reference_lora_weights.safetensors",
    }
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 3e6  # the base has 5.4 MB
    if way == "sharded":
        metadata = FileSystemReader(folder / "optimizer_0").read_metadata()
        moments = [key for key in metadata.state_dict_metadata if ".exp_avg." in f"{key}."]
        assert moments and all(".lora_" in key for key in moments)
    wanted = lines(launched.records[way][0])[4:]
    again = [line for line in lines(launched.records[f"{way} again"][0]) if line["step"] > 4]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in wanted], rel=1e-6)
    ours, theirs = (load_file(place / run / "pytorch_lora_weights.safetensors") for run in (f"{way}_again", way))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-8)


# ---- Data on which processes could wait for each other ----


def test_a_process_that_sees_one_class_only_does_not_stop_the_others(launched):
    left, right = launched.records["one sided"]
    assert left["labels"] == [[True] * 4] * 3
    assert right["labels"] == [[False] * 4] * 3
    logged = lines(left)
    assert [line["step"] for line in logged] == [1, 2, 3]
    for line in logged:
        assert set(LOGGED_METRICS) <= set(line)
        assert all(math.isfinite(value) for value in line.values())
        assert line["labels/positive_share"] == 0.5


def test_one_sided_processes_log_what_one_process_with_both_classes_logs(place, launched):
    flags = flags_for(place / "one_sided", place / "both", 8, max_steps=3, train_sampling_strategy="sequential")
    assert_same_log(lines(alone(place / "both_records", flags)), lines(launched.records["one sided"][0]))


def test_two_processes_that_keep_their_blocks_on_the_cpu_log_what_two_without_do(launched):
    same = ("step", "loss", "grad_norm", "drift", "rewards/margins", "weights/mean")
    plain, offloaded = (
        [[line[name] for name in same] for line in lines(launched.records[run][0])[:2]] for run in ("two", "offloaded")
    )
    assert np.allclose(plain[0], offloaded[0], rtol=1e-5)
    assert np.allclose(plain[1], offloaded[1], rtol=1e-3)


def test_two_processes_train_on_the_pairs_of_one(place, launched):
    """Diffusion-DPO with accumulation, into the second epoch: the same whole groups, the same losses."""
    whole = alone(place / "pairs_records", flags_for(place / "groups", place / "pairs_alone", 8, **PAIRED))
    left, right = launched.records["pairs"]
    assert all(len({row % 8 for row in rows}) == 1 for rows in left["row_ids"] + right["row_ids"])
    halves = [sorted(a + b) for a, b in zip(left["row_ids"], right["row_ids"], strict=True)]
    assert halves == [sorted(rows) for rows in whole["row_ids"]]
    assert halves[:2] != halves[4:6]
    assert_same_log(lines(whole), lines(left))


def test_processes_with_unequal_parts_of_a_stream_end_their_passes_together_and_say_what_repeats(launched, place):
    left, right = launched.records["stream"]
    assert [line["step"] for line in lines(left)] == list(range(1, 11))
    assert all(math.isfinite(value) for line in lines(left) for value in line.values())
    short, long = ([row for rows in record["row_ids"][:8] for row in rows] for record in (left, right))
    assert len(set(short)) == 8 and short == short[:8] * 4
    assert len(set(long)) == 32 and not set(short) & set(long)
    assert left["threshold"] == right["threshold"]
    assert launched.err.count("process 0: 8 rows, 24 repeated; process 1: 32 rows, 0 repeated") == 1
    assert (place / "stream" / "checkpoint-8").is_dir()


def test_two_processes_resume_a_stream_after_its_first_pass_as_if_they_had_not_stopped(launched):
    for whole, again in zip(launched.records["stream"], launched.records["stream again"], strict=True):
        assert again["row_ids"] == whole["row_ids"][8:]
        assert [line["loss"] for line in lines(again)] == pytest.approx(
            [line["loss"] for line in lines(whole)], rel=1e-6
        )


# ---- What is easily forgotten ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, processes without --use_cpu are as they should be")
def test_without_use_cpu_the_error_names_the_flag_and_nothing_is_written(place, launched):
    """Both processes end with exit code 1: the first run of the launch, before anything else has set them up."""
    assert launched.err.count("refused with exit code 1\n") == 2
    assert launched.err.count("The launcher started 2 processes") == 2
    assert launched.err.count("add `--use_cpu true`") == 2
    assert not (place / "forgotten").exists()
