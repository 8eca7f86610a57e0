"""The embedded models: loaded by their names like any other model, with what their card says."""

import pytest
import torch

from tests.tiny import stable_diffusion
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.families.skeleton import load_skeleton
from tgol_trainer.shapes import EMBEDDED, load_masked_pipeline, load_pipeline

LOADERS = {"shapes": load_pipeline, "shapes-masked": load_masked_pipeline}
each_model = pytest.mark.parametrize("name", LOADERS)


@each_model
def test_a_name_loads_the_embedded_model_and_its_card_says_how(name):
    settings = FamilySettings(guidance=3.5)
    family, loader = load_family(name, settings=settings), LOADERS[name]
    assert torch.equal(family.probe(), load_family(loader()).probe())
    assert family.settings is settings
    assert family.origin.hub_id is None and "embedded in tgol_trainer" in family.origin.note
    assert family.usage("me/dark", "a red circle").startswith(f"from tgol_trainer.shapes import {loader.__name__}\n")
    arguments = {"shapes": ", num_inference_steps=15, guidance_scale=1.5"}
    assert family.call_text == arguments.get(name, ", num_inference_steps=12, guidance_scale=2.0")


@each_model
def test_a_dtype_applies_and_other_options_are_refused(name):
    pipeline = load_family(name, {"dtype": "bfloat16"}).pipeline
    assert {part.dtype for part in pipeline.components.values() if hasattr(part, "dtype")} == {torch.bfloat16}
    with pytest.raises(ValueError, match=f"revision, variant: the embedded {name} model is loaded one way only"):
        load_family(name, {"revision": "v2", "dtype": "float32", "variant": "fp16"})


@each_model
def test_the_skeleton_of_an_embedded_model_has_its_sizes(name):
    skeleton, family = load_skeleton(name), load_family(name)
    assert (skeleton.native_size, skeleton.resolution_multiple) == (family.native_size, family.resolution_multiple)
    assert next(skeleton.denoiser.parameters()).is_meta


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stable_diffusion().save_pretrained("shapes")
    family = load_family("shapes")
    assert family.native_size == load_skeleton("shapes").native_size == (16, 16)
    assert family.origin.note != EMBEDDED["shapes"].note
