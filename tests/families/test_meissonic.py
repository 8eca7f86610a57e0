"""Meissonic's own matters: the authors' repository, look-alikes of its names; and the cards of both families."""

import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers import Transformer2DModel as DiffusersTransformer
from PIL import Image

from tests.meissonic_standin import as_published
from tests.tiny import amused, meissonic, stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.families import ModelOrigin, load_family, load_meissonic, wrap_pipeline


def logged(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_attention_gets_the_head_dim_that_newer_diffusers_read_and_keeps_one_it_has():
    pipe = meissonic()
    attention = pipe.transformer.blocks[0].attn
    assert not hasattr(attention, "head_dim")
    pipe.transformer.blocks[1].attn.head_dim = 16
    load_family(pipe)
    assert attention.head_dim == 16


def test_a_folder_is_loaded_with_the_code_of_the_repository_after_the_opt_in(repository, config, dataset, tmp_path):
    base = as_published(meissonic(), tmp_path / "base")
    options = {"meissonic_repository": str(repository), "trust_remote_code": True}
    path = list(sys.path)
    trainer = TGOLTrainer(str(base), config(max_steps=2, model_init_kwargs=options), dataset)
    assert type(trainer.family.pipeline).__module__ == "src.transformer"
    assert sys.path == path
    reference = TGOLTrainer(meissonic(), config(max_steps=2), dataset)
    trainer.train()
    reference.train()
    assert logged(trainer) == logged(reference)
    half = load_meissonic(base, meissonic_repository=repository, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == half.vqvae.dtype == torch.bfloat16
    assert load_family(half).probe().dtype == torch.bfloat16
    mixed = {"default": "bfloat16", "vqvae": "float32"}
    pipe = load_family(str(base), {**options, "dtype": mixed}).pipeline
    assert (pipe.transformer.dtype, pipe.vqvae.dtype) == (torch.bfloat16, torch.float32)


def test_no_code_of_the_repository_runs_without_the_opt_in(repository, tmp_path):
    (repository / "src" / "transformer.py").write_text("raise SystemExit('ran')")
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": "yes"}):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load_family(tmp_path, {"meissonic_repository": str(repository), **trust})


def test_without_the_repository_the_way_to_load_meissonic_is_named(repository, tmp_path):
    with pytest.raises(ValueError, match=r"meissonic_repository.*trust_remote_code.*docs/meissonic\.md"):
        load_family(as_published(meissonic(), tmp_path / "base"))


def test_a_folder_that_is_no_clone_names_the_files_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"holds no src/transformer\.py.*git clone"):
        load_meissonic(tmp_path, meissonic_repository=tmp_path, trust_remote_code=True)


def test_an_option_that_would_be_dropped_is_refused(repository, tmp_path):
    with pytest.raises(ValueError, match="does not know device_map"):
        load_meissonic(tmp_path, meissonic_repository=repository, trust_remote_code=True, device_map="auto")


def test_another_package_called_src_is_not_replaced(repository, tmp_path, monkeypatch):
    other = type(sys)("src")
    monkeypatch.setitem(sys.modules, "src", other)
    with pytest.raises(ValueError, match="Another package called `src`"):
        load_meissonic(tmp_path, meissonic_repository=repository, trust_remote_code=True)
    assert sys.modules["src"] is other


@pytest.mark.parametrize("init", [False, True], ids=["without __init__", "with __init__"])
def test_a_src_elsewhere_on_the_path_does_not_win_and_a_failed_import_leaves_nothing(
    repository, tmp_path, monkeypatch, init
):
    elsewhere = tmp_path / "elsewhere" / "src"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(elsewhere.parent)
    if init:
        (repository / "src" / "__init__.py").write_text("")
    base, good = as_published(meissonic(), tmp_path / "base"), (repository / "src" / "pipeline.py").read_text()
    (repository / "src" / "pipeline.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_meissonic(base, meissonic_repository=repository, trust_remote_code=True)
    assert not [name for name in sys.modules if name == "src" or name.startswith("src.")]
    (repository / "src" / "pipeline.py").write_text(good)
    pipe = load_meissonic(base, meissonic_repository=repository, trust_remote_code=True)
    again = load_meissonic(base, meissonic_repository=repository, trust_remote_code=True)
    assert type(pipe) is type(again)


def look_alike(**changes):
    """Another pipeline of the same name, with Meissonic's parts but for those given; `None` leaves one out."""
    parts = {name: part for name, part in {**meissonic().components, **changes}.items() if part is not None}

    class Pipeline(DiffusionPipeline):
        def __init__(self):
            super().__init__()
            self.register_modules(**parts)

        @property
        def components(self):
            return parts

    return Pipeline()


def other_transformer():
    return DiffusersTransformer(
        num_attention_heads=2, attention_head_dim=8, in_channels=32, num_layers=1, norm_num_groups=8
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda: {"transformer": other_transformer()},
            r"Transformer2DModel; its transformer does not take img_ids.*config lacks codebook_size",
        ),
        (lambda: {"transformer": amused().transformer}, "uvit_2d.UVit2DModel"),
        (lambda: {"scheduler": stable_diffusion().scheduler}, "no mask_token_id"),
        (lambda: {"vqvae": None}, "no component vqvae"),
    ],
    ids=["transformer of diffusers", "aMUSEd's", "scheduler", "component"],
)
def test_other_pipelines_called_pipeline_are_refused_with_what_differs(changes, message):
    with pytest.raises(ValueError, match=rf"test_meissonic\.Pipeline is not supported.*Meissonic.*{message}"):
        load_family(look_alike(**changes()))


@pytest.mark.parametrize("build", [amused, meissonic])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_the_snippet_of_the_card_runs_as_written(build, full, config, dataset, tmp_path, monkeypatch, repository):
    """Only the places it names are exchanged: Hub id, clone, and the folder it is run in."""
    base = as_published(meissonic(), tmp_path / "base") if build is meissonic else tmp_path / "base"
    if build is amused:
        amused().save_pretrained(base)
    trainer = TGOLTrainer(build(), config(max_steps=2, full_finetuning=full, learning_rate=1e-2), dataset)
    trainer.family.origin = ModelOrigin(hub_id="owner/base")
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    card = (tmp_path / "run" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "owner/base" in snippet
    assert ("load_lora_adapter" in snippet) != full
    monkeypatch.chdir(tmp_path / "run")
    scope = {}
    exec(snippet.replace("owner/base", str(base)).replace("path/to/Meissonic", str(repository)), scope)
    assert isinstance(Image.open("sample.png"), Image.Image)
    probe = wrap_pipeline(scope["pipe"]).probe()
    torch.testing.assert_close(probe, trainer.family.probe(), rtol=0, atol=1e-5)
    assert not torch.allclose(probe, load_family(build()).probe(), rtol=0, atol=1e-3)
