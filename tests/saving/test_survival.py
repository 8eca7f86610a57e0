"""Runs that are killed, stopped, resumed and broken: what is on disk is whole, and nothing wrong ends in success."""

import copy
import json
import os
import resource
import shlex
import shutil
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.conftest import SMALL, scored_dataset
from tests.helpers import quick
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLConfig, TGOLTrainer, cli
from tgol_trainer.data import DataError
from tgol_trainer.saving.checkpoints import SaveError, flaws, seal
from tgol_trainer.saving.divergence import TrainingDivergedError
from tgol_trainer.saving.resuming import alone_in
from tgol_trainer.saving.stopping import StopOnSignal, TrainingStopped

WEIGHTS = "pytorch_lora_weights.safetensors"
STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lr_scheduler_type": "constant"}


def trainer_in(folder, config, dataset, **options):
    args = config(output_dir=str(folder), **{**STEPS, **options})
    return TGOLTrainer(stable_diffusion(), args, dataset, peft_config=LoraConfig(r=4, lora_alpha=8))


def small(**options):
    return TGOLConfig(**{**SMALL, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with checkpoints 2, 4 and 6, and its adapter."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = trainer_in(folder, small, scored_dataset())
    trainer.train()
    trainer.save_model()
    return SimpleNamespace(folder=folder, weights=load_file(folder / WEIGHTS))


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole.folder, tmp_path / "run"))


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("checkpoint", "_")))


def assert_same_weights(folder, whole):
    found = load_file(folder / WEIGHTS)
    assert found.keys() == whole.weights.keys()
    assert all(torch.equal(found[name], whole.weights[name]) for name in found)


def spoil_with_nan(checkpoint):
    """The first number of the first tensor: safetensors begin with the length of a header."""
    data = bytearray((checkpoint / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 4] = struct.pack("<f", float("nan"))
    (checkpoint / WEIGHTS).write_bytes(data)
    (checkpoint / "checkpoint.json").unlink()
    seal(checkpoint, resumable=True)  # as if they had been written so


def change_a_byte(file):
    """As a disk may."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# ---- Checkpoints are whole ----


SPOILED = {
    "optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "holds no optimizer.pt"),
    "scheduler": (lambda folder: (folder / "scheduler.pt").unlink(), "holds no scheduler.pt"),
    "state": (lambda folder: (folder / "trainer_state.json").unlink(), "holds no trainer_state.json"),
    "cut": (lambda folder: os.truncate(folder / "optimizer.pt", 1000), "optimizer.pt has 1000 bytes instead of"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], f"holds no {WEIGHTS}, optimizer.pt"),
    "changed": (lambda folder: change_a_byte(folder / "optimizer.pt"), "optimizer.pt holds other bytes"),
    "not finite": (spoil_with_nan, "its weights are not finite"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_resume_passes_over_a_newest_checkpoint_that_is_broken_and_refuses_it_by_name(
    case, run, whole, config, dataset, caplog
):
    spoil, message = SPOILED[case]
    spoil(run / "checkpoint-6")
    trainer = trainer_in(run, config, dataset)
    with pytest.raises(FileNotFoundError, match=rf"is not a complete.*{message}.*Name .*checkpoint-4, or"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    trainer.train(resume_from_checkpoint=True)
    passed = [record.getMessage() for record in caplog.records if "is passed over" in record.getMessage()]
    assert len(passed) == 1 and "checkpoint-6" in passed[0] and message in passed[0]
    assert flaws(run / "checkpoint-6") == []
    trainer.save_model()
    assert_same_weights(run, whole)


def test_what_holds_no_optimizer_is_no_checkpoint_whatever_else_it_holds(run, config, dataset):
    with pytest.raises(FileNotFoundError, match=r"run is not a complete.*holds no optimizer.pt.*Name .*checkpoint-6"):
        trainer_in(run, config, dataset).train(resume_from_checkpoint=str(run))
    only = trainer_in(run.parent / "only", config, dataset, save_only_model=True, max_steps=2)
    only.train()
    with pytest.raises(FileNotFoundError, match="saved with `save_only_model=True`, without optimizer"):
        only.train(resume_from_checkpoint=str(run.parent / "only" / "checkpoint-2"))


def test_an_optimizer_that_was_divided_in_another_way_is_not_replaced_by_a_fresh_one(run, config, dataset):
    checkpoint = run / "checkpoint-4"
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer_0.pt")  # as ZeRO-2 names the first process's part
    (checkpoint / "checkpoint.json").unlink()
    seal(checkpoint, resumable=True)
    with pytest.raises(FileNotFoundError, match=r"holds no optimizer\.pt: its run was divided in another way"):
        trainer_in(run, config, dataset).train(resume_from_checkpoint=str(checkpoint))


def test_a_save_that_fails_names_the_last_checkpoint_and_leaves_only_whole_ones(tmp_path, config, dataset):
    """The third save meets a disk that takes no file of the size of an optimizer's state, as a full one would."""
    trainer = trainer_in(tmp_path, config, dataset, save_total_limit=1)
    save, limits = trainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def third_fails(*args):
        if trainer.state.global_step == 6:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, ((tmp_path / "checkpoint-4/optimizer.pt").stat().st_size - 9, -1)
            )
        save(*args)

    trainer._save_checkpoint = third_fails
    try:
        with pytest.raises(SaveError, match=r"Step 6 could not be saved.*finite checkpoint is .*checkpoint-4\. Make"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [name for name in names(tmp_path) if name != "_saving"] == ["checkpoint-4"]
    assert flaws(tmp_path / "checkpoint-4") == []
    again = trainer_in(tmp_path, config, dataset, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-6"]


def test_the_best_checkpoint_is_named_where_it_lies_and_outlives_rotation(tmp_path, config, dataset):
    options = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = TGOLTrainer(
        stable_diffusion(), config(output_dir=str(tmp_path), **{**STEPS, **options}), dataset, eval_dataset=dataset
    )
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert best != "checkpoint-4"
    assert names(tmp_path) == sorted([best, "checkpoint-4"])
    for name in names(tmp_path):
        assert json.loads((tmp_path / name / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
            tmp_path / best
        )


def test_every_file_has_the_mode_of_the_umask(tmp_path, config, dataset):
    before = os.umask(0o027)
    try:
        for full in (False, True):
            options = {"full_finetuning": full, "max_steps": 2}
            trainer = TGOLTrainer(
                stable_diffusion(), config(output_dir=str(tmp_path / str(full)), **{**STEPS, **options}), dataset
            )
            trainer.train()
            trainer.save_model()
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}


# ---- Numbers that are not finite ----


@pytest.mark.parametrize("options", [{"save_strategy": "no"}, {"save_steps": 3}], ids=["at the end", "at a save"])
def test_a_run_that_diverges_between_two_log_lines_fails_and_saves_nothing(tmp_path, config, dataset, options):
    trainer = trainer_in(tmp_path, config, dataset, learning_rate=1e30, logging_steps=10, **options)
    with pytest.raises(TrainingDivergedError, match=r"at step [23]\. .*No checkpoint had been written"):
        trainer.train()
    assert names(tmp_path) == []


def test_weights_that_became_nan_in_the_last_update_are_not_saved_and_the_last_finite_checkpoint_is_named(
    run, config, dataset
):
    trainer = trainer_in(run, config, dataset, max_steps=9)
    trainer.train(resume_from_checkpoint=True)
    before = content(run)
    next(value for value in trainer.model.parameters() if value.requires_grad).data.view(-1)[5] = float("inf")
    with pytest.raises(TrainingDivergedError, match=r"weights are not finite.*finite checkpoint is .*checkpoint-9\."):
        trainer.save_model()
    with pytest.raises(TrainingDivergedError, match="weights are not finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert content(run) == before


# ---- Where a run starts ----


def test_resuming_a_finished_run_says_so_trains_nothing_and_writes_nothing(run, whole, config, dataset, caplog):
    before = content(run)
    trainer = trainer_in(run, config, dataset)
    result = trainer.train(resume_from_checkpoint=True)
    assert (result.global_step, trainer.already_saved) == (6, True)
    assert "The run is finished" in caplog.text
    assert content(run) == before
    (run / WEIGHTS).unlink()
    (run / "tgol_state.json").unlink()  # killed after the last checkpoint
    trainer.train(resume_from_checkpoint=True)
    assert not trainer.already_saved
    trainer.save_model()
    assert_same_weights(run, whole)
    epochs = trainer_in(run, config, dataset, max_steps=-1, num_train_epochs=1.5)
    assert epochs.train(resume_from_checkpoint=True).global_step == 6  # 4 updates an epoch


def test_a_run_that_was_killed_in_its_last_save_saves_all_of_it_again_and_ends_its_rotation(
    run, whole, config, dataset, monkeypatch
):
    """Also where an earlier save of the same step was whole: a push saves once more."""

    def dies(*args, ignore_errors=False):
        if not ignore_errors:  # as folders are cleared that a killed run left
            raise KeyboardInterrupt

    trainer = trainer_in(run, config, dataset)
    trainer.train(resume_from_checkpoint=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tgol_trainer.saving.trainer.write_card", dies)
        trainer.save_model()
    (run / "README.md").unlink()
    limited = trainer_in(run, config, dataset, save_total_limit=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", dies)
        limited.train(resume_from_checkpoint=True)
    assert not limited.already_saved
    again = trainer_in(run, config, dataset, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert not again.already_saved
    again.save_model()
    assert_same_weights(run, whole)
    assert (run / "README.md").is_file() and names(run) == ["checkpoint-6"]


@pytest.mark.parametrize("options", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1}], ids=str)
def test_a_run_that_would_end_before_its_checkpoint_is_refused(run, config, dataset, options):
    with pytest.raises(ValueError, match=rf"`{list(options)[-1]}` is .*checkpoint-6 is already at step 6"):
        trainer_in(run, config, dataset, **options).train(resume_from_checkpoint=True)


def test_a_first_start_with_resume_starts_anew_and_says_so(tmp_path, config, dataset, caplog):
    trainer = trainer_in(tmp_path, config, dataset, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert "holds no checkpoint: training starts anew" in caplog.text
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_new_run_in_a_used_folder_is_refused_before_anything_is_loaded(run, config, dataset, capsys):
    before = content(run)
    with pytest.raises(FileExistsError, match=r"holds checkpoint-2, checkpoint-4, checkpoint-6 of an earlier run"):
        trainer_in(run, config, dataset).train()
    flags = ["--model_name_or_path", "no/model", "--dataset_name", "no/data", "--output_dir", str(run)]
    with pytest.raises(SystemExit):
        cli.main(["train", *flags, "--use_cpu", "true"])
    assert "resume_from_checkpoint true" in capsys.readouterr().err
    assert content(run) == before


def test_a_run_in_a_folder_that_another_run_trains_in_is_refused_and_waits_for_one_that_ends(
    run, config, dataset, monkeypatch
):
    before, waits = content(run), []
    with alone_in(run):
        monkeypatch.setattr("time.sleep", waits.append)
        with pytest.raises(FileExistsError, match=r"Another run trains in `output_dir` .*run at this moment"):
            trainer_in(run, config, dataset, max_steps=8).train(resume_from_checkpoint=True)
    assert content(run) == before and sum(waits) == 20
    other = alone_in(run)
    other.__enter__()
    monkeypatch.setattr("time.sleep", lambda seconds: other.__exit__(None, None, None))
    trainer_in(run, config, dataset, max_steps=8).train(resume_from_checkpoint=True)
    assert "checkpoint-8" in names(run)
    with alone_in(run):  # which was let go of
        pass


def test_a_resume_from_an_older_checkpoint_names_the_later_ones(run, config, dataset, caplog):
    trainer_in(run, config, dataset, max_steps=3).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "also holds checkpoint-4, checkpoint-6" in caplog.text


def test_an_output_folder_that_takes_nothing_is_refused_before_the_model_is_loaded(tmp_path, config, dataset):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
    try:
        with pytest.raises(OSError, match="cannot be written to"):
            TGOLTrainer("no/model", config(output_dir=str(tmp_path / "full")), dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(tmp_path, config, dataset, monkeypatch):
    trainer = trainer_in(tmp_path, config, dataset)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match="0 MB free, and a checkpoint takes about"):
        trainer.train()


# ---- Passes that train nothing ----


@pytest.mark.parametrize(
    ("rows", "options"),
    [(7, {}), (24, {"gradient_accumulation_steps": 4})],
    ids=["shorter than a batch", "shorter than an update"],
)
def test_a_stream_that_makes_no_update_is_an_error(tmp_path, config, dataset, rows, options):
    stream = dataset.select(range(rows)).to_iterable_dataset()
    with pytest.raises(DataError, match=r"made no update, after step 0 of 6"):
        trainer_in(tmp_path, config, stream, **options).train()


def test_a_stream_that_can_be_read_only_once_is_an_error_after_its_first_pass(tmp_path, config, dataset):
    from datasets import IterableDataset

    passes = []

    def once():
        passes.append(len(passes))
        yield from dataset if not passes[-1] else ()

    stream = IterableDataset.from_generator(once, features=dataset.features)
    trainer = trainer_in(tmp_path, config, stream, threshold=0.0)
    with pytest.raises(DataError, match=r"after step 4 of 6.*read again"):
        trainer.train()


@pytest.mark.parametrize("step", quick([3, 4, 5], 5), ids=["in the first pass", "at its end", "in the second"])
def test_a_stream_that_is_resumed_gives_the_rows_and_weights_of_an_unbroken_run(tmp_path, config, step):
    """31 rows in updates of 8: 3 a pass, in another order each; dropout asks the global generator."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3)

    def trained(**resume):
        stream = scored_dataset(31).to_iterable_dataset().shuffle(seed=1, buffer_size=9)
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        options |= {"save_steps": step, "max_steps": 7}
        args = config(output_dir=str(tmp_path), **{**STEPS, **options})
        trainer = TGOLTrainer(stable_diffusion(), args, stream, peft_config=copy.deepcopy(lora))
        rows, compute = [], trainer.compute_loss

        def watched(model, inputs, *args, **kwargs):
            rows.append((trainer.state.global_step, inputs["row_id"].tolist()))
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched
        trainer.train(**resume)
        lines = [(line["step"], line["epoch"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
        return rows, lines, trainer.model.state_dict()

    whole_rows, whole_lines, whole_weights = trained()
    assert whole_rows[:6] != whole_rows[6:12]
    rows, lines, weights = trained(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert rows == [row for row in whole_rows if row[0] >= step]
    assert lines == whole_lines
    assert all(torch.equal(value, weights[name]) for name, value in whole_weights.items())


# ---- Settings that decide what is trained ----


CHANGED = {
    "temperature": {"temperature": 0.01},
    "beta": {"beta": 2.0},
    "loss_type": {"loss_type": "kto"},
    "seed": {"seed": 7, "data_seed": 42},
    "resolution": {"resolution": 32},
    "learning_rate": {"learning_rate": 1e-4},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "per_device_train_batch_size": {"per_device_train_batch_size": 4},
}
OPTIMIZERS = {
    "optim": {"optim": "adafactor"},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta2": {"adam_beta2": 0.9},
}


def resume_changed(run, config, dataset, lora=None, pipe=None, **options):
    settings = {**STEPS, "max_steps": 8, "output_dir": str(run), **options}
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, **(lora or {})}) if not options.get("full_finetuning") else None
    trainer = TGOLTrainer(pipe or stable_diffusion(), config(**settings), dataset, peft_config=lora)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_resume_with_another_setting_is_refused_by_name(run, config, dataset):
    before = content(run)
    for name, options in CHANGED.items():
        with pytest.raises(ValueError, match=rf"other settings: {name} from .* to .*--allow_changed {name}`"):
            resume_changed(run, config, dataset, **options)
    for name, options in OPTIMIZERS.items():
        with pytest.raises(ValueError, match=rf"cannot be resumed with {name} from .* state of the optimizer"):
            resume_changed(run, config, dataset, allow_changed=["all"], **options)
    for name, value in {"lora_alpha": 16, "use_rslora": True}.items():
        with pytest.raises(ValueError, match=rf"other settings: {name} from"):
            resume_changed(run, config, dataset, lora={name: value})
    for name, value in {"r": 8, "target_modules": ["to_q"]}.items():
        with pytest.raises(ValueError, match=rf"cannot be resumed with {name} from"):
            resume_changed(run, config, dataset, lora={name: value})
    with pytest.raises(ValueError, match="does not fit the adapter of this run"):
        resume_changed(run, config, dataset, lora={"use_dora": True}, allow_changed=["use_dora"])
    with pytest.raises(ValueError, match="cannot be resumed with full_finetuning from false to true"):
        resume_changed(run, config, dataset, full_finetuning=True, learning_rate=1e-3)
    assert content(run) == before


def test_a_resume_on_another_base_model_or_other_rows_is_refused_by_name(run, config, dataset):
    with pytest.raises(
        ValueError, match=r"other settings: model from .* in float32, .* in bfloat16, .*--allow_changed"
    ):
        resume_changed(run, config, dataset, pipe=stable_diffusion().to(torch.bfloat16))
    other = stable_diffusion()
    next(other.vae.parameters()).data.view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="other settings: model from StableDiffusionPipeline in float32, weights"):
        resume_changed(run, config, dataset, pipe=other)
    rows = {
        "another order": dataset.select([1, 0, *range(2, 32)]),
        "another pixel": dataset.map(
            lambda row, i: {"image": flipped(row["image"]) if i == 3 else row["image"]}, True
        ),
        "a stream": dataset.to_iterable_dataset(),
    }
    for changed in rows.values():
        with pytest.raises(ValueError, match="other settings: train_dataset from 32 rows"):
            resume_changed(run, config, changed)


def flipped(image):
    from PIL import ImageOps

    return ImageOps.mirror(image)


def test_a_change_that_is_allowed_acts_and_the_card_says_so_from_then_on(run, config, dataset):
    """A learning rate of 0 leaves the weights where they were; Trainer alone would go on with the old one."""
    before = load_file(run / WEIGHTS)
    options = {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = resume_changed(run, config, dataset, allow_changed=["learning_rate"], **options)
    trainer.save_model()
    assert all(torch.equal(value, before[name]) for name, value in load_file(run / WEIGHTS).items())
    said = "Training was resumed at step 6 with a change of learning_rate from 0.001 to 0.0."
    assert said in (run / "README.md").read_text()
    again = resume_changed(run, config, dataset, max_steps=10, **options)
    again.save_model()
    assert said in (run / "README.md").read_text()
    assert all(torch.equal(value, before[name]) for name, value in load_file(run / WEIGHTS).items())


def test_harmless_changes_are_logged_and_pass(run, config, dataset, caplog):
    caplog.set_level("INFO", logger="tgol_trainer")
    resume_changed(run, config, dataset, save_steps=3, logging_steps=2)
    [said] = [record.getMessage() for record in caplog.records if "Changed since" in record.getMessage()]
    assert "save_steps from 2 to 3" in said and "logging_steps from 1 to 2" in said and "max_steps from 6 to 8" in said


def test_the_jit_checkpoint_of_transformers_is_refused(config):
    with pytest.raises(ValueError, match="as if it were complete"):
        config(enable_jit_checkpoint=True)


# ---- Signals ----


class Send(TrainerCallback):
    """Send a signal to this process, and to those that load data for it, within the third step."""

    def __init__(self, number, to_workers=False):
        self.number, self.to_workers = number, to_workers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for process in psutil.Process().children() if self.to_workers else []:
                process.send_signal(self.number)
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "name", quick(["SIGTERM", "SIGUSR1", "SIGINT", "SIGTERM to workers"], "SIGINT", "SIGTERM to workers")
)
def test_a_signal_saves_the_step_that_runs_and_the_resumed_run_ends_as_an_unbroken_one(
    name, tmp_path, whole, config, dataset
):
    number = getattr(signal, name.split()[0])
    options = {"dataloader_num_workers": 2} if "workers" in name else {}
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    args = config(output_dir=str(tmp_path), **{**STEPS, "save_only_model": True, "save_steps": 5, **options})
    callbacks = [Send(number, "workers" in name), StopOnSignal()]
    lora = LoraConfig(r=4, lora_alpha=8)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset, peft_config=lora, callbacks=callbacks)
    with pytest.raises(TrainingStopped, match=r"stopped training\. .*checkpoint-3 is saved") as stopped:
        trainer.train()
    assert stopped.value.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    again = trainer_in(tmp_path, config, dataset, **options)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert_same_weights(tmp_path, whole)


def test_without_the_callback_ctrl_c_is_a_keyboard_interrupt_at_once(tmp_path, config, dataset):
    args = config(output_dir=str(tmp_path), **STEPS)
    with pytest.raises(KeyboardInterrupt):
        TGOLTrainer(stable_diffusion(), args, dataset, callbacks=[Send(signal.SIGINT)]).train()
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_second_ctrl_c_ends_at_once(tmp_path, config, dataset):
    callbacks = [Send(signal.SIGINT), Send(signal.SIGINT), StopOnSignal()]
    args = config(output_dir=str(tmp_path), **STEPS)
    with pytest.raises(KeyboardInterrupt):
        TGOLTrainer(stable_diffusion(), args, dataset, callbacks=callbacks).train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_command_ends_with_the_signals_number_and_with_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    scored_dataset(side=32).to_parquet(tmp_path / "rows.parquet")
    flags = {"model_name_or_path": "shapes", "dataset_name": tmp_path / "rows.parquet", "max_steps": 4}
    flags |= {"per_device_train_batch_size": 8, "use_cpu": "true", "report_to": "none", "save_steps": 2}

    def command(folder):
        values = {**flags, "output_dir": folder}
        return ["train", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]

    assert cli.main(command(tmp_path / "whole")) == 0
    step = TGOLTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 2 and not (tmp_path / "run" / "checkpoint-3").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(TGOLTrainer, "training_step", interrupted)
    # The first start of a job that is queued again and again.
    assert cli.main([*command(tmp_path / "run"), "--resume_from_checkpoint=true"]) == 128 + signal.SIGTERM
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert shlex.split(last)[1:] == [*command(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    assert Path(shlex.split(last)[0]).name == "tgol"  # by its path where the shell does not find it
    assert not (tmp_path / "run" / WEIGHTS).exists()
    assert cli.main(shlex.split(last)[1:]) == 0
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    before = content(tmp_path / "run")
    assert cli.main(shlex.split(last)[1:]) == 0
    assert "The finished run was there before" in capsys.readouterr().out
    assert content(tmp_path / "run") == before
