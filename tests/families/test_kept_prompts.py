"""Prompts that are sampled again: images are the same to the bit, and the text encoders run and come only once."""

from contextlib import contextmanager

import pytest
import torch

from tests.helpers import over
from tests.pipelines import TINY
from tgol_trainer.evaluation import generate_images, generate_videos, makes_videos
from tgol_trainer.families import KeptPrompts, load_family

every_pipeline = over(TINY, ("sd", "flux", "wan"))


def drawn(name, pipeline, prompts):
    generate = generate_videos if makes_videos(pipeline) else generate_images
    options = {"num_inference_steps": 2, "batch_size": 2, "progress": False, **TINY[name].call}
    made = generate(pipeline, prompts, [3, 4], **options)
    return [image.tobytes() for each in made for image in (each if isinstance(each, list) else [each])]


def text_encoders(family):
    return {name for name in family.pipeline.components if name.startswith("text_encoder")} & {
        *family.text_encoder_names
    }


@contextmanager
def watched(family, brought, run):
    """Record which components are brought to the device, and which text encoders run."""
    present = family.present
    family.present = lambda *names, **options: (brought.extend(names), present(*names, **options))[1]
    encoders = {name: getattr(family.pipeline, name) for name in text_encoders(family)}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: run.add(name))
        for name, encoder in encoders.items()
        for module in encoder.modules()
    ]
    yield
    del family.present
    for hook in hooks:
        hook.remove()


@every_pipeline
def test_images_are_the_same_bit_for_bit_and_text_encoders_are_neither_brought_nor_run_again(name):
    family = load_family(TINY[name].build())
    # aMUSEd and Meissonic encode prompts inside their call, so nothing can be kept.
    keeps = name not in ("amused", "meissonic")
    with family.whole() as pipeline:
        expected, others = drawn(name, pipeline, ["a cat", ""]), drawn(name, pipeline, ["a dog", "two cats"])
    assert expected != others
    kept = KeptPrompts(family, alone=True)
    for prompts, images, again in (
        (["a cat", ""], expected, False),
        (["a cat", ""], expected, True),
        (["a dog", "two cats"], others, False),
        (["a cat", ""], expected, True),
    ):
        brought, run = [], set()
        with watched(family, brought, run), kept.pipeline() as pipeline:
            assert drawn(name, pipeline, prompts) == images
        assert bool(run) == (not again or not keeps)
        assert (text_encoders(family) <= set(brought)) == bool(run)
        assert "vae" in brought or "vqvae" in brought
    assert "encode_prompt" not in vars(family.pipeline)


def test_a_call_that_fails_leaves_the_pipeline_its_own_encoding():
    family = load_family(TINY["sd"].build())
    with pytest.raises(ZeroDivisionError), KeptPrompts(family, alone=True).pipeline():
        raise ZeroDivisionError
    assert "encode_prompt" not in vars(family.pipeline)


def test_other_arguments_of_a_call_are_another_question():
    family = load_family(TINY["sd"].build())
    kept = KeptPrompts(family, alone=False)
    with torch.no_grad(), kept.pipeline() as pipeline:
        (first, nothing), (_, negative) = (
            pipeline.encode_prompt("a cat", "cpu", 1, guided) for guided in (False, True)
        )
    assert nothing is None and negative.shape == first.shape
