"""Generating and scoring in shards: the same rows whatever is killed, restarted or shared."""

import io
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests import ROOT, tiny, tiny_language
from tests.hub import LoopbackHub
from tgol_trainer import cli
from tgol_trainer.cli.score import _fingerprint
from tgol_trainer.data import DataError
from tgol_trainer.jobs import (
    GenerationSettings,
    ScoringSettings,
    Shards,
    check_complete,
    generate_dataset,
    image_seed,
    read_rewards,
    score_dataset,
    score_stream,
)
from tgol_trainer.jobs.score import note_rewards
from tgol_trainer.rewards import RewardFacts, jpeg_compressibility, load_reward
from tgol_trainer.sources import Prompts, load_prompts

PROMPTS = ["a red circle", "a blue cross", "a green square"]
STYLES = ("anime", "concept-art", "paintings", "photo")


def generate(folder, **overrides):
    options = {"model": "tiny", "images_per_prompt": 3, "shard_size": 4, "batch_size": 2, "num_inference_steps": 2}
    prompts, share = overrides.pop("prompts", PROMPTS), overrides.pop("share", None)
    settings = GenerationSettings(**{**options, **overrides})
    return generate_dataset(tiny.stable_diffusion(), prompts, folder, settings, share=share, progress=False)


def rows(folder):
    dataset = datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")
    return dataset.cast_column("image", datasets.Image(decode=False))[:]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    generate(folder)
    return folder


def test_every_prompt_gets_its_images_in_order_with_the_facts_in_each_row(generated):
    table = rows(generated)
    assert table["prompt"] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert table["image_index"] == [0, 1, 2] * 3
    assert len(set(table["seed"])) == len({image["bytes"] for image in table["image"]}) == 9
    assert set(table["model"]) == {"tiny"} and json.loads(table["settings"][0])["num_inference_steps"] == 2
    assert len(list((generated / "data").iterdir())) == 3  # 9 rows, 4 a shard


def test_two_processes_make_the_rows_of_one(generated, tmp_path):
    for rank in (1, 0):
        generate(tmp_path, share=(rank, 2))
    assert rows(tmp_path) == rows(generated)


def test_a_restart_makes_the_missing_shard_alone_and_the_same(generated, tmp_path):
    files = generate(tmp_path)
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    (files[1].parent / f".{files[1].name}.123").write_bytes(b"half a shard of a killed process")
    generate(tmp_path)
    assert rows(tmp_path) == rows(generated)
    assert files[0].stat().st_mtime_ns == kept


def test_the_folder_loads_as_a_dataset_by_its_path(generated):
    assert datasets.load_dataset(str(generated), split="train")["prompt"][:] == rows(generated)["prompt"]


def test_other_settings_in_the_same_folder_are_refused_by_name(generated):
    with pytest.raises(DataError, match=r"(?s)begun with other settings.*guidance_scale: None there, 3\.0 now"):
        generate(generated, guidance_scale=3.0)
    with pytest.raises(DataError, match="prompts_blake2b"):
        generate(generated, prompts=[*PROMPTS[:2], "a cow"])


def test_an_adapter_that_changed_behind_its_path_does_not_continue_the_folder(generated, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    generate(tmp_path / "out", adapter=str(tmp_path), share=(0, 3))
    save_file({"w": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(DataError, match="weights_blake2b"):
        generate(tmp_path / "out", adapter=str(tmp_path))


def test_a_folder_with_files_of_something_else_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"precious")
    with pytest.raises(DataError, match="files of something else"):
        generate(tmp_path)


def test_the_seed_of_an_image_depends_on_seed_prompt_and_index_alone():
    assert image_seed(0, "a", 1) == image_seed(0, "a", 1)
    assert len({image_seed(s, p, i) for s in range(3) for p in "abc" for i in range(5)}) == 45
    assert all(0 <= image_seed(0, "x", i) < 2**63 for i in range(100))


def test_a_negative_prompt_reaches_the_pipeline_for_each_image_and_a_pipeline_without_one_refuses_it(tmp_path):
    options = {"prompts": PROMPTS[:2], "images_per_prompt": 1}
    generate(tmp_path / "plain", **options)
    generate(tmp_path / "negative", **options, negative_prompt="blurry")
    plain, negative = rows(tmp_path / "plain"), rows(tmp_path / "negative")
    assert plain["seed"] == negative["seed"]
    pipeline, call = tiny.stable_diffusion(), {"negative_prompt": "blurry", "num_inference_steps": 2}
    for made, other, seed, prompt in zip(negative["image"], plain["image"], plain["seed"], PROMPTS, strict=False):
        alone = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
        pixels, before = (np.asarray(Image.open(io.BytesIO(each["bytes"])), np.int16) for each in (made, other))
        assert np.abs(pixels - np.asarray(alone, np.int16)).max() <= 1 < np.abs(pixels - before).max()
    refused = GenerationSettings(negative_prompt="blurry")
    with pytest.raises(TypeError, match="Flux2Pipeline takes no negative prompt"):
        generate_dataset(tiny_language.flux2(), PROMPTS, tmp_path / "x", refused)


def test_a_prompt_that_stands_twice_gets_different_images(tmp_path):
    generate(tmp_path, prompts=["a dog", "a dog"], images_per_prompt=1)
    table = rows(tmp_path)
    assert table["image_index"] == [0, 1] and table["image"][0]["bytes"] != table["image"][1]["bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there are none"),
        ({"prompts": ["a", " "]}, r"prompts \[1\] of 2 are blank"),
        ({"images_per_prompt": 0}, "at least 1"),
        ({"shard_size": 0}, "`shard_size` is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        generate(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("settings", [{"shard_size": 0}, {"batch_size": 0}], ids=["shard", "batch"])
def test_sizes_with_which_no_row_would_ever_be_scored_are_refused(images, tmp_path, settings):
    with pytest.raises(DataError, match=r"`(shard|batch)_size` is 0; it must be at least 1"):
        score_dataset(images, {"r": lambda: None}, tmp_path / "new", ScoringSettings(**settings))


def test_shards_cover_every_row_once(tmp_path):
    shards = Shards(tmp_path, 10, 4, "record.json", {})
    assert [row for shard in range(shards.num_shards) for row in shards.rows(shard)] == list(range(10))
    assert sorted(shard for rank in range(2) for shard in shards.share(rank, 2)) == [0, 1, 2]


# ---- Scores ----


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)) for i in range(7)]
    return datasets.Dataset.from_dict(
        {"prompt": [f"p{i}" for i in range(7)], "image": images, "note": list("abcdefg")}
    )


def kilobytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def length(images, prompts):
    return [float(len(prompt)) for prompt in prompts]


KNOWN = {"jpeg": lambda: jpeg_compressibility, "length": lambda: length}


def score(dataset, folder, names=("jpeg",), **options):
    share, settings = options.pop("share", None), ScoringSettings(**{"shard_size": 3, "batch_size": 2, **options})
    rewards = {name: KNOWN[name] for name in names}
    return score_dataset(dataset, rewards, folder, settings, share=share, progress=False)


def test_scores_stand_beside_the_rows_that_were_there(images, tmp_path):
    assert score(images, tmp_path, ["jpeg", "length"]) == {"jpeg": 0, "length": 0}
    scored = datasets.load_dataset(str(tmp_path), split="train")
    assert scored["note"][:] == list("abcdefg") and scored["length"][:] == [2.0] * 7
    np.testing.assert_allclose(scored["jpeg"][:], [-kilobytes(image) for image in images["image"]])
    assert all(np.array_equal(a, b) for a, b in zip(scored["image"], images["image"], strict=True))


def test_model_and_revision_of_a_reward_are_written_beside_its_scores(images, tmp_path):
    def reward(images, prompts):
        return [0.0] * len(images)

    reward.facts = RewardFacts("mine", "owner/model", "abc123", "0 to 1")
    score_dataset(images, {"mine": lambda: reward}, tmp_path, progress=False)
    facts = json.loads((tmp_path / "rewards.json").read_text())
    known = {"name": "mine", "model_id": "owner/model", "revision": "abc123", "scale": "0 to 1", "columns": ["mine"]}
    assert facts == {"mine": known}


def test_a_score_that_is_no_number_names_its_row_in_the_dataset(images, tmp_path):
    def reward(images, prompts):
        return [math.nan if prompt == prompts_seen[5] else 0.0 for prompt in prompts]

    prompts_seen = [f"prompt {index}" for index in range(7)]
    dataset = images.remove_columns("prompt").add_column("prompt", prompts_seen)
    with pytest.raises(ValueError, match=r"NaN or infinity for row 5 \(nan, prompt 'prompt 5'\)"):
        score_dataset(dataset, {"r": lambda: reward}, tmp_path, ScoringSettings(shard_size=3, batch_size=2))


@pytest.mark.parametrize("options", [{"one_at_a_time": True}, {"num_workers": 1, "batch_size": 7}])
def test_the_way_of_working_does_not_change_the_rows(images, tmp_path, options):
    score(images, tmp_path / "a", ["jpeg", "length"])
    score(images, tmp_path / "b", ["jpeg", "length"], **options)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_weighted_sum_follows_its_weights_without_scoring_again(images, tmp_path):
    def fussy(images, prompts):
        return [None if prompt == "p3" else 2.0 for prompt in prompts]

    def run(loaders, **weights):
        return score_dataset(images, loaders, tmp_path, ScoringSettings(shard_size=3, weights=weights))

    def refuse():
        raise AssertionError("loaded again")

    counts = run({"jpeg": lambda: jpeg_compressibility, "fussy": lambda: fussy}, jpeg=10.0, fussy=-0.5)
    assert counts == {"jpeg": 0, "fussy": 1, "weighted_sum": 1}
    for weights in ({"jpeg": 10.0, "fussy": -0.5}, {"jpeg": 1.0, "fussy": 3.0}):
        run({"jpeg": refuse, "fussy": refuse}, **weights)
        sizes = [-kilobytes(image) for image in images["image"]]
        expected = [weights["jpeg"] * size + weights["fussy"] * 2 for size in sizes]
        table = rows(tmp_path)
        assert table["weighted_sum"][3] is None and None not in table["jpeg"]
        np.testing.assert_allclose(np.delete(np.array(table["weighted_sum"], float), 3), np.delete(expected, 3))
    with pytest.raises(DataError, match="`weights`: 'hps' is not a column of these rewards: jpeg, fussy"):
        run({"jpeg": refuse, "fussy": refuse}, hps=1.0)


def test_options_of_a_reward_and_weights_are_given_on_the_command_line(generated, tmp_path, monkeypatch, capsys):
    (tmp_path / "scaled.py").write_text(
        "class Scaled:\n    def __init__(self, factor):\n        self.factor = factor\n"
        "    def __call__(self, images, prompts):\n        return [self.factor * len(p) for p in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["score", str(generated), "--rewards", "scaled:Scaled", "--output_dir", str(tmp_path / "out")]
    options = ["--reward_options", '{"scaled:Scaled": {"factor": 3}}', "--weights", "Scaled=2"]
    assert cli.main([*arguments, *options]) == 0
    table = rows(tmp_path / "out")
    assert table["Scaled"] == [3.0 * len(prompt) for prompt in table["prompt"]]
    assert table["weighted_sum"] == [6.0 * len(prompt) for prompt in table["prompt"]]
    for wrong, message in (
        (["--weights", "Scaled"], "not a column and a weight"),
        (["--reward_options", "[]"], "not a JSON object"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*arguments, *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["rows", "stream"])
def test_scores_of_other_options_are_not_taken_for_those_of_this_command(images, tmp_path, monkeypatch, streaming):
    (tmp_path / "of_options.py").write_text(
        "class Scaled:\n    def __init__(self, factor, retries=0):\n        self.factor = factor\n"
        "    def __call__(self, images, prompts):\n        return [self.factor or float('nan')] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stream_of(images, tmp_path / "source")
    arguments = [
        "score",
        str(tmp_path / "source"),
        "--output_dir",
        str(tmp_path / "out"),
        "--rewards",
        "of_options:Scaled",
    ]

    def run(*more, **options):
        options = json.dumps({"of_options:Scaled": options})
        return cli.main([*arguments, "--use_cpu", *streaming, *more, "--reward_options", options])

    with pytest.raises(SystemExit):
        run(factor=0)  # NaN: there are no scores, so the options may change
    assert run(factor=3) == 0
    assert run(factor=3, retries=2) == 0  # how often a server is asked decides no score
    for more, factor in ((), 4), (("--dtype", "bfloat16"), 3):
        with pytest.raises(SystemExit):
            run(*more, factor=factor)
    assert set(rows(tmp_path / "out")["Scaled"]) == {3.0}


def test_a_judges_scores_are_those_of_its_model_and_question_wherever_it_is_served(tmp_path):
    question = tmp_path / "question.txt"

    def fingerprint(url, text, reward="judge"):
        question.write_text(text)
        return _fingerprint(reward, None, {"url": url, "model": "m", "template": str(question)})

    first = fingerprint("http://a/v1", "Rate {prompt}")
    assert fingerprint("http://b/v1", "Rate {prompt}") == first
    assert fingerprint("http://a/v1", "Rate {prompt} again") != first
    assert fingerprint("http://a", "", "http") != fingerprint("http://b", "", "http")


def stream_of(dataset, folder):
    """Two Parquet files, of four rows and of three."""
    folder.mkdir(exist_ok=True)
    for name, part in (("a", range(4)), ("b", range(4, 7))):
        dataset.select(part).to_parquet(folder / f"{name}.parquet")
    return datasets.load_dataset(str(folder), split="train", streaming=True)


@pytest.mark.parametrize("options", [{}, {"one_at_a_time": True}])
def test_a_stream_is_scored_like_the_dataset_by_any_number_of_processes(images, tmp_path, options):
    stream = stream_of(images, tmp_path / "source")
    score(images, tmp_path / "whole", ["jpeg", "length"], weights={"length": 2})
    settings = ScoringSettings(shard_size=3, weights={"length": 2}, **options)
    for rank in (1, 0):
        score_stream(stream, KNOWN, tmp_path / "out", settings, share=(rank, 2), progress=False)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert [len(parquet.read_table(file)) for file in sorted((tmp_path / "out" / "data").iterdir())] == [3, 1, 3]
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert loaded["note"][:] == list("abcdefg") and isinstance(loaded.features["image"], datasets.Image)
    assert read_rewards(tmp_path / "out") == read_rewards(tmp_path / "whole")


def test_a_stream_continues_where_it_was_killed_and_opens_no_file_that_was_read(images, tmp_path, caplog):
    seen = []

    def counted(images, prompts):
        seen.extend(prompts)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return [1.0 if prompt != "p1" else None for prompt in prompts]

    options = {"settings": ScoringSettings(shard_size=2, batch_size=1), "progress": False, "share": (0, 1)}
    stream, rewards = stream_of(images, tmp_path / "source"), {"one": lambda: counted}
    with pytest.raises(KeyboardInterrupt):
        score_stream(stream, rewards, tmp_path / "out", **options)
    with pytest.raises(DataError, match="1 of 3 shards"):
        check_complete(tmp_path / "out")
    (tmp_path / "source" / "a.parquet").write_bytes(b"gone")  # was read to its end
    assert score_stream(stream, rewards, tmp_path / "out", **options) == {"one": 1}
    assert seen == ["p0", "p1", "p2", "p3", "p4", "p4", "p5", "p6"] and "1 of 7 rows have no score" in caplog.text
    check_complete(tmp_path / "out")
    last = sorted((tmp_path / "out" / "data").iterdir())[-1]
    last.unlink()
    with pytest.raises(DataError, match="1 of 4 shards"):
        check_complete(tmp_path / "out")
    score_stream(stream, rewards, tmp_path / "out", **options)
    assert seen[8:] == ["p6"]
    # A reward of later is scored on what was written; the source is not read.
    (tmp_path / "source" / "b.parquet").write_bytes(b"gone")
    assert score_stream(stream, {"length": lambda: length}, tmp_path / "out", **options) == {"length": 0}
    assert rows(tmp_path / "out")["one"] == [1.0, None, *[1.0] * 5]


def test_images_that_are_still_being_made_are_not_scored(tmp_path, monkeypatch, capsys):
    generate(tmp_path / "half", share=(0, 2))
    arguments = ["score", str(tmp_path / "half"), "--rewards", "jpeg_compressibility"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--output_dir", str(tmp_path / "scored")])
    message = capsys.readouterr().err
    assert "1 of 3 shards" in message and not (tmp_path / "scored").exists()
    arguments[1] = message.split("name the files: ")[1].strip()
    assert cli.main([*arguments, "--output_dir", str(tmp_path / "scored")]) == 0
    assert len(rows(tmp_path / "scored")["prompt"]) == 5


@pytest.mark.parametrize("command", ["check", "label"])
def test_a_folder_that_lacks_shards_or_scores_is_read_with_a_warning(tmp_path, capsys, command):
    """Shard 1 of 3 is another process's, still at work; then a reward that stands in the first shard alone."""
    folder = tmp_path / "half"
    generate(folder, share=(0, 2))
    asked = {"check": ["check", str(folder), "--num_proc", "1"], "label": ["label", "--dataset_name", str(folder)]}
    asked["label"] += ["--output_dir", str(tmp_path / "label")]
    assert cli.main([*asked[command], "--score_column", "seed"]) == 0
    printed = capsys.readouterr()
    assert f"1 of 3 shards of {folder} are not there" in printed.err and "start it again" in printed.err
    assert "5 rows" in printed.out
    generate(folder)
    assert cli.main([*asked[command], "--score_column", "seed"]) == 0
    assert "shards" not in capsys.readouterr().err
    (folder / "rewards.json").write_text(json.dumps({"later": {"columns": ["later"]}}))
    cli.main([*asked[command], "--score_column", "seed"])
    assert f"3 of 3 shards of {folder} are not there, or lack a score" in capsys.readouterr().err
    for shard in (folder / "data").iterdir():
        shard.unlink()
    with pytest.raises(SystemExit):
        cli.main(asked[command])
    assert "error: `source`: 3 of 3 shards" in capsys.readouterr().err


@pytest.mark.parametrize("way", [(), ("--streaming",), ("data",)], ids=["folder", "stream", "its files"])
def test_what_a_score_is_goes_along_into_the_next_folder(generated, tmp_path, way):
    """Of two rewards in the first folder, one is taken out of the rows before they are scored again."""
    first, second = tmp_path / "first", tmp_path / "second"
    cli.main(["score", str(generated), "--rewards", "background_darkness", "--output_dir", str(first)])
    known = read_rewards(first)
    note_rewards(first, {"gone": {**known["background_darkness"], "columns": ["gone"]}})
    shutil.rmtree(first / ".scores")
    source = first / "data" if "data" in way else first
    (first / "tgol_score.json").unlink()  # else the folder counts as unfinished: `gone` is in no shard
    flags = [flag for flag in way if flag.startswith("--")]
    asked = ["score", str(source), "--rewards", "jpeg_compressibility", "--output_dir", str(second), *flags]
    assert cli.main(asked) == 0
    found = read_rewards(second)
    assert set(found) == {"background_darkness", "jpeg_compressibility"}
    assert found["background_darkness"] == known["background_darkness"]
    check_complete(second)


def test_two_processes_score_the_rows_of_one(images, tmp_path):
    score(images, tmp_path / "a")
    for rank in (0, 1):
        score(images, tmp_path / "b", share=(rank, 2))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_reward_added_later_is_scored_alone(images, tmp_path):
    score(images, tmp_path)

    def refuse():
        raise AssertionError("loaded again")

    score_dataset(images, {"jpeg": refuse, "length": lambda: length}, tmp_path, ScoringSettings(shard_size=3))
    score_dataset(images, {"again": lambda: length}, tmp_path, ScoringSettings(shard_size=3))
    table = rows(tmp_path)
    assert table["length"] == table["again"] == [2.0] * 7 and None not in table["jpeg"]


def test_an_image_that_cannot_be_decoded_is_none_and_counted(images, tmp_path, caplog):
    broken = images.cast_column("image", datasets.Image(decode=False)).to_list()
    broken[4]["image"] = {"bytes": b"no image", "path": None}
    broken[5]["image"] = {"bytes": None, "path": str(tmp_path / "absent.png")}
    dataset = datasets.Dataset.from_list(broken).cast_column("image", datasets.Image())
    with caplog.at_level("WARNING", "tgol_trainer"):
        assert score(dataset, tmp_path / "out") == {"jpeg": 2}
    assert [index for index, value in enumerate(rows(tmp_path / "out")["jpeg"]) if value is None] == [4, 5]
    assert "2 of 7 rows have no score" in caplog.text


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["rows", "stream"])
def test_a_reward_that_gives_no_row_a_score_ends_the_command(images, tmp_path, monkeypatch, capsys, streaming):
    """As a judge does whose answers hold no number; a reward that gives one row a score is taken."""
    (tmp_path / "silent.py").write_text(
        "def none(images, prompts):\n    return [None] * len(prompts)\n"
        "def one(images, prompts):\n    return [1.0 if prompt == 'p4' else None for prompt in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stream_of(images, tmp_path / "source")
    command = ["score", str(tmp_path / "source"), "--use_cpu", "--shard_size", "2", *streaming]
    for name, number in (("none", 7), ("one", 6)):
        arguments = [*command, "--rewards", f"silent:{name}", "--output_dir", str(tmp_path / name)]
        if name == "one":
            assert cli.main(arguments) == 0
            assert f"rows without a score: one {number}." in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert f"`rewards`: 'none' gave none of the {number} rows a score" in capsys.readouterr().err


def test_images_behind_addresses_become_part_of_the_scored_files(images, tmp_path):
    """As a streamed archive names its members; of what is not there, or is no image, the row stays."""
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as files:
        images["image"][0].save(file := io.BytesIO(), "PNG")
        files.writestr("inside/a.png", file.getvalue())
        files.writestr("b.png", b"no image")
    absent = tmp_path / "absent.zip"
    places = [f"zip://inside/a.png::{archive}", f"zip://b.png::{archive}", f"zip://c.png::{archive}"]
    places += [f"zip://a.png::{absent}", f"file://{tmp_path / 'absent.png'}"]
    columns = {"prompt": list("abcde"), "image": [{"path": place, "bytes": None} for place in places]}
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    assert score(datasets.Dataset.from_dict(columns, features=features), tmp_path / "out") == {"jpeg": 4}
    archive.unlink()
    found = rows(tmp_path / "out")
    assert found["jpeg"] == [-kilobytes(images["image"][0]), None, None, None, None]
    assert found["image"][0] == {"bytes": file.getvalue(), "path": "a.png"}


def test_another_dataset_in_the_same_folder_is_refused(images, tmp_path):
    score(images, tmp_path)
    with pytest.raises(DataError, match="begun with other settings"):
        score(images.select(range(6, -1, -1)), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dataset: dataset.rename_column("image", "img"), r"no column 'image'.*\['prompt', 'img', 'note'\]"),
        (lambda dataset: dataset.rename_column("note", "jpeg"), "already has a column 'jpeg'"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(images, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        score(change(images), tmp_path)


# ---- Names ----


def test_a_reward_is_found_by_name_or_by_module():
    assert load_reward("jpeg_compressibility") is load_reward("tgol_trainer.rewards:jpeg_compressibility")
    assert load_reward("background_darkness")([Image.new("RGB", (4, 4))], ["a"]) == pytest.approx([1.0], abs=0.01)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("jpeg_compresibility", ValueError, "Did you mean 'jpeg_compressibility'"),
        ("no_such_module:f", ValueError, "No module named"),
        ("math:f", ValueError, "no attribute 'f'"),
        ("math:pi", TypeError, "is float"),
    ],
)
def test_an_unknown_reward_is_refused(spec, error, message):
    with pytest.raises(error, match=message):
        load_reward(spec)


def test_prompts_come_from_lines_columns_and_refuse_blanks(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\n\n  a cat, sitting \n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "a.txt")).texts == ["a dog", "a cat, sitting"]
    (tmp_path / "a.jsonl").write_text('{"caption": "a"}\n{"caption": "b"}\n')
    assert load_prompts(str(tmp_path / "a.jsonl")).texts == ["a", "b"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(DataError, match="row 1: empty prompt"):
        load_prompts(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="has no column 'x'"):
        load_prompts(str(tmp_path / "b.jsonl"), column="x")
    with pytest.raises(DataError, match=r"not a named set.*hpsv2"):
        load_prompts("hspv2")


def test_a_named_set_without_a_network_says_which_repository_it_needs():
    for name, repository in (("partiprompts", "nateraw/parti-prompts"), ("hpsv2@abc", "zhwang/HPDv2 at 'abc'")):
        with pytest.raises(DataError, match=f"{repository}.*could not be loaded"):
            load_prompts(name)


@pytest.fixture(scope="module")
def read_sets(tmp_path_factory):
    """What a fresh process reads of named sets on a loopback Hub: its table of results, and the commits there."""
    styles = {style: [f"{style} {index}" for index in range(800)] for style in STYLES}
    parti = "Prompt\tCategory\tChallenge\n" + "".join(f'a "b" {i}\tAnimals\tBasic\n' for i in range(1632))
    uploads = {
        "nateraw/parti-prompts": {"PartiPrompts.tsv": parti.encode()},
        "zhwang/HPDv2": {f"benchmark/{style}.json": json.dumps(texts).encode() for style, texts in styles.items()},
        "yuvalkirstain/pickapic_v1_no_images": {},
    }
    for split, count in (("train", 3), ("test_unique", 7)):
        table = pa.table({"caption": [f"{split} {index}" for index in range(count)], "other": [0] * count})
        parquet.write_table(table, file := io.BytesIO())
        uploads["yuvalkirstain/pickapic_v1_no_images"][f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    uploads["tester/prompts"] = {"prompts.jsonl": b'{"prompt": "a red circle"}\n'}
    home = tmp_path_factory.mktemp("sets")
    with LoopbackHub() as hub:
        for name, files in uploads.items():
            hub.put(name, "datasets", files)
        done = subprocess.run(
            [sys.executable, "-m", "tests.hub.sets"],
            cwd=home,
            env={**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        commits = {name: hub.repository(name, "datasets").branches["main"] for name in uploads}
    return json.loads(done.stdout.splitlines()[-1]), commits, done.stderr


def test_named_sets_come_from_their_repositories_with_categories_and_commit(read_sets):
    found, commits, _ = read_sets
    texts, categories, revision = found["hpsv2"]
    assert texts == [f"{style} {index}" for style in STYLES for index in range(800)]
    assert categories == [style for style in STYLES for _ in range(800)]
    assert revision == commits["zhwang/HPDv2"]
    texts, categories, revision = found["hpsv2-photo"]
    assert (texts[-1], set(categories), revision) == ("photo 799", {"photo"}, commits["zhwang/HPDv2"])
    texts, categories, revision = found["partiprompts"]
    assert (texts[1], len(texts)) == ('a "b" 1', 1632)
    assert (set(categories), revision) == ({"Animals"}, commits["nateraw/parti-prompts"])
    assert set(found["partiprompts by Challenge"][1]) == {"Basic"}
    texts, categories, revision = found["pickapic-test"]
    assert texts == [f"test_unique {index}" for index in range(7)] and categories is None
    assert revision == commits["yuvalkirstain/pickapic_v1_no_images"]


def test_generated_images_note_the_commit_of_their_prompts(read_sets, tmp_path, monkeypatch):
    found, commits, _ = read_sets
    texts, categories, revision = found["tester/prompts"]
    assert (texts, revision) == (["a red circle"], commits["tester/prompts"])
    prompts = Prompts(texts, categories, revision)
    monkeypatch.setattr("tgol_trainer.sources.load_prompts", lambda source, **options: prompts)
    options = f"--model_name_or_path shapes --num_inference_steps 1 --output_dir {tmp_path} --use_cpu"
    assert cli.main(["generate", "--prompts", "tester/prompts", *options.split()]) == 0
    assert json.loads((tmp_path / ".source.json").read_text()) == {"name": "tester/prompts", "revision": revision}


def test_a_named_set_of_another_size_is_warned_about_and_an_old_commit_is_found_by_its_name(read_sets):
    found, commits, said = read_sets
    assert said.count("when papers used it") == 1
    assert "'pickapic-test' has 7 prompts at 'main' of yuvalkirstain/pickapic_v1_no_images, and had 500" in said
    assert found["hpsv2-anime at its commit"][2] == commits["zhwang/HPDv2"]
    assert "at 'absent', which could not be loaded" in found["hpsv2-anime at none"]
    assert "has no columns 'Style'" in found["hpsv2-anime by a column"]


# ---- The road ----


def forkserver():
    """What starts processes; one server imports this module and the library once for all of them."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    return processes


def killed_and_continued(arguments, folder):
    """Start, kill without warning once the first shard is there, start again."""
    process = forkserver().Process(target=cli.main, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 120
    while not list(folder.rglob("*.parquet")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_alive(), "it ended before it could be killed"
    process.kill()
    process.join()
    made = len(list((folder / "data").glob("train-*.parquet")))
    assert cli.main(arguments) == 0
    return made


def slow_darkness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Darkness, slowly enough to be killed in the middle."""
    time.sleep(0.1)
    return load_reward("background_darkness")(images, prompts)


def test_from_prompts_to_an_adapter_with_a_kill_in_the_middle_of_both_steps(tmp_path, monkeypatch, capsys):
    """The same images, scores and weights as without the kills."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "prompts.txt").write_text("a red circle on white\na blue cross on black\n")
    sizes = ["--batch_size", "2", "--shard_size", "2", "--use_cpu"]
    result, adapters, checked, labels = {}, {}, {}, {}
    for way in ("whole", "killed"):
        images, scored = tmp_path / way / "images", tmp_path / way / "scored"
        generate = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--model_name_or_path", "shapes", *sizes]
        generate += ["--output_dir", str(images), "--images_per_prompt", "12", "--num_inference_steps", "4"]
        score = ["score", str(images), "--rewards", "tests.jobs.test_jobs:slow_darkness", *sizes]
        score += ["--output_dir", str(scored)]
        if way == "killed":
            assert 0 < killed_and_continued(generate, images) < 12
            killed_and_continued(score, scored)
        else:
            assert cli.main(generate) == cli.main(score) == 0
        result[way] = rows(scored)
        capsys.readouterr()
        check = ["check", str(scored), "--score_column", "slow_darkness", "--json", "-", "--num_proc", "1"]
        assert cli.main(check) == 0
        checked[way] = json.loads(capsys.readouterr().out)["facts"]
        flags = ["--dataset_name", str(scored), "--score_column", "slow_darkness"]
        assert cli.main(["label", *flags, "--output_dir", str(tmp_path / way / "labels")]) == 0
        labels[way] = json.loads((tmp_path / way / "labels" / "label.json").read_text())
        assert labels[way].pop("settings")["dataset_name"] == str(scored)
        train = ["train", "--model_name_or_path", "shapes", *flags, "--output_dir", str(tmp_path / way / "adapter")]
        train += ["--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--max_steps", "2"]
        assert cli.main(train) == 0
        adapters[way] = load_file(tmp_path / way / "adapter" / "pytorch_lora_weights.safetensors")
    assert result["killed"] == result["whole"]
    assert checked["killed"] == checked["whole"]
    assert labels["killed"] == labels["whole"]
    assert labels["whole"]["num_rows"] == 24
    assert any(tensor.any() for name, tensor in adapters["whole"].items() if "lora_B" in name or "lora.up" in name)
    assert adapters["whole"].keys() == adapters["killed"].keys()
    assert all(torch.equal(tensor, adapters["killed"][name]) for name, tensor in adapters["whole"].items())


def test_the_three_commands_of_the_page_lead_to_an_adapter_as_they_stand(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "generating.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle on white\n")
    commands = [shlex.split(line) for line in page.split("```\n")[1].splitlines()]
    assert [words[:2] for words in commands] == [["tgol", name] for name in ("generate", "score", "train")]
    assert [cli.main(words[1:]) for words in commands] == [0, 0, 0]
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def run_steps(steps):
    """What each launched process does."""
    assert os.environ["WORLD_SIZE"] == "2"
    return [cli.main(arguments) for arguments in steps], int(os.environ["RANK"])


def test_two_launched_processes_generate_and_score_the_rows_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "prompts.txt").write_text("a red circle on white\na blue cross on black\na green square\n")

    def steps(way):
        generate = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--model_name_or_path", "shapes"]
        generate += ["--output_dir", str(tmp_path / way / "images"), "--images_per_prompt", "6", "--use_cpu"]
        generate += ["--batch_size", "2", "--shard_size", "4", "--num_inference_steps", "2"]
        # Of images that are all there: a process would not wait for those that the other still makes.
        score = ["score", str(tmp_path / "one" / "images"), "--rewards", "background_darkness", "--use_cpu"]
        score += ["--output_dir", str(tmp_path / way / "scored"), "--shard_size", "5", "--batch_size", "2"]
        streamed = [*score[:-4], "--shard_size", "3", "--batch_size", "2", "--streaming"]
        streamed[streamed.index("--output_dir") + 1] = str(tmp_path / way / "streamed")
        return [generate, score, streamed]

    for arguments in steps("one"):
        assert cli.main(arguments) == 0
    # What `torchrun` does, but both processes come from the server that has imported the library.
    forkserver()
    launch = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "jobs", "start_method": "forkserver"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, **launch)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert elastic_launch(config, run_steps)(steps("two")) == {rank: ([0, 0, 0], rank) for rank in (0, 1)}
    for number, handler in handlers.items():  # torch's launcher leaves its own behind
        signal.signal(number, handler)
    for made in ("images", "scored", "streamed"):
        assert rows(tmp_path / "two" / made) == rows(tmp_path / "one" / made)
        files = [{file.name for file in (tmp_path / way / made / "data").iterdir()} for way in ("one", "two")]
        assert files[0] == files[1] and len(files[0]) > 3
    assert rows(tmp_path / "one" / "streamed") == rows(tmp_path / "one" / "scored")
