"""A general loader of image classifiers: one output, or the probability of a label; what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, ViTConfig, ViTForImageClassification, ViTImageProcessor

from tgol_trainer.rewards import load_reward, score_images

IMAGES = [Image.new("RGB", (20, 12), (level, 40, 90)) for level in (0, 100, 250)]


def saved(folder, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, **config)).eval()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return model


def outputs(model):
    """By hand: bilinear to 8x8, to -1..1, one image at a time."""
    found = []
    for image in IMAGES:
        pixels = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
        with torch.no_grad():
            found.append(model(pixel_values=torch.tensor(pixels).permute(2, 0, 1)[None]).logits[0].double())
    return torch.stack(found)


def test_the_one_output_of_a_regression_head_is_the_score_whatever_the_batch(tmp_path):
    model = saved(tmp_path, num_labels=1)
    reward = load_reward("regression", source=str(tmp_path))
    scores = score_images(reward, IMAGES, ["a", "b", "c"], batch_size=2)
    assert scores == pytest.approx(outputs(model)[:, 0].tolist(), abs=1e-5)
    assert len({round(score, 6) for score in scores}) == 3
    assert reward.facts.model_id == str(tmp_path) and "prompt is not used" in reward.facts.scale


def test_of_a_classifier_the_probability_of_a_named_label_is_the_score(tmp_path):
    model = saved(tmp_path, id2label={0: "bad", 1: "good", 2: "odd"}, label2id={"bad": 0, "good": 1, "odd": 2})
    logits = outputs(model)
    expected = (logits[:, 1].exp() / logits.exp().sum(dim=1)).tolist()
    assert score_images(load_reward("regression", source=str(tmp_path), label="good"), IMAGES, ["a"] * 3) == (
        pytest.approx(expected, abs=1e-5)
    )
    for label in (None, "great"):
        with pytest.raises(ValueError, match=r"no regression head but tells 3 labels apart \(bad, good, odd\)"):
            load_reward("regression", source=str(tmp_path), label=label)


def test_what_is_no_image_classifier_lacks_weights_or_is_not_named_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`source` is needed"):
        load_reward("regression")
    saved(tmp_path / "one", num_labels=1)
    with pytest.raises(ValueError, match="has one output"):
        load_reward("regression", source=str(tmp_path / "one"), label="good")
    model = saved(tmp_path / "other", num_labels=1)
    model.vit.save_pretrained(tmp_path / "other")  # without the head
    ViTConfig(num_labels=1, **{**model.config.to_diff_dict()}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not hold the weights of this reward: 2 missing"):
        load_reward("regression", source=str(tmp_path / "other"))
    CLIPConfig().save_pretrained(tmp_path / "text")
    with pytest.raises((ValueError, OSError), match="AutoModelForImageClassification"):
        load_reward("regression", source=str(tmp_path / "text"))
