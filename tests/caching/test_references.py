"""The reference's errors on fixed draws: those of a second forward pass, computed once, one pass a step."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from tests.conftest import scored_dataset
from tests.helpers import over
from tests.pipelines import TINY
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.caching.references import ReferenceErrors
from tgol_trainer.caching.store import TensorStore
from tgol_trainer.data import Collator, Columns, prepare_dataset

SETTINGS = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 4, "max_steps": 5, "random_flip": True}


def counted(trainer, monkeypatch):
    """Count the rows that the denoiser sees, with and without gradient."""
    seen = {"reference": 0, "policy": 0}
    predict = trainer.family.predict

    def call(model, draw, conditioning):
        prediction = predict(model, draw, conditioning)
        seen["policy" if prediction.requires_grad else "reference"] += len(prediction)
        return prediction

    monkeypatch.setattr(trainer.family, "predict", call)
    return seen


@over(TINY, ("sd", "flux", "wan", "amused"))
def test_a_kept_error_is_that_of_a_second_forward_pass_on_the_same_draw(name, tmp_path, monkeypatch):
    facts = TINY[name]
    settings = {**facts.settings, **SETTINGS, "max_steps": 3, "num_ref_draws": 2, "caption_dropout": 0.3}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args = TGOLConfig(output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), **settings)
    trainer = TGOLTrainer(facts.build(), args, facts.dataset(), eval_dataset=facts.dataset())
    trainer.get_train_dataloader()
    read, compared = trainer.draws.references.read, []

    def both(inputs, step):
        kept = read(inputs, step)
        live = trainer._reference_pass(*trainer.draws(inputs, step))[1]
        torch.testing.assert_close(kept, live, rtol=1e-6, atol=1e-7)
        compared.append(step)
        return kept

    monkeypatch.setattr(trainer.draws.references, "read", both)
    trainer.train()
    trainer.evaluate()
    # Four rows: a step is a pass over the data, and the two draws take turns. Evaluation has a draw of its own.
    assert compared == [-2, -3, -2, -1]
    scores = np.asarray(facts.dataset()["score"])
    weights = 1 + 5 * np.abs(scores - np.median(scores))
    first = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert first == pytest.approx(weights.mean() * math.log(2), rel=1e-3)


def test_training_runs_one_forward_pass_and_the_next_run_no_pass_of_the_reference(config, tmp_path, monkeypatch):
    dataset, evaluated = scored_dataset(8), scored_dataset(4, seed=1)

    def run(**overrides):
        args = config(**{**SETTINGS, "cache_dir": str(tmp_path / "cache"), "allow_bad_base": True, **overrides})
        build = overrides.pop("build", stable_diffusion)
        trainer = TGOLTrainer(build(), args, dataset, evaluated, peft_config=LoraConfig(r=overrides.get("seed", 4)))
        seen = counted(trainer, monkeypatch)
        trainer.train()
        trainer.evaluate()
        return seen["reference"], seen["policy"]

    # Five steps of four of eight rows are three passes. The last 4: the policy's pass of evaluation, without gradient.
    assert run() == (3 * 8 + 4 + 4, 5 * 4)
    assert run(temperature=0.1, beta=0.5) == (4, 20)
    assert run(seed=7) == (3 * 8 + 4 + 4, 20)
    assert run(max_steps=7) == (8 + 4, 28)  # three of four draws are there
    assert run(num_ref_draws=2) == (4, 20)


def test_another_base_model_has_errors_of_its_own_and_another_adapter_on_it_has_not(config, tmp_path, monkeypatch):
    dataset = scored_dataset(8)

    def run(pipeline, **lora):
        args = config(**SETTINGS, num_ref_draws=1, cache_dir=str(tmp_path / "cache"))
        trainer = TGOLTrainer(pipeline, args, dataset, peft_config=LoraConfig(**lora))
        seen = counted(trainer, monkeypatch)
        trainer.get_train_dataloader()
        return seen["reference"]

    assert run(stable_diffusion(), r=4) == 8
    assert run(stable_diffusion(), r=8, target_modules=["to_q", "conv_in"]) == 0
    other = stable_diffusion()
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1e-3
    assert run(other, r=4) == 8


def test_a_job_that_was_killed_computes_the_errors_that_are_missing_in_the_batches_of_an_unbroken_one(
    tmp_path, monkeypatch
):
    """The error of a row is made to tell the rows that it was computed with, as it does in the last bit."""
    monkeypatch.setattr("tgol_trainer.caching.filling._SHARD_SECONDS", 0.0)  # a file for each entry
    rows, collator, batches = prepare_dataset(scored_dataset(11), Columns(), (16, 16))[0], Collator((16, 16)), []
    rows.encoded = True

    def error(inputs, step):
        batches.append(inputs["row_id"].tolist())
        return (2.0 ** inputs["row_id"]).sum() + inputs["row_id"] / 16

    def filled(folder, write=TensorStore.write):
        monkeypatch.setattr(TensorStore, "write", write)
        references = ReferenceErrors(tmp_path / folder, ["key"], collator)
        references.add(rows, [-2], error, batch_size=4)
        return references.read(collator([rows[index] for index in range(11)]), -2).tolist()

    whole = filled("whole")
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert whole[5] == 2**4 + 2**5 + 2**6 + 2**7 + 5 / 16
    written, write = [], TensorStore.write

    def dies(self, keys, entries):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(keys)
        write(self, keys, entries)

    with pytest.raises(KeyboardInterrupt):
        filled("killed", dies)
    batches.clear()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert filled("killed", write) == whole
    assert batches == [[4, 5, 6, 7], [8, 9, 10]]
    now = list((tmp_path / "killed").rglob("*.safetensors"))
    assert len(now) == 11 and all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_images_of_several_sizes_have_the_errors_of_their_own_size_and_autocast_is_that_of_training(config, tmp_path):
    """Rows of two sizes in turns; under bf16 kept errors of float32 give log-ratios of tenths at the first step."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*[(48, 96), (64, 64)][i % 2], 3), dtype=np.uint8)) for i in range(8)
    ]
    rows = Dataset.from_dict({"prompt": ["a"] * 8, "image": images, "score": rng.normal(size=8)})
    for bf16 in (False, True):
        args = config(
            **{**SETTINGS, "random_flip": False}, resolution=64, bf16=bf16, cache_dir=str(tmp_path / "cache")
        )
        trainer = TGOLTrainer(stable_diffusion(), args, rows)
        trainer.train()
        first = next(line for line in trainer.state.log_history if "loss" in line)
        assert abs(first["rewards/positive"]) < 0.02 and abs(first["rewards/negative"]) < 0.02
        again = trainer.evaluate(trainer.train_dataset)
        assert math.isfinite(again["eval_loss"])
        args.max_steps = 9
        trainer.train()  # more passes, so more draws
    with pytest.raises(ValueError, match="it cannot move"):
        trainer.update_reference()


@pytest.mark.parametrize("loss_type", ["sft", "csft"])
def test_supervised_losses_never_run_the_reference_and_log_what_needs_none(config, dataset, monkeypatch, loss_type):
    trainer = TGOLTrainer(
        stable_diffusion(), config(loss_type=loss_type, allow_bad_base=True), dataset, scored_dataset(4)
    )
    seen = counted(trainer, monkeypatch)
    trainer.train()
    assert seen["reference"] == 0
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert {"errors/positive", "errors/negative", "weights/mean", "scores/mean"} <= set(lines[0])
    assert not [key for line in lines for key in line if key.startswith("rewards/") or key.endswith("_change")]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"reference_update": "epoch"}, "makes a new reference after each epoch: leave one out"),
        ({"loss_type": "nft"}, "compares its outputs with the policy's: leave it False"),
        ({"cache": False}, "needs the cache of images and prompts: leave `cache` True"),
        ({"loss_type": "sft"}, "acts only with other loss types than 'sft' and 'csft'"),
    ],
)
def test_what_the_kept_errors_cannot_serve_is_refused(config, others, message):
    with pytest.raises(ValueError, match=message):
        config(precompute_ref_log_probs=True, **others)


def test_a_stream_cannot_have_its_reference_computed_before(config, dataset):
    with pytest.raises(ValueError, match="`precompute_ref_log_probs` needs a dataset with a length"):
        TGOLTrainer(stable_diffusion(), config(precompute_ref_log_probs=True), dataset.to_iterable_dataset())
