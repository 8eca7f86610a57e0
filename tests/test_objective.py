"""The warning of a temperature that does not suit the model: once, and only where there is a sigmoid to suit."""

import logging
from types import SimpleNamespace

import pytest

from tgol_trainer.likelihoods import DiffusionLikelihood, MaskedTokenLikelihood
from tgol_trainer.objective import TemperatureWatch

SATURATED = {"loss": 1.0, "rewards/std": 9.0, "rewards/large_share": 0.8}


def said(caplog, watch, loss_type="tgol", logs=SATURATED):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tgol_trainer.objective"):
        state = SimpleNamespace(global_step=4, max_steps=8)
        watch.on_log(SimpleNamespace(loss_type=loss_type, temperature=0.001), state, SimpleNamespace(), logs)
    return caplog.text


def test_saturated_rewards_are_named_once_with_the_temperature_to_set(caplog):
    watch = TemperatureWatch(DiffusionLikelihood.__new__(DiffusionLikelihood))
    assert not said(caplog, watch, logs={"eval_loss": 1.0, **{f"eval_{key}": 9.0 for key in SATURATED}})
    assert "80% of the implicit rewards" in (text := said(caplog, watch)) and "about 0.009" in text
    assert not said(caplog, watch)


@pytest.mark.parametrize("loss_type", ["sft", "nft", "tgol_anchored"])
def test_losses_without_a_sigmoid_get_no_advice(caplog, loss_type):
    assert not said(caplog, TemperatureWatch(DiffusionLikelihood.__new__(DiffusionLikelihood)), loss_type)


def test_token_models_which_take_no_temperature_get_no_advice(caplog):
    assert not said(caplog, TemperatureWatch(MaskedTokenLikelihood(0)))
