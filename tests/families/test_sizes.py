"""Sizes that a model does not take are refused by every command that is given one, before weights are loaded."""

import json

import pytest

from tests.conftest import scored_dataset
from tests.tiny import flux, stable_diffusion, stable_diffusion_3, wan
from tgol_trainer import TGOLConfig, TGOLTrainer, cli
from tgol_trainer.config import check_sides
from tgol_trainer.families import wrap_pipeline
from tgol_trainer.families.skeleton import load_skeleton
from tgol_trainer.jobs import load_adapted_pipeline
from tgol_trainer.rounds import train_rounds


def without_weights(pipeline, folder):
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return str(folder)


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    """Sides are multiples of 16, frames 4·k + 1; loading it fails."""
    return without_weights(wan(), tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture
def commands(video_model, tmp_path):
    """Each command up to its size, and what it would write."""
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "data").mkdir()
    scored_dataset(4).to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "x").mkdir()
    model, out = ["--model_name_or_path", video_model], ["--output_dir", str(tmp_path / "out")]
    prompts, run = ["--prompts", str(tmp_path / "p.txt")], ["--use_cpu", "true", "--report_to", "none"]
    return {
        "generate": ["generate", *model, *prompts, *out, "--use_cpu"],
        "evaluate": [
            *("evaluate", *model, *prompts, *out, "--use_cpu", "--adapters", str(tmp_path / "x")),
            *("--rewards", "jpeg_compressibility", "--mean_over_frames", "2"),
        ],
        "train": ["train", *model, *out, *run, "--dataset_name", str(tmp_path / "data")],
        "rounds": [
            *("train", *model, *out, *run, *prompts, "--rounds", "1"),
            *("--reward_funcs", "jpeg_compressibility", "--mean_over_frames", "2"),
        ],
        "plan": ["plan", video_model],
        "check": ["check", str(tmp_path / "data"), *model],
    }


@pytest.mark.parametrize(
    ("command", "size", "said"),
    [
        ("generate", ["--height", "20"], "`height` 20 is not a multiple of 16, as this model needs: use 16."),
        ("generate", ["--width", "0"], "`width` 0 is less than 16, the shortest side that this model takes: use 16."),
        ("generate", ["--num_frames", "6"], "`num_frames` is 6; it must be 4·k + 1"),
        ("evaluate", ["--width", "41"], "`width` 41 is not a multiple of 16, as this model needs: use 48."),
        ("evaluate", ["--num_frames", "6"], "`num_frames` is 6; it must be 4·k + 1"),
        (
            "train",
            ["--resolution", "20x33"],
            "`resolution` 20x33 is not a multiple of 16, as this model needs, on both",
        ),
        ("train", ["--num_frames", "6"], "`num_frames` is 6; it must be 4·k + 1"),
        ("rounds", ["--resolution", "20x33"], "`resolution` 20x33 is not a multiple of 16, as this model needs, on b"),
        ("rounds", ["--num_frames", "6"], "`num_frames` is 6; it must be 4·k + 1"),
        ("plan", ["--resolution", "20x32"], "is not a multiple of 16, as this model needs, on both sides: use 16x32."),
        ("check", ["--resolution", "20"], "`resolution` 20 is not a multiple of 16, as this model needs: use 16."),
    ],
)
def test_a_command_refuses_a_size_that_the_model_does_not_take_before_it_loads_weights(
    commands, tmp_path, capsys, command, size, said
):
    with pytest.raises(SystemExit):
        cli.main([*commands[command], *size])
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("out/**/*.parquet"))


@pytest.mark.parametrize(
    ("settings", "sampling", "said"),
    [
        ({"resolution": 24}, {}, "`resolution` 24 is not a multiple of 16"),
        ({}, {"height": 24}, "`height` 24 is not a multiple of 16"),
        ({"num_frames": 6}, {}, "`num_frames` is 6"),
        ({}, {"num_frames": 6}, "`num_frames` is 6"),
        ({"num_frames": 6}, {"num_frames": 5}, "`num_frames` is 6"),  # trained at one, drawn at another
    ],
)
def test_rounds_refuse_a_size_before_they_load_draw_or_write(video_model, tmp_path, settings, sampling, said):
    args = TGOLConfig(output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, **settings)
    loaded = []
    with pytest.raises(ValueError, match=said):
        train_rounds(video_model, args, ["a"], {"r": len}, loaded.append, num_rounds=1, sampling=sampling)
    assert not loaded and not list((tmp_path / "out").glob("round*"))


def test_a_size_that_fits_is_let_through_to_the_weights(video_model):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_adapted_pipeline(video_model, num_frames=5, sizes={"height": 32, "width": None}, use_cpu=True)


def test_a_pipeline_that_rounds_sizes_by_itself_is_not_left_to_record_another_than_it_draws(tmp_path):
    flux().save_pretrained(tmp_path)
    multiple = wrap_pipeline(flux()).resolution_multiple
    with pytest.raises(ValueError, match=f"`width` {multiple + 1} is not a multiple of {multiple}"):
        load_adapted_pipeline(str(tmp_path), sizes={"width": multiple + 1}, use_cpu=True)


def test_a_side_beyond_the_models_positions_is_refused(tmp_path, config):
    longest = wrap_pipeline(stable_diffusion_3()).max_side
    model = without_weights(stable_diffusion_3(), tmp_path / "model")
    said = f"is more than {longest}, the longest side that this model takes: use {longest}x{longest // 2}"
    with pytest.raises(ValueError, match=said):
        TGOLTrainer(model, config(resolution=f"{2 * longest}x{longest // 2}"), scored_dataset())


def test_parts_that_an_index_does_not_name_are_absent_as_diffusers_loads_them(tmp_path):
    """As in folders from before the safety checker; `check_size` asks for the multiple of the sides."""
    stable_diffusion().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: index[name] for name in index if name not in ("safety_checker", "feature_extractor")})
    )
    with pytest.raises(ValueError, match="`height` 33 is not a multiple of"):
        load_adapted_pipeline(str(tmp_path), sizes={"height": 33}, use_cpu=True)
    assert load_skeleton(str(tmp_path)).pipeline.safety_checker is None
    pipeline, _ = load_adapted_pipeline(str(tmp_path), sizes={"height": 32}, use_cpu=True)
    assert pipeline.safety_checker is None


def test_a_loaded_pipeline_and_one_with_parts_of_its_own_are_checked_by_what_was_loaded(tmp_path, config):
    pipeline = stable_diffusion()
    pipeline.save_pretrained(tmp_path)
    odd = wrap_pipeline(pipeline).resolution_multiple + 1
    options = {"model_init_kwargs": json.dumps({"safety_checker": None})}
    for model, settings in ((pipeline, {}), (str(tmp_path), options)):
        with pytest.raises(ValueError, match=f"`resolution` {odd} is not a multiple of {odd - 1}"):
            TGOLTrainer(model, config(resolution=odd, **settings), scored_dataset())
    with pytest.raises(ValueError, match=f"`height` {odd} is not a multiple of {odd - 1}"):
        load_adapted_pipeline(
            str(tmp_path), model_init_kwargs={"safety_checker": None}, sizes={"height": odd}, use_cpu=True
        )


@pytest.mark.parametrize(
    ("value", "longest", "use"),
    [
        (7, None, 8),
        (11, None, 8),
        (13, None, 16),
        (3, None, 8),
        ("8x13", None, "8x16"),
        (40, 24, 24),
        ("40x8", 20, "16x8"),
        ("40x9", 20, "16x8"),
        ("0x9", None, "8x8"),
    ],
)
def test_the_nearest_size_that_fits_is_offered_and_fits(value, longest, use):
    with pytest.raises(ValueError, match=f"use {use}[.]$"):
        check_sides(8, longest, resolution=value)
    check_sides(8, longest, resolution=use, height=None)
