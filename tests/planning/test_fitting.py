"""The order in which settings are tried, with a prediction that is a formula, and the decision to refuse a run."""

import dataclasses

import pytest
from peft import LoraConfig

from tgol_trainer.families import FROZEN_DTYPE
from tgol_trainer.planning import Card, Phase, Prediction, Setup, Step, cards, fit, fitting, found_card, refusal
from tgol_trainer.planning.memory import CONTEXT

GIB = 2**30
LORA = LoraConfig(r=16)


def made_up(setup):
    """
    Weights of 4 GiB in float32, 2 in bfloat16, 1.5 stored in 8 bits, 1 in 4 bits, 0.5 on the CPU.

    A row of 512x512 is 1 GiB, a quarter of it recomputed.
    """
    size = setup.resolution or (512, 512)
    weights = 1 if setup.quantization else 1.5 if setup.storage_dtype else 4 if setup.dtype == "float32" else 2
    weights = 0.5 if setup.group_offload else weights
    working = setup.batch_size * size[0] * size[1] / 512**2 * (0.25 if setup.checkpointing else 1)
    training = Phase({"denoiser": int(weights * GIB)}, int(working * GIB))
    step, empty = Step(training.working, 0, 0, 0), Phase({}, 0)
    return Prediction(setup, "X", size, 8, None, 1, empty, training, empty, step, 0, 0)


@pytest.fixture(autouse=True)
def formula(monkeypatch):
    monkeypatch.setattr(fitting, "predict", made_up)
    monkeypatch.setattr(fitting, "weights_alone", lambda setup: made_up(setup).training.resident["denoiser"])


def needs(weights, working):
    """Bytes that suffice for so many GiB, context and slack included."""
    return int((weights + 1.1 * working) * GIB) + CONTEXT


CHECKPOINTING = {"activation_checkpointing": "true"}
TWO = {"per_device_train_batch_size": "2", "gradient_accumulation_steps": "12"}
ONE = {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "24"}
EIGHT_BITS = {"storage_dtype": "float8_e4m3fn"}
OFFLOAD = {"group_offload": "true"}
FOUR_BITS = {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": "true"}


@pytest.mark.parametrize(
    ("memory", "flags"),
    [
        (needs(4, 8), {}),
        (needs(4, 8) - 1, CHECKPOINTING),
        (needs(4, 2), CHECKPOINTING),
        (needs(4, 0.5), CHECKPOINTING | TWO),
        (needs(4, 0.25), CHECKPOINTING | ONE),
        (needs(2, 2), CHECKPOINTING | {"dtype": "bfloat16"}),  # less than needs(4, 0.25)
        (needs(2, 0.25), CHECKPOINTING | ONE | {"dtype": "bfloat16"}),
        (needs(1.5, 0.5), CHECKPOINTING | TWO | {"dtype": "bfloat16"} | EIGHT_BITS),
        (needs(1, 0.25), CHECKPOINTING | ONE | {"dtype": "bfloat16"} | FOUR_BITS),
        (needs(0.5, 0.25), CHECKPOINTING | ONE | {"dtype": "bfloat16"} | OFFLOAD),
        (needs(0.5, 0.25 / 4), CHECKPOINTING | ONE | {"dtype": "bfloat16"} | OFFLOAD | {"resolution": "256"}),
    ],
)
def test_checkpointing_comes_first_then_smaller_batches_bfloat16_8_bits_4_bits_the_cpu_and_the_resolution(
    memory, flags
):
    first = made_up(Setup("x", lora=LORA, batch_size=8, accumulation=3))
    found = fit(first, memory)
    assert found.fits
    assert found.flags == flags
    assert found.prediction.needed <= memory
    asked, setup = first.setup, found.prediction.setup
    assert setup.batch_size * setup.accumulation == asked.batch_size * asked.accumulation


def test_where_nothing_fits_the_least_that_was_found_is_returned():
    first = made_up(Setup("x", lora=LORA, batch_size=8))
    found = fit(first, GIB)
    assert not found.fits
    assert found.prediction.needed == needs(0.5, 0.25 / 4)
    assert found.flags["resolution"] == "256"


def test_batches_that_training_refuses_are_not_tried():
    """With batches of 2 it would fit in float32; 4 rows do not, and with the lighter weights all 8 do."""
    found = fit(made_up(Setup("x", lora=LORA, batch_size=8)), needs(4, 0.5), accepts=lambda size: size % 4 == 0)
    assert found.flags == CHECKPOINTING | {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("stored", "flags"),
    [({"storage_dtype": "float8_e5m2"}, OFFLOAD), ({"group_offload": True}, {"resolution": "256"})],
)
def test_stored_blocks_are_not_quantised(stored, flags):
    found = fit(made_up(Setup("x", lora=LORA, batch_size=1, dtype="bfloat16", **stored)), needs(0.5, 0.1))
    assert found.flags.items() >= flags.items()
    assert "load_in_4bit" not in found.flags


def test_all_weights_stay_float32_and_whole():
    found = fit(made_up(Setup("x", batch_size=8)), needs(4, 0.25 / 4))
    assert found.flags == CHECKPOINTING | {"resolution": "256"} | {
        "per_device_train_batch_size": "1",
        "gradient_accumulation_steps": "8",
    }


@pytest.mark.parametrize(
    ("dtype", "planned", "flag"),
    [
        (FROZEN_DTYPE, "bfloat16", {"dtype": "bfloat16"}),  # or 4-bit layers would compute in float32
        ("float16", "float16", {}),
        ({"default": "bfloat16", "vae": "float32"}, {"default": "bfloat16", "vae": "float32"}, {"dtype": "bfloat16"}),
    ],
)
def test_4_bits_come_with_a_dtype_of_16_bits_to_compute_in(dtype, planned, flag):
    found = fit(made_up(Setup("x", lora=LORA, batch_size=1, dtype=dtype)), needs(1, 0.25))
    assert found.flags == CHECKPOINTING | FOUR_BITS | flag
    assert found.prediction.setup.dtype == planned
    assert found.prediction.setup.quantization.compute_dtype.itemsize == 2


def test_text_encoders_that_do_not_fit_by_themselves_are_tried_in_4_bits(monkeypatch):
    def with_encoders(setup):
        size = 3 if setup.text_encoders_in_4bit else 9
        return dataclasses.replace(made_up(setup), encoding=Phase({"text encoders": size * GIB}, 0))

    monkeypatch.setattr(fitting, "predict", with_encoders)
    first = with_encoders(Setup("x", lora=LORA, batch_size=1))
    four_bits = {"text_encoders_in_4bit": "true"}
    assert fit(first, needs(9, 0)).flags == {}
    assert fit(first, needs(9, 0) - 1).flags == CHECKPOINTING | four_bits
    assert fit(first, needs(3, 0) - 1).fits is False


def test_an_embedded_model_stays_what_it_is():
    found = fit(made_up(Setup("shapes", lora=LORA, batch_size=1)), GIB)
    assert found.flags == CHECKPOINTING | {"resolution": "256"}


def test_only_tensors_count_when_a_run_is_refused():
    prediction = made_up(Setup("x", lora=LORA, batch_size=2))  # 6 GiB of tensors, 7.2 with the estimates
    assert refusal(prediction, 6 * GIB) is None
    assert (
        refusal(prediction, 6 * GIB - 1)
        == "Training takes 6.0 GiB with prompts of full length, and the card has 6.0 GiB"
    )
    encoders = dataclasses.replace(prediction, encoding=Phase({"text encoders": 9 * GIB}, 0))
    assert refusal(encoders, 8 * GIB) == "Encoding takes 9.0 GiB with prompts of full length, and the card has 8.0 GiB"


def test_a_card_is_known_by_the_longest_name_in_its_own(monkeypatch):
    class Properties:
        name, total_memory = "NVIDIA A100-SXM4-80GB", 123

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    assert found_card() == Card("NVIDIA A100-SXM4-80GB", 123, cards.CARDS["a100"].rate)
    Properties.name = "Another"
    assert found_card() == Card("Another", 123, None)
