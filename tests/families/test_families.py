"""Every family, each claim once: likelihoods, latents, training, saving for diffusers, resuming, dtypes."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.conftest import SMALL
from tests.helpers import over, step_without_waiting
from tests.pipelines import GEOMETRY, KEYS, PROMPTS, SLOW, TINY, VARIANTS
from tgol_trainer import TGOLConfig, TGOLTrainer, adapters
from tgol_trainer.families import FAMILIES, load_family
from tgol_trainer.families.prompts import seen_part, words_of
from tgol_trainer.likelihoods import RowGenerators, log_likelihood
from tgol_trainer.metrics import RECORD

LORA = LoraConfig(r=4, lora_alpha=12)


REPRESENTATIVES = ("sd", "flux", "wan", "amused")
"""One for each likelihood and for what differs in training: ε of a UNet, packed latents, videos, masked tokens."""


PIPELINES = (
    *("sd", "sdxl", "sd3.5", "flux", "z-image", "flux.2", "flux.2 klein", "qwen-image", "qwen-image 2.1"),
    *("wan", "wan 2.2 a14b", "wan 2.2 5b", "skyreels v2", "hunyuan video"),
    *("ltx", "ltx condition", "ltx-2", "krea-2", "ernie-image", "sana", "lumina-2", "auraflow", "chroma"),
    *("cogview4", "cogvideox", "mochi", "sana-video", "kandinsky-5", "kandinsky-5 video"),
    *("hidream", "fibo", "ideogram-4", "hunyuan video 1.5"),
    *("amused", "meissonic"),
    *(["kolors"] if "kolors" in TINY else []),
)
"""One for each class: the others of `TINY` are loaded and saved by the same code."""
ROW_BY_ROW = ("qwen-image 2.1", "cogview4", "kandinsky-5", "kandinsky-5 video")
"""Their transformers take one row at a time."""
# What a family's own code decides runs on every family; what all share, on the representatives unless `-m slow`.
every_family, every_variant = (over(names, [name for name in names if name not in SLOW]) for names in (TINY, VARIANTS))
FORMULAS = [name for name, facts in VARIANTS.items() if facts.error is not None]
quick_pipelines = [name for name in PIPELINES if name not in SLOW]
every_pipeline, shared_code = over(TINY, quick_pipelines), over(TINY, REPRESENTATIVES)
WAITING = ("lumina-2", "chroma", "mochi", "hidream", "hunyuan video 1.5")
"""Their transformers themselves read lengths of prompts back, or copy a constant to the device, at each pass."""


def test_every_family_is_tested_here():
    for names in (TINY, PIPELINES):
        untested = set() if "kolors" in TINY else {"KolorsPipeline"}  # it needs sentencepiece
        assert {type(TINY[name].build()).__name__ for name in names} == set(FAMILIES) - untested


# ---- Likelihoods, latents, conditioning ----


def pixels_of(name):
    return torch.rand(2, *VARIANTS[name].pixels, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prediction_of(family, name, prompts=PROMPTS):
    conditioning = family.condition(prompts, GEOMETRY, VARIANTS[name].pixels[-2:])
    draw = family.likelihood.draw(family.encode_images(pixels_of(name), KEYS, sample=False), KEYS)
    with torch.no_grad():
        return family.predict(family.denoiser, draw, conditioning), draw


@over(FORMULAS, FORMULAS)
def test_the_log_likelihood_is_that_of_a_direct_computation_from_the_formula(name):
    facts = VARIANTS[name]
    family = load_family(facts.build())
    prediction, draw = prediction_of(family, name)
    ours = log_likelihood(family.likelihood, family.likelihood.error(prediction, draw), 0.001)
    with torch.no_grad():
        direct = -facts.error(family.pipeline, pixels_of(name)) / facts.temperature
    torch.testing.assert_close(ours, direct, rtol=1e-4, atol=1e-5)


@shared_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_untrained_adapter_gives_a_log_ratio_of_exactly_zero(name, dtype):
    family = load_family(TINY[name].build().to(dtype))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(family.default_target_modules))
    adapters.attach(family.denoiser, config, seed=0, probe=family.probe)
    policy, draw = prediction_of(family, name)
    with adapters.reference_policy(family.denoiser):
        reference, _ = prediction_of(family, name)
    assert policy.dtype == dtype
    error, reference_error = (family.likelihood.error(prediction, draw) for prediction in (policy, reference))
    assert error.min() > 0
    assert (error - reference_error).tolist() == [0.0, 0.0]


@every_variant
def test_latents_have_the_denoisers_shape_and_are_sampled_by_row_or_the_mode_or_the_codes(name):
    family, pixels = load_family(VARIANTS[name].build()), pixels_of(name)
    mode = family.encode_images(pixels, KEYS, sample=False)
    assert mode.shape == (2, *VARIANTS[name].latents)
    sampled = family.encode_images(pixels, KEYS, sample=True)
    alone = family.encode_images(pixels[1:], RowGenerators(0, 0, [6]), sample=True)
    assert torch.equal(sampled, mode) != (mode.is_floating_point() and VARIANTS[name].sampled)
    torch.testing.assert_close(sampled[1:], alone, rtol=1e-4, atol=1e-5)


@every_family
def test_decoding_what_was_encoded_is_the_autoencoders_own_reconstruction(name):
    facts, pixels = TINY[name], pixels_of(name)
    family = load_family(facts.build())
    with torch.no_grad():
        own = facts.reconstruct(family.pipeline, pixels)
    assert own[:, :3].shape == pixels.shape
    latents = family.encode_images(pixels, KEYS, sample=False)
    torch.testing.assert_close(family.decode_images(latents), own, rtol=1e-3, atol=1e-4)


def test_the_probe_needs_no_text_encoder_beside_the_denoiser(monkeypatch):
    """On a GPU the denoiser goes away meanwhile; T5 and FLUX together would not fit where FLUX can be trained."""
    family, calls = load_family(TINY["sd"].build()), []
    present = family.present

    def recorded(*names, alone=False):
        calls.append((names, alone))
        return present(*names, alone=alone)

    monkeypatch.setattr(family, "present", recorded)
    family.probe()
    assert calls[0] == (("text_encoder",), True)


@shared_code
def test_autocast_of_the_training_step_does_not_reach_autoencoder_and_text_encoders(name):
    """Or an autoencoder kept in float32 would compute in half precision all the same."""
    family, pixels = load_family(TINY[name].build()), pixels_of(name)

    def frozen():
        conditioning = family.condition(PROMPTS, GEOMETRY, pixels.shape[-2:])
        flat = [each for value in conditioning.values() for each in value]
        return [family.encode_images(pixels, KEYS, sample=True), *flat]

    expected = frozen()
    with torch.autocast("cpu", torch.bfloat16):
        found = frozen()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@every_variant
def test_prompts_change_the_prediction_and_each_keyword_of_the_conditioning_does(name):
    family = load_family(VARIANTS[name].build())
    both, draw = prediction_of(family, name)
    assert not torch.allclose(both, prediction_of(family, name, ["a cat", "a cat"])[0], atol=1e-6)
    conditioning = family.condition(PROMPTS, GEOMETRY, (16, 16))
    for key, value in conditioning.items():
        swapped = value[::-1] if isinstance(value, list) else value.flip(0)
        # The same for all rows of a batch, or for all prompts that quote nothing.
        if key in ("target_size", "encoder_hidden_states_2", "encoder_attention_mask_2"):
            continue
        with torch.no_grad():
            changed = family.predict(family.denoiser, draw, {**conditioning, key: swapped})
        assert not torch.allclose(both, changed, atol=1e-7), key


@every_variant
def test_sizes_and_the_length_of_prompts_come_from_the_components(name):
    """Three prompts of 32, 227 and 602 tokens of the tiny CLIP tokenizer, or 61, 301 and 801 of T5's."""
    family = load_family(VARIANTS[name].build())
    assert (family.native_size, family.resolution_multiple) == VARIANTS[name].sizes
    assert family.count_long_prompts(["a " * 30, "abc " * 75, "abc " * 200]) == VARIANTS[name].long_prompts


@every_family
def test_the_default_adapter_reaches_every_kind_of_module_it_names(name):
    family = load_family(TINY[name].build())
    names = [module for module, _ in family.denoiser.named_modules()]
    for target in family.default_target_modules:
        assert any(module == target or module.endswith(f".{target}") for module in names), target


@shared_code
def test_a_tokenizer_whose_files_are_not_there_is_refused(name, tmp_path):
    """Transformers makes an empty one of them, with which every prompt would be the same."""
    pipeline = TINY[name].build()
    tokenizers = [part for part in pipeline.components if part.startswith("tokenizer")]
    if any(words_of(part) is not part for part in pipeline.components.values()):
        pytest.skip("transformers loads no processor without files")
    assert tokenizers
    for part in tokenizers:
        whole = getattr(pipeline, part)
        pipeline.register_modules(**{part: type(whole).from_pretrained(tmp_path)})
        with pytest.raises(ValueError, match=f"`{part}` of the pipeline knows no words"):
            load_family(pipeline)
        pipeline.register_modules(**{part: whole})
    load_family(pipeline)


@shared_code
def test_weights_that_are_no_numbers_are_refused_by_component_and_name(name):
    pipeline = TINY[name].build()
    networks = {part: model for part, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    assert len(networks) >= 3
    for part, model in networks.items():
        key, weight = list(model.named_parameters())[-1]
        whole = weight.data.clone()
        for value in (torch.nan, torch.inf):
            weight.data.view(-1)[-1] = value
            with pytest.raises(ValueError, match=f"(?s)`{part}` of this .*NaN or infinite weights, in '{key}'"):
                load_family(pipeline)
        weight.data = whole
    load_family(pipeline)


WORDS = np.random.default_rng(0).choice(["red", "cat,", "(a:1.2)", "5", "über", "x" * 30, "\n"], 80_000)


@shared_code
def test_a_prompt_of_a_megabyte_is_cut_before_it_is_read_and_conditions_as_the_whole_one_does(name, monkeypatch):
    if name in ("qwen-image 2.1", "kandinsky-5", "kandinsky-5 video", "ideogram-4"):
        pytest.skip("its pipeline cuts no prompt, refuses long ones, or cuts by characters that it decodes")
    family = load_family(TINY[name].build())
    long, short = " ".join(WORDS), " ".join(WORDS[:100])
    limits = family.prompt_limits()
    assert len(long) > 400_000 and len(seen_part(long, limits)) < 64 * max(limit for _, limit in limits)
    assert seen_part(short, limits) == short and seen_part("x" * 20_000, limits) == "x" * 20_000
    assert family.count_long_prompts([long, short, "a cat"])[0] == 1 + (family.count_long_prompts([short])[0])
    size = (GEOMETRY[:1], tuple(GEOMETRY[0, :2].tolist()))
    cut = family.condition([long[:60_000]], *size)
    monkeypatch.setattr("tgol_trainer.families.base.seen_part", lambda prompt, limits: prompt)
    whole = family.condition([long[:60_000]], *size)
    assert cut.keys() == whole.keys() and all(torch.equal(cut[key][0], whole[key][0]) for key in cut)


@shared_code
def test_a_pipeline_without_a_component_is_refused_by_its_name(name):
    pipe = TINY[name].build()
    for component in set(load_family(pipe).required_components) - {"scheduler"}:
        part = getattr(pipe, component)
        setattr(pipe, component, None)
        with pytest.raises(ValueError, match=f"has no {component}, which training needs"):
            load_family(pipe)
        setattr(pipe, component, part)


# ---- Training ----


def trainer_of(name, folder, dtype=torch.float32, **overrides):
    facts = TINY[name]
    settings = {**SMALL, "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": facts.learning_rate}
    args = TGOLConfig(output_dir=str(folder), **{**settings, **facts.settings, **overrides})
    return TGOLTrainer(facts.build().to(dtype), args, facts.dataset(), peft_config=LORA)


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if "loss" in line]


def sample_of(name, pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipe(prompt="a cat", num_inference_steps=2, generator=generator, output_type="np", **TINY[name].call)
    return torch.tensor(output[0])


_TRAINED = {}


@pytest.fixture
def trained(name, tmp_path_factory):
    """Three steps, a checkpoint after the second, and what is published; once for each pipeline."""
    if name not in _TRAINED:
        folder = tmp_path_factory.mktemp("trained")
        trainer = trainer_of(name, folder / "run", save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model(str(folder / "saved"))
        _TRAINED[name] = SimpleNamespace(
            trainer=trainer, saved=folder / "saved", checkpoint=folder / "run/checkpoint-2"
        )
    return _TRAINED[name]


@every_pipeline
def test_the_first_logged_loss_is_the_mean_weight_times_ln_2(name, trained):
    """All four rows are in the batch: weights 1 + 5·|s - median| from the raw column."""
    scores = np.asarray(TINY[name].dataset()["score"])
    weights = 1 + 5 * np.abs(scores - np.median(scores))
    assert logged(trained.trainer)[0] == pytest.approx(weights.mean() * math.log(2), rel=1e-6)


@every_pipeline
def test_a_fresh_pipeline_loads_exactly_what_was_trained_and_draws_the_same(name, trained):
    """With alpha three times the rank, so a file that lost alpha would not pass."""
    fresh = load_family(TINY[name].build())
    base, before = fresh.probe(), sample_of(name, fresh.pipeline)
    TINY[name].load(fresh.pipeline, trained.saved)
    assert (fresh.probe() - trained.trainer.family.probe()).abs().max().item() == 0.0
    assert not torch.equal(fresh.probe(), base)
    after = sample_of(name, fresh.pipeline)
    torch.testing.assert_close(after, sample_of(name, trained.trainer.family.pipeline), rtol=0, atol=1e-5)
    assert not torch.allclose(after, before, rtol=0, atol=1e-5)


@shared_code
def test_stopping_and_resuming_equals_never_having_stopped(name, trained, tmp_path):
    torch.manual_seed(12345)  # whatever happened to the global generator in between
    resumed = trainer_of(name, tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(trained.checkpoint))
    assert logged(resumed) == logged(trained.trainer)
    again = resumed.model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in trained.trainer.model.state_dict().items())


@shared_code
def test_gradient_checkpointing_runs_the_layers_twice_and_changes_neither_loss_nor_gradient(name, trained, tmp_path):
    checkpointed, calls = trainer_of(name, tmp_path, activation_checkpointing=True), Counter()
    for path, module in checkpointed.model.named_modules():
        if path.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda *arguments, path=path: calls.update([path]))
    checkpointed.train()
    # Forward and again in backward, over three steps; the reference has no adapter.
    assert max(calls.values()) == 2 * 3 * (4 if name in ROW_BY_ROW else 1)
    for key in ("loss", "grad_norm"):
        assert logged(checkpointed, key) == logged(trained.trainer, key)


@shared_code
def test_eight_steps_on_one_batch_lower_the_loss_pull_positives_nearer_and_push_negatives_away(name, tmp_path):
    trainer = trainer_of(name, tmp_path)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=TINY[name].learning_rate)
    trainer.model.train()
    batch, history, record = trainer.collator([trainer.train_dataset[row] for row in range(4)]), [], None
    for _ in range(9):
        loss, record = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    last = dict(zip(RECORD, record.T, strict=True))
    change, positive = last["error"] - last["reference_error"], last["label"] > 0.5
    assert history[-1] < 0.9 * history[0]
    assert change[positive].mean() < 0 < change[~positive].mean()


@over(("sd", "sdxl", "sd3.5", "flux", "wan"), ("sd",))
def test_the_blocks_are_compiled_and_switching_the_adapter_compiles_none_again(name, trained, tmp_path):
    torch.compiler.reset()
    graphs, compiled = [], trainer_of(name, tmp_path, torch_compile_backend="eager", max_steps=5)
    counts = torch._dynamo.utils.counters
    counts.clear()
    step = compiled.training_step
    compiled.training_step = lambda *a, **k: (step(*a, **k), graphs.append(counts["stats"]["unique_graphs"]))[0]
    compiled.train()
    assert logged(compiled)[0] == pytest.approx(logged(trained.trainer)[0], rel=1e-6)
    assert graphs[0] > 0 and graphs[1:] == graphs[:1] * 4
    sample_of(name, compiled.family.pipeline)  # compiles anew
    drawn = counts["stats"]["unique_graphs"]
    torch.compiler.reset()
    with compiled.family.whole() as pipeline:
        sample_of(name, pipeline)
    assert drawn > graphs[-1] and counts["stats"]["unique_graphs"] == drawn


@over([name for name in TINY if name not in WAITING], [name for name in quick_pipelines if name not in WAITING])
def test_a_step_reads_nothing_back_from_the_device_and_copies_to_it_without_waiting(name, tmp_path, monkeypatch):
    if name in ROW_BY_ROW:
        pytest.skip("its transformer reads the places of text and image")
    assert step_without_waiting(trainer_of(name, tmp_path), monkeypatch)


@shared_code
def test_a_bfloat16_base_trains_a_float32_adapter_and_still_generates(name, tmp_path):
    trainer = trainer_of(name, tmp_path, torch.bfloat16, max_steps=2)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    kinds = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    # Kandinsky 5 keeps some frozen modules in float32.
    assert kinds - {(False, torch.float32)} == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    first, second = logged(trainer)
    assert first == pytest.approx(logged(trainer, "weights/mean")[0] * math.log(2), rel=1e-6)
    assert math.isfinite(second) and second != first
    assert torch.isfinite(sample_of(name, trainer.family.pipeline)).all()


@pytest.mark.parametrize("bf16", [True, False])
def test_a_frozen_base_on_a_gpu_is_loaded_in_half_precision_and_its_autoencoder_is_not(tmp_path, monkeypatch, bf16):
    TINY["sd"].build().save_pretrained(tmp_path)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: bf16)

    def dtypes(*arguments):
        pipeline = load_family(*arguments).pipeline
        return [getattr(pipeline, name).dtype for name in ("unet", "text_encoder", "vae")]

    half = torch.bfloat16 if bf16 else torch.float16
    gpu = torch.device("cuda")
    assert dtypes(tmp_path, {}, None, gpu) == [half, half, torch.float32]
    assert dtypes(tmp_path, {"dtype": "float32"}, None, gpu) == [torch.float32] * 3
    assert dtypes(tmp_path, {}, None, torch.device("cpu")) == [torch.float32] * 3
    assert dtypes("shapes", {}, None, gpu) == [torch.float32] * 3
