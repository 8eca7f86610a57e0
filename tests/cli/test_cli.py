"""The `tgol` command: its help, its errors, and a real run on a folder of one's own images."""

import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from tests import ROOT
from tgol_trainer import TGOLConfig, __version__, cli
from tgol_trainer.cli import COMMANDS, main
from tgol_trainer.shapes import PROMPTS, load_pipeline

pytestmark = pytest.mark.xdist_group("cli")  # fixtures that train are shared by a file's tests

OWN = sorted({item.name for item in dataclasses.fields(TGOLConfig)} - set(TrainingArguments.__dataclass_fields__))
SCRIPT = Path(sys.executable).with_name("tgol")
COMMAND = (
    [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from tgol_trainer.cli import main; exit(main())"]
)

# Lines of other libraries about things a user of the command neither did nor can change.
NOISE = ("requires torchvision", "gemm_4bit", "peft_config", "No LoRA keys", "pin_memory", "Warning", "deprecated")


def run_command(arguments, cwd, command=COMMAND, timeout=300):
    """A real process, as a user starts it, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(cwd / "datasets_cache")
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def squeezed(text):
    """Without white space: help texts are wrapped, also behind hyphens."""
    return "".join(text.split())


def refused(capsys, *arguments):
    """The message and the exit code with which a command line is refused in this process, as the shell sees them."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    errors = capsys.readouterr().err
    if isinstance(stop.value.code, str):  # Python prints it and exits with 1
        return stop.value.code, 1
    return errors[errors.index("error: ") :], stop.value.code


# ---- Help ----


def test_help_lists_every_command_and_each_has_a_module_with_a_main(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"quickstart", "train"} <= set(COMMANDS)
    for name, text in COMMANDS.items():
        assert any(re.fullmatch(rf"  {name} +{re.escape(text)}", line) for line in lines), name
        assert callable(importlib.import_module(f"tgol_trainer.cli.{name}").main)
    modules = {file.stem for file in Path(cli.__file__).parent.glob("*.py")} - {
        "__init__",
        "__main__",
        "console",
        "label_text",
        "model",
        "recipes",
    }
    assert modules == set(COMMANDS)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["quickstart", "--help"], ["label", "--help"], ["no-such-command"]]
)
def test_light_commands_import_neither_torch_nor_transformers_nor_any_other_library(tmp_path, arguments):
    """What decides how long they take, and unlike seconds it is the same on a busy machine."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from tgol_trainer.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.stderr.write('\\n' + ' '.join({name.split('.')[0] for name in set(sys.modules) - before}))\n"
    )
    done = run_command([], tmp_path, [sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    libraries = set(done.stderr.splitlines()[-1].split()) - set(sys.stdlib_module_names)
    if "label" in arguments:  # its flags are the fields of the method, which needs numpy; numpy brings Cython's
        libraries = {name for name in libraries if name != "numpy" and "cython" not in name}
    assert libraries == {"tgol_trainer"}


HELP_PROGRAM = """
import contextlib, json, runpy, sys
from pathlib import Path
from types import SimpleNamespace
import tgol_trainer  # first, as the command does: on some processors bitsandbytes speaks when transformers imports it
from transformers import TrainingArguments

before = set(sys.modules)

def help_of(call, file):
    with open(file, "w") as out, contextlib.redirect_stdout(out):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    assert not code, code

from tgol_trainer.cli import main
help_of(lambda: main(["train", "--help"]), "train.txt")
Path("imported.json").write_text(json.dumps(sorted(set(sys.modules) - before)))
sys.argv = [sys.argv[1], "--help"]
help_of(lambda: runpy.run_path(sys.argv[0], run_name="__main__"), "script.txt")
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """Help of `tgol train`, help of the script for launchers, what the first imported, and the standard error of both.

    In one process, since most of its time goes to starting.
    """
    folder = tmp_path_factory.mktemp("help")
    script = str(ROOT / "scripts" / "train_tgol.py")
    done = run_command([script], folder, [sys.executable, "-c", HELP_PROGRAM])
    assert done.returncode == 0, done.stderr
    train, script = ((folder / name).read_text() for name in ("train.txt", "script.txt"))
    imported = json.loads((folder / "imported.json").read_text())
    return SimpleNamespace(train=train, script=script, imported=imported, errors=done.stderr)


def test_help_of_train_imports_little_more_than_transformers_own_arguments_and_comes_without_noise(helps):
    """Importing `TrainingArguments` alone takes 6 to 9 s of this kind of processor, which is not ours to mend."""
    assert {name.split(".")[0] for name in helps.imported} <= {"tgol_trainer", "trl"}
    assert len(helps.imported) <= 60
    assert not [phrase for phrase in NOISE if phrase in helps.errors]


def test_help_of_train_explains_every_field_of_the_configuration(helps):
    assert len(OWN) > 15
    for name in OWN:
        explanation = TGOLConfig.__dataclass_fields__[name].metadata["help"]
        assert re.search(rf"^  --{name}\b", helps.train, re.MULTILINE), name
        assert len(explanation) > 20, name
        assert squeezed(explanation) in squeezed(helps.train), name
    for name in ("dataset_name", "model_name_or_path", "lora_r", "proxy_dataset_name"):
        assert re.search(rf"^  --{name}\b", helps.train, re.MULTILINE), name


def test_the_script_for_launchers_takes_the_flags_of_train(helps):
    flags = set(re.findall(r"^  (--\w+)", helps.script, re.MULTILINE))
    assert {f"--{name}" for name in OWN} <= flags
    assert flags == set(re.findall(r"^  (--\w+)", helps.train, re.MULTILINE))


def test_help_of_quickstart_names_its_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--output_dir", "--num_images", "--num_steps", "--num_evaluation_images", "--seed"):
        assert flag in text


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tgol_trainer {__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("quick-start", "quickstart"), ("xyz", None)])
def test_an_unknown_command_exits_with_2_and_a_suggestion_where_one_is_near(capsys, typed, meant):
    assert main([typed, "--help"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"unknown command {typed!r}" in said.err
    assert said.err.count("Did you mean") == (meant is not None)
    assert meant is None or f"Did you mean `{meant}`?" in said.err


def test_no_command_at_all_prints_the_usage_and_exits_with_2(capsys):
    assert main([]) == 2
    assert "usage: tgol <command>" in capsys.readouterr().out


# ---- What is refused before anything is loaded ----


def test_what_is_missing_is_said_in_one_line_by_a_real_process(tmp_path):
    done = run_command(["train", "--model_name_or_path", "shapes"], tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: --dataset_name is needed: [^\n]+\n", done.stderr)
    assert done.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "datasets_cache"] == []


MODEL = ("--model_name_or_path", "some/model")
DATA = ("--dataset_name", "some/data")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (DATA, "--model_name_or_path is needed"),
        (MODEL, "--dataset_name is needed"),
        ((*MODEL, *DATA, "--load_in_4bit", "true", "--load_in_8bit", "true"), "8 bit and 4 bit precision at the same"),
        ((*MODEL, *DATA, "--load_in_4bit", "true", "--torchao", "int8"), "one way to quantise is enough"),
        ((*MODEL, *DATA, "--bnb_4bit_quant_storage", "uint8"), "--bnb_4bit_quant_storage: not supported"),
        ((*MODEL, *DATA, "--attn_implementation", "sdpa"), "--attn_implementation: not supported"),
        ((*MODEL, *DATA, "--lora_modules_to_save", "conv_in"), "--lora_modules_to_save: not supported"),
        ((*MODEL, *DATA, "--lora_task_type", "SEQ_CLS"), "--lora_task_type: not supported"),
        ((*MODEL, *DATA, "--ignore_bias_buffers", "true"), "--ignore_bias_buffers: not supported"),
        ((*MODEL, *DATA, "--lora_r", "8", "--full_finetuning", "true"), "--lora_r: has no effect with --full_fine"),
        (
            (*MODEL, *DATA, "--use_dora", "true", "--adapter_name_or_path", "x"),
            "--use_dora: has no effect with",
        ),
        (("--model_name_or_path", "shapes", *DATA, "--dtype", "bfloat16"), "--dtype: has no effect on the embedded"),
        (("--model_name_or_path", "shapes", *DATA, "--model_revision", "v2"), "--model_revision: has no effect on th"),
        (
            ("--model_name_or_path", "shapes", *DATA, "--model_init_kwargs", '{"dtype": "bfloat16"}'),
            "--model_init_kwargs: has no effect on the embedded",
        ),
        ((*MODEL, *DATA, "--beta", "-1"), "`beta` must be larger than 0"),
        ((*MODEL, *DATA, "--betta", "1"), "--betta"),
        ((*MODEL, *DATA, "--config", "no_such_file.yaml"), "no_such_file.yaml"),
        ((*MODEL, *DATA, "--lora_r", "0"), "--lora_r: must be at least 1, got 0"),
        ((*MODEL, *DATA, "--lora_dropout", "1"), "--lora_dropout: must be at least 0 and below 1"),
        ((*MODEL, *DATA, "--seed", "-1"), "`seed` must be at least 0"),
        ((*MODEL, *DATA, "--learning_rate", "nan"), "`learning_rate` must be at least 0 and finite, got nan"),
    ],
)
def test_flags_that_are_missing_wrong_or_would_be_dropped_in_silence_are_refused_in_one_line(
    capsys, tmp_path, flags, message
):
    said, code = refused(capsys, "train", *flags, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true")
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said
    assert code == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [("train", *MODEL, *DATA), ("label", *DATA)], ids=["train", "label"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"beta: [1,\nseed: 2\n", "run.yaml, line 3, column 1: expected ',' or ']'"),
        (b"score_columns:\n\t- a\n", "run.yaml, line 2, column 1: found character .*Indent with blanks"),
        (b"beta: 1\nnote: caf\xe9\n", "run.yaml' is not UTF-8: line 2, character 10 is the byte 0xe9"),
        ("beta: 1\n".encode("utf-16"), "run.yaml' is UTF-16"),
        (b"- beta\n", "holds no settings"),
        (b"", "holds no settings"),
        (None, "there is no file"),
    ],
    ids=["syntax", "tab", "latin-1", "UTF-16", "list", "empty", "folder"],
)
def test_a_settings_file_that_is_none_is_refused_with_line_and_column(capsys, tmp_path, command, content, message):
    path = tmp_path / "run.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    said, code = refused(capsys, *command, "--config", str(path))
    assert re.match(f"error: --config: .*{message}", said) and "\n" not in said and code == 1


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("seed", ["-1", "0.5"])
def test_a_seed_that_names_no_images_is_refused_in_one_line(capsys, tmp_path, command, seed):
    given = {"generate": [], "evaluate": ["--adapters", "x", "--rewards", "y"]}[command]
    flags = ["--prompts", "p.txt", "--output_dir", str(tmp_path / "run"), "--seed", seed, *given]
    said, code = refused(capsys, command, "--model_name_or_path", "shapes", *flags)
    assert f"argument --seed: must be a whole number of at least 0, got '{seed}'" in said
    assert code == 2
    assert not (tmp_path / "run").exists()


def test_a_conversion_into_its_own_source_is_refused_and_leaves_it_as_it_was(capsys, tmp_path):
    (tmp_path / "metadata.csv").write_text("image,prompt,rating\n0.png,a,1\n")
    said, code = refused(
        capsys, "convert", "ratings", str(tmp_path), "--rating_column", "rating", "--output_dir", f"{tmp_path}/."
    )
    assert "is the source" in said and code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.csv"]


def test_every_flag_of_trl_is_either_used_or_refused():
    module, model = (importlib.import_module(f"tgol_trainer.cli.{name}") for name in ("train", "model"))
    source = inspect.getsource(module) + inspect.getsource(model)
    no_effect = {"use_peft", "recipe"}  # a LoRA is trained unless `full_finetuning`; the parser reads a recipe
    dropped = []
    for kind, variable in ((module.ModelArguments, "model"), (module.TrainArguments, "script")):
        for item in dataclasses.fields(kind):
            used = re.search(rf"\b{variable}\.{item.name}\b", source)
            if not used and item.name not in module.UNUSED and item.name not in no_effect:
                dropped.append(item.name)
    assert not dropped


# ---- One's own images ----

RATINGS = [1, 2, 3, 3, 3, 4, 5, 5]
"""Of every eight images: the median is 3, of which there are three."""


def write_images(folder, scores=RATINGS, score_column="score"):
    """64 images as people have them: several sizes, modes and formats, one turned by its EXIF tag; star ratings."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(64):
        width, height = (int(side) for side in rng.integers(24, 80, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert(("RGB", "RGBA", "L", "P", "LA", "CMYK")[index % 6])
        name = f"{index:03}.{'jpg' if image.mode == 'CMYK' or index == 0 else 'png'}"
        exif = Image.Exif()
        if index == 0:
            exif[0x0112] = 6  # the camera was held upright
        image.save(folder / name, exif=exif)
        rows.append({"file_name": name, "prompt": PROMPTS[index % len(PROMPTS)]})
        if scores is not None:
            rows[-1][score_column] = scores[index % len(scores)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags_for(data, output, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": "true", "report_to": "none", **settings}
    settings |= {"model_name_or_path": "shapes", "dataset_name": data, "output_dir": output, "logging_steps": 1}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run in this process; the pair of its folder and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "flags"
    assert main(["train", *flags_for(images, output)]) == 0
    return output


def check_run(folder, steps):
    assert {entry.name for entry in folder.iterdir()} >= {
        "pytorch_lora_weights.safetensors",
        "README.md",
        "training_args.json",
        "tgol_state.json",
        "trainer_state.json",
    }
    assert not list(folder.glob("*.bin"))
    assert not list(folder.glob("training_args.bin"))
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    second_halves = [tensor for name, tensor in weights.items() if name.endswith("lora_B.weight")]
    assert second_halves
    assert all(tensor.abs().sum() > 0 for tensor in second_halves)  # they start at zero
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == list(range(1, steps + 1))
    threshold = json.loads((folder / "tgol_state.json").read_text())["threshold"]
    assert (threshold["value"], threshold["num_positive"], threshold["num_ties"]) == (3.0, 48, 24)
    return [line["loss"] for line in history if "loss" in line]


def test_a_run_on_ones_own_images_leaves_adapter_card_arguments_and_threshold(trained):
    check_run(trained, steps=3)
    card = (trained / "README.md").read_text()
    assert card.startswith("---\n")
    assert "load_lora_weights" in card
    arguments = json.loads((trained / "training_args.json").read_text())
    assert (arguments["max_steps"], arguments["beta"], arguments["learning_rate"]) == (3, 1.0, 1e-4)


def test_the_adapter_of_a_run_changes_the_images_of_a_fresh_pipeline(trained):
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def latents():
        generator = np.random.default_rng(0).normal(size=(1, pipe.unet.config.in_channels, 4, 4)).astype(np.float32)
        settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(PROMPTS[0], latents=torch.from_numpy(generator), **settings).images

    before = latents()
    pipe.load_lora_weights(trained)
    assert (latents() - before).abs().max() > 0


def test_a_yaml_file_trains_the_same_and_the_process_says_nothing_a_user_cannot_act_on(trained, images, tmp_path):
    lines = ["model_name_or_path: shapes", f"dataset_name: {images}", "max_steps: 3", "report_to: none"]
    lines += ["per_device_train_batch_size: 8", "use_cpu: true", "logging_steps: 1", "output_dir: from_yaml"]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
    done = run_command(["train", "--config", "run.yaml"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not [phrase for phrase in NOISE if phrase in done.stderr + done.stdout]
    assert "Threshold 3 (percentile): 48 positive, 16 negative, 24 tied" in done.stderr
    assert "Saved to from_yaml" in done.stdout
    losses = check_run(tmp_path / "from_yaml", steps=3)
    np.testing.assert_allclose(losses, check_run(trained, steps=3), rtol=1e-6)


def test_a_flag_wins_over_the_yaml_file_in_a_real_run(images, tmp_path):
    settings = {"model_name_or_path": "shapes", "dataset_name": str(images), "max_steps": 1, "beta": 7.0}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    flags = ["--config", str(tmp_path / "run.yaml"), "--beta", "2", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags, "--use_cpu", "true", "--report_to", "none"]) == 0
    arguments = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert (arguments["beta"], arguments["max_steps"]) == (2.0, 1)


def test_resuming_by_flag_continues_the_last_checkpoint_to_what_an_unbroken_run_gives(images, tmp_path):
    settings = {"save_steps": 2, "lr_scheduler_type": "constant"}
    assert main(["train", *flags_for(images, tmp_path / "whole", max_steps=5, **settings)]) == 0
    assert main(["train", *flags_for(images, tmp_path / "parts", max_steps=3, **settings)]) == 0
    early = tmp_path / "parts" / "checkpoint-2" / "trainer_state.json"
    written = early.stat().st_mtime_ns
    resume = [*flags_for(images, tmp_path / "parts", max_steps=5, **settings), "--resume_from_checkpoint", "true"]
    assert main(["train", *resume]) == 0
    assert check_run(tmp_path / "parts", steps=5) == check_run(tmp_path / "whole", steps=5)
    assert early.stat().st_mtime_ns == written  # continued: a run from the start would write it again


# ---- Bad data ----


def cut_short(folder):
    data = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("scores", "spoil", "parts"),
    [
        (None, None, ["no column 'score' (score)", "'prompt'", "rename_column"]),
        ([3], None, ["All 64 scores equal 3.0", "column"]),
        (RATINGS, cut_short, ["1 of 64 rows", "column 'image', truncated image: 1 (row 7:", "on_bad_sample='skip'"]),
        ([1, 2, None, 4, 5, 1, 2, 3], None, ["8 of 64 rows", "column 'score', missing score: 8 (row 2:", "row 10:"]),
    ],
    ids=["no score column", "all scores equal", "a truncated image", "missing scores"],
)
def test_bad_data_end_in_a_message_that_names_column_and_rows_and_in_exit_code_1(
    capsys, tmp_path, scores, spoil, parts
):
    folder = write_images(tmp_path / "images", scores)
    if spoil:
        spoil(folder)
    message, code = refused(capsys, "train", *flags_for(folder, tmp_path / "run"))
    assert code == 1
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_a_bad_row_can_be_left_out_and_is_counted_in_the_card(capsys, tmp_path):
    folder = write_images(tmp_path / "images")
    cut_short(folder)
    assert main(["train", *flags_for(folder, tmp_path / "run", on_bad_sample="skip", max_steps=1)]) == 0
    assert "1 of 64 rows are left out" in capsys.readouterr().err
    state = json.loads((tmp_path / "run" / "tgol_state.json").read_text())
    assert state["threshold"]["num_scores"] == 63
    assert "| 63 | 1 | `prompt`, `image`, `score` |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("source", ["no_such_folder/", "empty"])
def test_a_dataset_that_is_not_there_is_an_error_with_its_name(capsys, tmp_path, source):
    (tmp_path / "empty").mkdir()
    message, code = refused(capsys, "train", *flags_for(tmp_path / source, tmp_path / "run"))
    assert code == 1
    assert message.startswith("error: ")
    assert source.strip("/") in message


@pytest.mark.parametrize("command", ["generate", "score", "label", "convert", "quickstart"])
def test_an_output_folder_that_is_a_file_is_named_by_every_command(capsys, images, tmp_path, command):
    file, prompts = tmp_path / "file", tmp_path / "prompts.txt"
    file.write_text("x")
    prompts.write_text("a red circle")
    arguments = {
        "generate": ("--model_name_or_path", "shapes", "--prompts", str(prompts), "--use_cpu"),
        "score": (str(images), "--rewards", "jpeg_compressibility"),
        "label": ("--dataset_name", str(images)),
        "convert": ("ratings", str(images), "--rating_column", "score"),
        "quickstart": (),
    }[command]
    message, code = refused(capsys, command, *arguments, "--output_dir", str(file))
    assert str(file) in message and "Traceback" not in message and code in (1, 2)
    assert file.read_text() == "x"
