"""`tgol train --config` takes each settings file, its model replaced by a tiny twin and its data by a few rows."""

import numpy as np
import pytest
import yaml

from tests import ROOT, tiny, tiny_images, tiny_kandinsky, tiny_language, tiny_layers, tiny_ltx, tiny_qwen, tiny_video
from tests.clips import encoded
from tests.conftest import scored_dataset
from tests.helpers import quick
from tests.pipelines import TINY, four_clips
from tgol_trainer.cli import main

CONFIGS = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
TWINS = {
    "amused_256": tiny.amused,
    "amused_512": tiny.amused,
    "flux_dev": tiny.flux,
    "flux2_dev": tiny_language.flux2,
    "flux2_klein": tiny_language.flux2_klein,
    "ltx2": tiny_ltx.ltx2,
    "ltx_video_2b": tiny_ltx.ltx,
    "meissonic": tiny.meissonic,
    "sd15_paper": tiny.stable_diffusion,
    "sd35_medium": lambda: tiny.stable_diffusion_3("3.5"),
    "sdxl": tiny.stable_diffusion_xl,
    "qwen_image": tiny_qwen.qwen_image,
    "qwen_image_21": tiny_qwen.qwen_image_21,
    "wan21_1_3b": tiny.wan,
    "wan22_5b": tiny_video.wan_22_5b,
    "wan22_a14b": tiny_video.wan_22_a14b,
    "skyreels_v2": tiny_video.skyreels_v2,
    "hunyuan_video": tiny_video.hunyuan_video,
    "z_image": tiny_language.z_image,
    "krea2": tiny_images.krea2,
    "ernie_image": tiny_images.ernie_image,
    "sana": tiny_images.sana,
    "lumina2": tiny_images.lumina2,
    "aura_flow": tiny_images.aura_flow,
    "chroma": tiny_images.chroma,
    "kolors": lambda: TINY["kolors"].build(),
    "cogview4": tiny_images.cogview4,
    "kandinsky5_image": tiny_kandinsky.kandinsky5_image,
    "kandinsky5_video": tiny_kandinsky.kandinsky5_video,
    "cogvideox_5b": tiny_video.cogvideox,
    "mochi": tiny_video.mochi,
    "sana_video": tiny_video.sana_video,
    "hidream": tiny_layers.hidream,
    "bria_fibo": tiny_layers.bria_fibo,
    "ideogram4": tiny_layers.ideogram4,
    "hunyuan_video_15": tiny_video.hunyuan_video_15,
}
TODAY = (
    "ltx2",
    "ltx_video_2b",
    "flux2_dev",
    "z_image",
    "qwen_image",
    "qwen_image_21",
    "wan22_5b",
    "skyreels_v2",
    "hunyuan_video",
    *("cogview4", "kandinsky5_image", "kandinsky5_video", "cogvideox_5b", "mochi", "sana_video"),
    *("hidream", "bria_fibo", "ideogram4", "hunyuan_video_15"),
    *("krea2", "ernie_image", "sana", "lumina2", "aura_flow", "chroma", "kolors"),
)
"""Read by the code that reads flux2_klein.yaml; slow tests."""
VIDEO = ("ltx", "wan", "skyreels", "hunyuan", "kandinsky5_video", "cogvideox", "mochi", "sana_video")
SIZES = {
    "qwen_image_21": 32,
    "sana": 32,
    "lumina2": 32,
    "kandinsky5_image": 32,
    "bria_fibo": 32,
    "sana_video": "32x64",
    "ltx2": "32x64",
    "ltx_video_2b": "32x64",
}
FRAMES = {"cogvideox_5b": 9, "mochi": 7}
# Only what a small CPU run needs otherwise: everything else is taken as it stands in the file.
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "load_in_4bit": False,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
}


def test_every_settings_file_has_a_tiny_twin():
    assert {path.stem for path in CONFIGS} == {*TWINS, "shapes"}


@pytest.mark.parametrize("name", quick(list(TWINS), *(name for name in TWINS if name not in TODAY)))
def test_a_settings_file_trains_its_tiny_twin(name, tmp_path, repository, clips, capfd):
    if name == "kolors":
        pytest.importorskip("sentencepiece")
    settings = yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text())
    quantised = settings.get("load_in_4bit")
    TWINS[name]().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = clips if name.startswith(VIDEO) else scored_dataset(8)
    if name in FRAMES:  # longer ones
        longer = [encoded(np.asarray(clip, np.uint8)) for clip in four_clips(num_frames=9)["video"]]
        rows = rows.remove_columns("video").add_column("video", longer * 2)
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    settings |= SMALL | {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "resolution": SIZES.get(name, "16x32" if name.startswith(VIDEO) else 16),
    }
    if name.startswith(VIDEO):
        settings["num_frames"] = FRAMES.get(name, 5)
    if quantised:
        del settings["bnb_4bit_quant_type"], settings["use_bnb_nested_quant"]  # mean nothing without it
    if name == "meissonic":
        settings["model_init_kwargs"]["meissonic_repository"] = str(repository)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "settings.yaml")]) == 0
    assert "Saved to" in capfd.readouterr().out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "README.md" in written
    assert ("unet" if settings.get("full_finetuning") else "pytorch_lora_weights.safetensors") in written


def test_the_shapes_settings_train_the_embedded_model(tmp_path):
    rows = scored_dataset(8, side=32).rename_column("score", "background_darkness")
    rows = rows.add_column("colour_faithfulness", [float(index % 3) for index in range(8)])
    rows.to_parquet(tmp_path / "train.parquet")
    flags = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    small = ["--max_steps", "1", "--per_device_train_batch_size", "4"]
    assert main(["train", "--config", str(CONFIGS[0].parent / "shapes.yaml"), *flags, *small]) == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
