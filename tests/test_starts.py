"""The look at the base model before the first step."""

import pytest
import torch
from datasets import Dataset

from tgol_trainer import TGOLTrainer
from tgol_trainer.shapes import PROMPTS, load_pipeline


@pytest.fixture(scope="module")
def drawn():
    """Eight images of the shapes model itself."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(PROMPTS[:8])
    images = pipeline(prompts, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images
    return Dataset.from_dict({"prompt": prompts, "image": images, "score": [float(i) for i in range(8)]})


def trainer_of(config, drawn, prediction_type, **overrides):
    pipeline = load_pipeline()
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    return TGOLTrainer(pipeline, config(max_steps=1, **overrides), drawn)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_model_that_predicts_noise_is_not_trained_as_if_it_predicted_something_else(config, drawn, prediction_type):
    trainer = trainer_of(config, drawn, prediction_type)
    with pytest.raises(
        ValueError, match=rf"configuration says, {prediction_type}: .* Taken to predict epsilon, it is 0\.[01]"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer_of(config, drawn, prediction_type, allow_bad_base=True).train()


def test_a_model_that_predicts_what_it_says_is_trained(config, drawn):
    trainer = trainer_of(config, drawn, "epsilon")
    trainer.train()
    assert trainer.state.global_step == 1
