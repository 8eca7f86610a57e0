"""`tgol train`: what it says of a run before it starts."""

import pytest

from tgol_trainer import TGOLConfig
from tgol_trainer.cli import train


@pytest.mark.parametrize(
    ("num_rows", "settings", "said"),
    [
        (100, {}, "12 updates of 8 images"),
        (100, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2}, "15 updates of 16 images"),
        (100, {"num_train_epochs": 5}, None),
        (100, {"max_steps": 3}, None),  # somebody's choice
        (400, {}, None),
    ],
)
def test_a_run_of_few_updates_that_nobody_chose_is_told_how_to_be_longer(num_rows, settings, said, tmp_path, caplog):
    config = TGOLConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    train._tell_of_few_updates(num_rows, "image", config)
    assert (f"{said}, in which an adapter hardly moves. `--max_steps 200`" in caplog.text) if said else not caplog.text
