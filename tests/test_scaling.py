"""An adapter scaled to a drift: by a network whose drift is known, and by a training that is saved."""

import json

import pytest
import torch

from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer import scaling as module
from tgol_trainer.adapter_files import WEIGHTS_NAME, read_tensors
from tgol_trainer.scaling import scale_to_drift


@pytest.fixture
def scaled(monkeypatch):
    """A stand-in for the adapter: its scale, which `adapters.scale_policy` multiplies."""
    state = {"scale": 1.0}
    monkeypatch.setattr(module.adapters, "scale_policy", lambda _, factor: state.update(scale=state["scale"] * factor))
    return state


@pytest.mark.parametrize("power", [2.0, 1.3, 3.5])
@pytest.mark.parametrize("target", [0.01, 1.0, 40.0])
def test_the_scale_is_found_whatever_power_of_it_the_drift_is(scaled, power, target):
    """With a drift of 2·s^p the scale is (target/2)^(1/p)."""
    found = scale_to_drift(None, target, lambda: 2 * scaled["scale"] ** power)
    assert found.before == 2 and found.after == pytest.approx(target, rel=0.01)
    assert found.scale == pytest.approx(scaled["scale"]) == pytest.approx((target / 2) ** (1 / power), rel=0.01)


def test_a_drift_that_cannot_be_reached_leaves_the_adapter_as_it_was(scaled):
    with pytest.raises(ValueError, match="left as it was trained"):
        scale_to_drift(None, 5.0, lambda: min(scaled["scale"], 2.0))
    assert scaled["scale"] == pytest.approx(1.0)


def test_an_adapter_that_changes_nothing_has_no_scale(scaled):
    with pytest.raises(ValueError, match="nothing to scale"):
        scale_to_drift(None, 1.0, lambda: 0.0)


def test_a_run_saves_its_adapter_at_the_drift_that_was_asked_for_and_says_so(config, dataset, tmp_path):
    """The saved weights are those of the checkpoint, times one number in every B."""
    args = config(max_steps=2, learning_rate=1e-2, target_drift=1e-4, save_strategy="steps", save_steps=2)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset)
    trainer.train()
    trainer.save_model()
    scale, before, after = trainer.scaling
    assert after == pytest.approx(1e-4, rel=0.01) != before
    run = tmp_path / "run"
    kept, saved = (read_tensors(folder / WEIGHTS_NAME) for folder in (run / "checkpoint-2", run))
    for name, value in saved.items():
        factor = scale if "lora_B" in name or "lora.up" in name else 1.0
        assert torch.allclose(value, factor * kept[name], rtol=1e-4, atol=1e-9)
    assert json.loads((run / "tgol_state.json").read_text())["scaling"]["scale"] == pytest.approx(scale)
    assert "scaling" not in json.loads((run / "checkpoint-2" / "tgol_state.json").read_text())
    assert f"multiplied by {scale:.4g} after training" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "sft"}, "has no effect here"),
        ({"precompute_ref_log_probs": True}, "has no effect here"),
        ({"full_finetuning": True}, "whose scale 0 is the reference"),
        ({"reference_update": "epoch"}, "moves the reference"),
    ],
)
def test_a_drift_that_would_not_be_that_of_the_adapter_is_refused(config, settings, said):
    with pytest.raises(ValueError, match=said):
        config(target_drift=0.01, **settings)


def test_a_stream_is_refused_before_it_is_trained_on(config, dataset):
    trainer = TGOLTrainer(stable_diffusion(), config(target_drift=0.01, max_steps=1), dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="a dataset with a length"):
        trainer.train()
