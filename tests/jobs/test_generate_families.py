"""`tgol generate` with every family: from a folder, with a LoRA or without, the same rows however the work is cut."""

import json

import datasets
import pytest
import torch
from peft import LoraConfig

from tests.meissonic_standin import as_published
from tests.pipelines import TINY, VARIANTS
from tgol_trainer import adapters, cli
from tgol_trainer.families import frame_rate, load_family
from tgol_trainer.jobs import GenerationSettings, generate_dataset

NAMES = ["sd", "sdxl", "sd3", "flux", "wan", "amused", "meissonic"]


def saved(name, folder, repository):
    """Write a family's pipeline and a LoRA of it; return what `tgol generate` needs to load them."""
    pipeline, extra = TINY[name].build(), []
    if name == "meissonic":
        as_published(pipeline, folder / "model")
        options = {"meissonic_repository": str(repository), "trust_remote_code": True}
        extra = ["--model_init_kwargs", json.dumps(options)]
    else:
        pipeline.save_pretrained(folder / "model")
    family = load_family(pipeline)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(family.default_target_modules))
    adapters.attach(family.denoiser, config, seed=0, probe=family.probe)
    generator = torch.Generator().manual_seed(1)
    for weight, parameter in family.denoiser.named_parameters():
        if "lora_B" in weight:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapters.save_adapter(type(pipeline), family.denoiser_name, family.denoiser, folder / "lora")
    return ["--model_name_or_path", str(folder / "model"), *extra], ["--adapter_name_or_path", str(folder / "lora")]


def rows(folder):
    files = sorted(str(file) for file in (folder / "data").iterdir())
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    column = "video" if "video" in table.column_names else "image"
    table = table.cast_column(column, (datasets.Video if column == "video" else datasets.Image)(decode=False))
    return len(files), [(row["prompt"], row["seed"], row[column]["bytes"]) for row in table]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_whoever_makes_them_and_others_with_a_lora(name, tmp_path, repository, monkeypatch):
    model, lora = saved(name, tmp_path, repository)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross\n")
    sizes = TINY[name].call or {"height": 16, "width": 16}
    fixed = [text for option, value in sizes.items() for text in (f"--{option}", str(value))]
    fixed += ["--num_inference_steps", "2", "--images_per_prompt", "2", "--batch_size", "2", "--shard_size", "2"]
    fixed += ["--prompts", str(tmp_path / "prompts.txt"), "--use_cpu"]

    def run(output, *more, share=(0, 1)):
        monkeypatch.setenv("RANK", str(share[0]))
        monkeypatch.setenv("WORLD_SIZE", str(share[1]))
        assert cli.main(["generate", *model, "--output_dir", str(tmp_path / output), *fixed, *more]) == 0

    run("base")
    run("whole", *lora)
    run("parts", *lora, share=(1, 2))
    run("parts", *lora)  # a restart, alone, that finds the second half
    files, expected = rows(tmp_path / "whole")
    assert files == 2 and len({encoded for _, _, encoded in expected}) == 4
    assert rows(tmp_path / "parts") == (2, expected)
    base = rows(tmp_path / "base")[1]
    assert [row[:2] for row in base] == [row[:2] for row in expected]
    assert not {encoded for _, _, encoded in base} & {encoded for _, _, encoded in expected}


RATES = {"wan": 16, "wan 2.2 5b": 24, "skyreels v2": 24, "ltx": 25, "cogvideox": 8, "cogvideox 1.5": 16, "mochi": 30}


def test_the_rate_of_videos_is_the_one_their_models_were_made_for(tmp_path):
    """As diffusers' examples and the authors' pages write them; what has no family keeps 16."""
    assert {name: frame_rate(VARIANTS[name].build()) for name in RATES} == RATES
    assert frame_rate(object()) == 16
    pipeline = VARIANTS["wan 2.2 5b"].build()
    settings = GenerationSettings(num_inference_steps=1, height=16, width=32, num_frames=5)
    (file,) = generate_dataset(pipeline, ["a cat"], tmp_path, settings, progress=False)
    assert datasets.load_dataset("parquet", data_files=str(file), split="train")["fps"] == [24.0]


def test_a_pipeline_that_draws_another_size_than_was_asked_for_says_so_once(tmp_path, caplog):
    """FLUX rounds 33 pixels to 32; a size that is drawn, and none, say nothing."""
    for asked, said in ((33, 1), (32, 0), (None, 0)):
        caplog.clear()
        settings = GenerationSettings(num_inference_steps=1, height=asked, width=asked, batch_size=1)
        generate_dataset(TINY["flux"].build(), ["a", "b"], tmp_path / str(asked), settings, progress=False)
        assert caplog.text.count("drew 32×32 pixels (width×height) where 33×33 were asked for") == said
        assert caplog.text.count("where") == said
