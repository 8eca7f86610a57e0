"""`tgol quickstart`: everything it promises on disk; its measured gates are a slow test."""

import json
import re
import time

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image

from tgol_trainer.cli import main


def quickstart(folder, *options):
    code = main(["quickstart", "--output_dir", str(folder), *map(str, options)])
    return code, json.loads((folder / "metrics.json").read_text())


def test_a_small_run_leaves_every_file_and_reports_every_score(tmp_path, capfd):
    options = ("--num_images", 96, "--num_steps", 2, "--num_evaluation_images", 24)
    code, metrics = quickstart(tmp_path, *options)
    printed = capfd.readouterr()
    assert code == 0
    names = {path.name for path in tmp_path.iterdir()}
    images = {"before_after.png", "score_histogram.png", "score_distributions.png"}
    assert {"pytorch_lora_weights.safetensors", "README.md", "metrics.json", "dataset", *images} <= names
    for name in images:
        assert min(Image.open(tmp_path / name).size) > 300
    scores = metrics["scores"]
    trained = ["background_darkness", "colour_faithfulness"]
    assert [name for name, score in scores.items() if score["trained"]] == trained
    assert set(scores) == {"background_darkness", "colour_faithfulness", "jpeg_compressibility"}
    assert all(low <= score["win_rate"] <= high for score in scores.values() for low, high in [score["interval"]])
    dataset = load_dataset("parquet", data_files=str(tmp_path / "dataset" / "*.parquet"), split="train")
    assert len(dataset) == 96 and dataset[0]["image"].size == (32, 32)
    card = (tmp_path / "README.md").read_text()
    assert ModelCard(card).data.eval_results
    assert "before_after.png" in card and "shapes model embedded" in card
    labels = re.search(r"(\d+) positive, (\d+) negative", printed.out)
    assert sum(map(int, labels.groups())) == 96 and "each of 24 groups has its own" in printed.out
    assert "sum(background_darkness, colour_faithfulness)" in printed.out
    assert "Or train on a dataset of your own" in printed.out
    assert f"rate {tmp_path / 'dataset'} --model_name_or_path shapes" in printed.out
    for noise in ("torchvision", "gemm_4bit", "peft_config", "Traceback", "FutureWarning", "UserWarning"):
        assert noise not in printed.out + printed.err


@pytest.mark.parametrize("option", [("--num_images", "10"), ("--num_steps", "0"), ("--num_evaluation_images", "3")])
def test_numbers_that_cannot_work_are_refused_before_anything_is_loaded(option, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["quickstart", *option])
    assert exit_.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_darkness_gains_what_can_be_seen_and_colours_are_not_significantly_worse(seed, tmp_path):
    start = time.process_time()
    _, metrics = quickstart(tmp_path, "--seed", seed)
    seconds = time.process_time() - start  # of the processor: other work on the machine does not count
    rows = load_dataset("parquet", data_files=str(tmp_path / "dataset" / "*.parquet"), split="train")
    spread = np.std(rows["background_darkness"])
    assert metrics["scores"]["background_darkness"]["mean_change"] >= spread
    assert metrics["scores"]["colour_faithfulness"]["interval"][1] >= 0.5
    assert seconds <= 180 and metrics["seconds"]["total"] > 0
