"""`tgol plan`: the flags of `tgol train`, a table, JSON; and the check of memory before training."""

import dataclasses
import json

import pytest
import torch

from tests import ROOT
from tgol_trainer import planning
from tgol_trainer.cli import main
from tgol_trainer.families import FROZEN_DTYPE
from tgol_trainer.planning import Card, Phase, Prediction, Quantization, Step

CONFIGS = ROOT / "scripts" / "configs"
GIB = 2**30


def made_up(setup):
    """10 GiB for training, 13.2 with the estimates; 2 s to 6 s on a card of 1e12 operations a second."""
    training = Phase({"denoiser": 8 * GIB}, 2 * GIB)
    encoding = Phase({"text encoders": GIB}, 0) if setup.cache else None
    sampling, step = Phase({"denoiser": 8 * GIB}, 30 * GIB), Step(2 * GIB, GIB, 2**20, int(1.2e12))
    return Prediction(setup, "X", (480, 832), 16, 81, 5_000_000, encoding, training, sampling, step, 1000, 2000)


@pytest.fixture
def asked(monkeypatch):
    """Every setup that was predicted, by a formula."""
    setups = []
    monkeypatch.setattr(planning, "predict", lambda setup: (setups.append(setup), made_up(setup))[1])
    monkeypatch.setattr(planning, "found_card", lambda: None)
    return setups


def test_a_plan_of_the_embedded_model_as_json(capsys):
    code = main(["plan", "shapes", "--vram", "8", "--per_device_train_batch_size", "2", "--json", "-"])
    plan = json.loads(capsys.readouterr().out)
    assert (code, plan["fits"], plan["flags"]) == (0, True, {})
    assert plan["card"] == {"name": "the card", "memory": 8 * GIB}
    asked = plan["asked"]
    assert (asked["pipeline"], asked["height"], asked["batch_size"]) == ("StableDiffusionPipeline", 32, 2)
    training = asked["bytes"]["training"]
    assert training["tensors"] == sum(training[name] for name in ("denoiser", "adapter", "optimizer", "working"))
    assert training["optimizer"] == 2 * training["adapter"] == 2 * asked["gradients"]


def test_the_table_names_each_part_the_verdict_and_the_time(capsys, asked, tmp_path):
    arguments = ["owner/model", "--vram", "16", "--card", "l4", "--bf16", "true", "--num_prompts", "10"]
    assert main(["plan", *arguments, "--json", str(tmp_path / "plan.json")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "owner/model: X, 480x832, 81 frames, bfloat16" in lines
    assert "together 2.0 GiB 11.2 GiB 42.0 GiB" in lines
    assert "of 16.0 GiB fits fits too much" in lines
    assert "Cache of 10,000 clips and 10 prompts: 19 MiB on disk, at most." in lines
    # 1.2e12 operations at 121e12 · 0.6 and · 0.2 a second
    assert "An update takes 0.017 to 0.05 s, an estimate from the card's published rate." in lines
    assert lines[-1] == "It fits L4 as it is."
    assert json.loads((tmp_path / "plan.json").read_text())["asked"]["num_frames"] == 81


def test_without_a_card_there_is_no_verdict_and_where_nothing_fits_the_exit_code_is_1(capsys, asked, monkeypatch):
    assert main(["plan", "shapes"]) == 0
    assert capsys.readouterr().out.endswith("Give --vram or --card to know whether it fits, and with which flags.\n")
    for fits, code, text in (
        (True, 0, "It fits the card with these flags"),
        (False, 1, "Nothing that was tried fits"),
    ):
        found = planning.Fit(made_up(asked[0]), {"dtype": "bfloat16"}, fits)
        monkeypatch.setattr(planning, "fit", lambda *args, found=found, **options: found)
        assert main(["plan", "shapes", "--vram", "4"]) == code
        output = capsys.readouterr().out
        assert text in output
        assert "    --dtype bfloat16\n" in output


def test_a_settings_file_of_training_is_planned_as_it_would_be_trained(asked):
    main(["plan", "--config", str(CONFIGS / "flux_dev.yaml")])
    main(["plan", "--config", str(CONFIGS / "wan21_1_3b.yaml"), "--cache", "false"])
    main(["plan", "a/b", "--config", str(CONFIGS / "sd15_paper.yaml"), "--dataset_streaming", "true"])
    flux, wan, paper = asked
    assert flux.model == "black-forest-labs/FLUX.1-dev"
    assert flux.quantization == Quantization(4, double=True, compute_dtype=torch.bfloat16)
    assert (flux.dtype, flux.batch_size, flux.accumulation, flux.checkpointing) == ("bfloat16", 4, 32, True)
    assert (flux.lora.r, flux.autocast, flux.cache) == (16, None, True)
    assert wan.dtype == {"default": "bfloat16", "vae": "float32"}
    assert (wan.resolution, wan.num_frames, wan.cache) == ((480, 832), 81, False)
    assert (paper.model, paper.lora, paper.autocast, paper.dtype) == ("a/b", None, torch.bfloat16, "float32")
    assert (paper.resolution, paper.cache) == (None, False)


def test_a_frozen_base_is_planned_in_16_bits_as_it_is_loaded_on_a_gpu_and_without_a_reference_for_sft(asked):
    main(["plan", "a/b", "--loss_type", "sft"])
    main(["plan", "a/b", "--model_init_kwargs", '{"dtype": "float32"}', "--precompute_ref_log_probs", "true"])
    main(["plan", "shapes"])
    assert [setup.dtype for setup in asked] == [FROZEN_DTYPE, "float32", "float32"]
    assert [setup.reference_pass for setup in asked] == [False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name a model"),
        (["shapes", "--card", "3dfx"], "error: --card: '3dfx' is not known; known are 3090"),
        (["shapes", "--vram", "0"], "error: --vram: 0.0 is not a number of GiB above 0"),
        (["shapes", "--adapter_name_or_path", "x"], "error: --adapter_name_or_path is not read here"),
        (["shapes", "--no_such_flag", "1"], "error: .*no_such_flag"),
        (["x", "--model_init_kwargs", '{"meissonic_repository": "y"}'], "error: Meissonic cannot be planned for"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(asked, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["plan", *arguments])


def test_training_on_a_card_that_is_too_small_is_refused_unless_asked_not_to_look(asked, monkeypatch, tmp_path):
    arguments = ["--model_name_or_path", "shapes", "--dataset_name", str(tmp_path / "none"), "--optim", "lomo"]
    monkeypatch.setattr(planning, "found_card", lambda: Card("a card", 10 * GIB - 1))
    with pytest.raises(
        SystemExit, match=r"error: Training takes 10.0 GiB with prompts of full length.*--check_memory false tries it"
    ):
        main(["train", *arguments])
    # The least, where it is not known; then with activations recomputed, before it is refused.
    assert [(setup.optimizer, setup.checkpointing) for setup in asked] == [("sgd", False), ("sgd", True)]
    # Other runs get as far as their data, which is not there; with a card of 10 GiB it may fit.
    for more in (["--check_memory", "false"], ["--use_cpu", "true"]):
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments, *more])
        assert "Training takes" not in str(stop.value)
    assert len(asked) == 2
    monkeypatch.setattr(planning, "found_card", lambda: Card("a card", 10 * GIB))
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert "Training takes" not in str(stop.value)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("memory", "flags", "switched_on"),
    [
        (0.3 * GIB, [], True),
        (0.6 * GIB, [], False),  # fits as it is
        (0.3 * GIB, ["--activation_checkpointing", "false"], False),
        (0.3 * GIB, ["--gradient_checkpointing", "true"], False),  # by the user
    ],
)
def test_checkpointing_is_switched_on_where_the_plan_needs_it_and_the_user_did_not_say(
    memory, flags, switched_on, monkeypatch, capsys, tmp_path
):
    """Batches of 256 of the embedded model take 0.5 GiB beside the context's 1 GiB, less where recomputed."""
    from tgol_trainer.cli import train

    seen = []

    def trained(script, training, model, sample):
        seen.append(training)
        return 0

    monkeypatch.setattr(planning, "found_card", lambda: Card("a card", int(memory) + GIB))
    monkeypatch.setattr(train, "_train", trained)
    arguments = ["train", "--model_name_or_path", "shapes", "--dataset_name", "x", "--output_dir", str(tmp_path / "o")]
    arguments += ["--per_device_train_batch_size", "256", *flags]
    assert main(arguments) == 0
    [training] = seen
    asked = training.activation_checkpointing or training.gradient_checkpointing  # transformers 5.18 knows this alone
    assert bool(asked) == (switched_on or "--gradient_checkpointing" in flags)
    said = capsys.readouterr().err
    assert ("Activations are recomputed" in said) == switched_on
    assert ("of the 1.3 GiB of a card without" in said) == switched_on


def test_the_cards_of_the_help_are_those_that_are_known():
    from tgol_trainer.cli.plan import PlanArguments

    [text] = [item.metadata["help"] for item in dataclasses.fields(PlanArguments) if item.name == "card"]
    assert f"used: {', '.join(planning.CARDS)}." in text
