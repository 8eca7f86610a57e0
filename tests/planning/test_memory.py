"""What is predicted without weights is what PyTorch holds in a real run, for tiny twins of every family."""

import dataclasses
import weakref

import pytest
import torch
from peft import LoraConfig

from tests.helpers import quick
from tests.pipelines import TINY
from tests.sizes import COUNTS, SIZES, write
from tgol_trainer import TGOLTrainer
from tgol_trainer.families import FamilySettings, wrap_pipeline
from tgol_trainer.families.skeleton import load_skeleton
from tgol_trainer.likelihoods import RowGenerators
from tgol_trainer.planning import Card, Phase, Quantization, Setup, memory, predict
from tgol_trainer.planning.memory import CONTEXT, SLACK, predict_family
from tgol_trainer.planning.networks import networks, prepare, weight_bytes
from tgol_trainer.planning.quantized import QuantizedLinear, quantize
from tgol_trainer.planning.tracing import LiveBytes

FAMILIES = [name for name in TINY if name not in ("sd v", "flux without guidance")]
KINDS = ("LoRA", "LoRA, checkpointing", "all weights", "bfloat16", "offload", "8 bits")
CASES = [(name, kind) for name in FAMILIES for kind in KINDS]
# These pad each prompt to the limit, and their text encoder makes a mask, which a plan has, for a short one alone.
MASKED = ("ltx-2", "hunyuan video 1.5")
LORA = LoraConfig(r=16, lora_alpha=16)


def long(name):
    """The end of a prompt as long as those that are planned. Ideogram 4's pipeline refuses 1200 words of the twin."""
    return " and so on" * (150 if name == "ideogram-4" else 400)


def settings_of(name):
    return FamilySettings(num_frames=TINY[name].settings.get("num_frames"))


def skeleton(setup, folder):
    """The family as the planner has it. Meissonic's classes are not in diffusers: its weights are taken away."""
    name = setup.model
    facts = TINY[name]
    settings = settings_of(name)
    if name == "meissonic":
        family = wrap_pipeline(facts.build(), settings=settings)
        for network in networks(family).values():
            network.to("meta")
    else:
        pipeline = facts.build()
        pipeline.save_pretrained(folder)
        family = load_skeleton(folder, settings=settings)
        # Not in files: the length of a template in a twin's few words.
        vars(family.pipeline).update({key: value for key, value in vars(pipeline).items() if isinstance(value, int)})
    prepare(family, setup)
    return family


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Predict for a tiny pipeline once; keywords change the setup."""
    known = {}

    def predict_once(name="sd", **changes):
        key = (name, str(changes))
        if key not in known:
            setup = Setup(**{"model": name, "lora": LORA, "batch_size": 2, **changes})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(memory, "WORDS", len(long(name).split()))
                known[key] = predict_family(skeleton(setup, tmp_path_factory.mktemp("base")), setup)
        return known[key]

    return predict_once


def traced_run(trainer):
    """Train one step and count: (live bytes, with those of the batch, gradients, optimizer states)."""
    found = {}
    step = trainer.training_step

    def counted(model, inputs, *args):
        with LiveBytes() as live:
            result = step(model, inputs, *args)
        # Qwen-Image makes nothing of what its last block makes of the text.
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        live.peak += sum(value.nbytes for value in inputs.values())
        found.update(live=live, gradients=sum(each.nbytes for each in gradients))
        return result

    trainer.training_step = counted
    trainer.train()
    states = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
    return found["live"], found["gradients"], sum(value.nbytes for value in states if value.numel() > 1)


def pixels_of(family, size):
    return torch.zeros(2, 3, *([family.num_frames] if family.num_frames else []), *size)


def saved_for_backward(name, family, size):
    """
    Bytes of the storages that autograd keeps of a pass, by its own hooks; neither weights nor the batch.

    Of those alive after it: where nothing takes a result, such as the text of CogView4's last block, its graph goes.
    """
    pixels = pixels_of(family, size)
    geometry = torch.zeros(2, 4, dtype=torch.int64)
    conditioning = family.condition([f"prompt {number}{long(name)}" for number in (0, 1)], geometry, size)
    rows = RowGenerators(0, 0, [0, 1])
    draw = family.likelihood.draw(family.encode_images(pixels, rows, sample=True), rows)
    conditions = [each for value in conditioning.values() for each in (value if isinstance(value, list) else [value])]
    given = [*family.denoiser.parameters(), *conditions, draw.inputs, draw.timesteps, draw.target]
    given += [*family.denoiser.buffers()]
    tables = [value for module in family.denoiser.modules() for value in vars(module).values()]
    given += [each for each in tables if isinstance(each, torch.Tensor)]  # Qwen-Image's positions
    known, kept = {each.untyped_storage()._cdata for each in given}, weakref.WeakSet()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept.add(storage)
        return tensor.detach()  # a result that keeps itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        error = family.likelihood.error(family.predict(family.denoiser, draw, conditioning), draw)
    assert error.requires_grad
    return sum(storage.nbytes() for storage in kept)


@pytest.mark.parametrize(
    ("name", "kind"),
    quick(
        CASES,
        ("sd", "LoRA"),
        ("flux", "LoRA, checkpointing"),
        ("amused", "LoRA"),
        ("wan", "all weights"),
        ("flux", "offload"),
        ("sd", "8 bits"),
    ),
)
def test_weights_gradients_optimizer_and_the_peak_of_a_step_are_those_of_a_real_run(
    name, kind, config, predicted, tmp_path
):
    facts, full, half = TINY[name], kind == "all weights", kind == "bfloat16"
    options = {"activation_checkpointing": "checkpointing" in kind, "full_finetuning": full, "bf16": half}
    options |= {"cache": kind == "LoRA", "cache_dir": str(tmp_path) if kind == "LoRA" else None}
    stored = {"offload": {"group_offload": True}, "8 bits": {"storage_dtype": "float8_e4m3fn"}}.get(kind, {})
    options |= {**stored, "activation_checkpointing": None} if stored else {}
    args = config(max_steps=2 if stored else 1, per_device_train_batch_size=2, **options, **facts.settings)
    # Longer than any limit: the plan is for the longest prompts.
    rows = facts.dataset()
    if name in MASKED:
        rows = rows.select(range(2))
    ends = [long(name), "" if name in MASKED else long(name)]
    rows = rows.map(lambda row, index: {"prompt": f'"prompt {index}{ends[index % 2]}"'}, with_indices=True)
    trainer = TGOLTrainer(facts.build(), args, rows)
    live, gradients, states = traced_run(trainer)

    changes = {"lora": None} if full else {}
    changes |= {"checkpointing": True} if options["activation_checkpointing"] else {}
    changes |= {"autocast": torch.bfloat16} if half else {}
    changes |= {**stored, "checkpointing": True} if stored else {}
    size = trainer.collator.resolution
    prediction = predicted(name, resolution=size, cache=options["cache"], **changes)
    step, denoiser = prediction.step, weight_bytes(trainer.family.denoiser)
    if name != "meissonic":  # taking weights away unties those that are tied
        sizes = {part: weight_bytes(network) for part, network in networks(trainer.family).items()}
        whole = sum(sizes.values()) + states + (denoiser if full else 0)
        whole -= trainer.family.blocks.bytes_saved if stored else 0
        texts = sum(size for part, size in sizes.items() if part.startswith("text_encoder"))
        keeps = options["cache"] and name != "amused"  # prompts first, then everything else
        assert sum(prediction.sampling.resident.values()) in ((texts, whole - texts) if keeps else (whole,))
    assert prediction.training.resident["optimizer"] == states
    assert step.gradients == gradients
    assert max(step.peak, step.prompts, step.images) == pytest.approx(live.peak, rel=0.05)
    if kind in ("LoRA", "all weights"):
        assert step.activations == pytest.approx(saved_for_backward(name, trainer.family, size), rel=0.01)
    # The reference's pass counts with the LoRA, a large part of so small a network.
    assert live.flops * 0.95 < step.flops < live.flops * 1.25


def test_blocks_in_8_bits_of_a_network_in_bfloat16_save_a_byte_a_value(tmp_path):
    TINY["sd3"].build().save_pretrained(tmp_path)  # whose table of positions is a view of float32
    setup = Setup(model=str(tmp_path), lora=LORA, batch_size=1, dtype="bfloat16", sampling_batch=0)
    plain, stored = (predict(dataclasses.replace(setup, storage_dtype=kind)) for kind in (None, "float8_e4m3fn"))
    saved = plain.training.resident["denoiser"] - stored.training.resident["denoiser"]
    layers = TINY["sd3"].build().transformer.transformer_blocks.named_modules()
    layers = [layer for name, layer in layers if isinstance(layer, torch.nn.Linear) and "norm" not in name]
    assert saved == sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("name", quick(FAMILIES, "qwen-image", "ltx-2"))
def test_encoding_prompts_holds_the_most_that_long_ones_hold_and_a_short_one_among_them(name, predicted):
    """Of Qwen-Image the long ones hold more, of LTX-2 the short one, which is padded and so has a mask."""
    family, size = wrap_pipeline(TINY[name].build(), settings=settings_of(name)), TINY[name].pixels[-2:]
    pixels, peaks = pixels_of(family, size), []
    for last in (f'"another{long(name)}"', '"a cat"'):
        with LiveBytes() as live:
            family.condition([f'"one{long(name)}"', last], torch.zeros(2, 4, dtype=torch.int64), size)
        peaks.append(live.peak + pixels.nbytes)
    assert predicted(name, resolution=size, cache=False).step.prompts == pytest.approx(max(peaks), rel=0.001)


@pytest.mark.parametrize("name", quick(["sd", "sdxl", "sd3", "flux", "wan"], "flux"))
def test_sampling_holds_what_a_real_call_of_the_pipeline_holds(name, predicted):
    facts = TINY[name]
    pipe, size = facts.build(), facts.pixels[-2:]
    pipe.set_progress_bar_config(disable=True)
    with LiveBytes() as live:
        pipe(["a cat", "a dog"], num_inference_steps=2, output_type="pt", **{"height": 16, "width": 16} | facts.call)
    prediction = predicted(name, resolution=size, sampling_batch=2)
    assert prediction.sampling.working == pytest.approx(live.peak, rel=0.1)


def test_without_a_cache_encoders_come_to_the_device_and_a_cache_has_the_size_of_what_is_encoded(predicted):
    """Latents (4, 8, 8) as mean and deviation, 77 tokens of 32 numbers, float32."""
    cached, every_step = predicted(), predicted(cache=False)
    assert (cached.bytes_per_image, cached.bytes_per_prompt) == (2 * 4 * 8 * 8 * 4, 77 * 32 * 4)
    assert set(cached.training.resident) == {"denoiser", "adapter", "optimizer"}
    assert set(cached.encoding.resident) in ({"text encoders"}, {"autoencoder"})
    assert every_step.encoding is None
    assert (cached.step.prompts, cached.step.images) == (0, 0)
    assert 0 < every_step.step.images < every_step.step.peak
    assert every_step.step.flops > cached.step.flops


def test_without_a_cache_the_encoders_stay_and_the_larger_of_encoding_and_stepping_comes_and_goes(predicted):
    """The tiny T5 holds more for 512 characters than the tiny Wan for two frames of latents."""
    size = {"resolution": (16, 32), "lora": None}
    cached, every_step = predicted("wan", **size), predicted("wan", cache=False, **size)
    assert set(cached.training.resident) == {"denoiser", "reference", "optimizer"}
    assert set(every_step.training.resident) == {*cached.training.resident, "text encoders", "autoencoder"}
    assert every_step.training.working == every_step.step.prompts
    assert cached.encoding.resident["reference"] == cached.training.resident["reference"]  # a frozen copy stays


def test_accumulation_adds_gradients_that_are_there_already_and_a_reference_adapter_its_weights(predicted):
    once, twice = predicted(), predicted(accumulation=2, reference_adapter=True, reference_pass=False)
    # Without the reference one forward pass less, of two and a backward pass.
    assert 0.6 < twice.step.flops / once.step.flops < 0.75
    assert once.step.peak < twice.step.peak <= once.step.peak + once.step.gradients
    assert twice.training.resident["reference"] == twice.training.resident["adapter"]


def test_estimates_are_kept_apart_from_tensors():
    phase = Phase({"denoiser": 5000, "optimizer": 3000}, working=1000)
    assert phase.tensors == 9000
    assert phase.total == 9000 + CONTEXT + SLACK * 1000


@pytest.mark.slow
@pytest.mark.skipif("kolors" not in TINY, reason="sentencepiece is not installed")
def test_a_text_encoder_that_is_made_on_the_cpu_unless_it_is_told_otherwise_is_planned_without_memory(tmp_path):
    family = skeleton(Setup("kolors", lora=LORA), tmp_path)
    assert all(each.is_meta for network in networks(family).values() for each in network.parameters())


def test_a_size_that_training_would_refuse_is_refused():
    with pytest.raises(ValueError, match="`resolution` 33x32 is not a multiple of 4"):
        predict(Setup("shapes", lora=LORA, resolution=(33, 32)))


@pytest.mark.parametrize("name", quick(list(SIZES), "flux"))
def test_a_model_of_the_published_size_is_planned_from_its_configs(name, tmp_path):
    """Every weight of COUNTS in bfloat16; and a pass that keeps at least its input of every block."""
    family = load_skeleton(write(name, tmp_path), dtype="bfloat16", settings=FamilySettings())
    found = {part: sum(each.numel() for each in network.parameters()) for part, network in networks(family).items()}
    assert found | COUNTS.get(name, {}) == found
    assert weight_bytes(networks(family)["text_encoder"]) == pytest.approx(2 * found["text_encoder"], rel=1e-3)


# ---- dtypes and quantisation ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", {"default": "bfloat16", "vae": "float32"}], ids=str)
def test_weights_without_memory_have_the_dtypes_of_those_that_are_loaded(dtype, tmp_path):
    """Wan keeps some of its transformer in float32, T5 its second feed-forward layer in float16 runs."""
    from tgol_trainer.families import load_family

    TINY["wan"].build().save_pretrained(tmp_path)
    loaded, planned = load_family(tmp_path, {"dtype": dtype}), load_skeleton(tmp_path, dtype=dtype)
    for part, network in networks(loaded).items():
        real = {name: each.dtype for name, each in network.named_parameters()}
        assert {name: each.dtype for name, each in networks(planned)[part].named_parameters()} == real, part


def test_a_dtype_that_only_the_weights_know_is_refused():
    with pytest.raises(ValueError, match="`dtype` is 'auto', which only the weights know: name one"):
        predict(Setup("shapes", lora=LORA, dtype="auto"))


@pytest.mark.parametrize(("bits", "double"), [(4, False), (4, True), (8, False)])
def test_a_quantised_layer_has_the_bytes_of_bitsandbytes(bits, double):
    bnb = pytest.importorskip("bitsandbytes")
    layer = torch.nn.Linear(300, 70, bias=True, device="meta")
    planned = weight_bytes(QuantizedLinear(layer, Quantization(bits, double)))
    if bits == 8:
        real = bnb.nn.Linear8bitLt(300, 70, has_fp16_weights=False)
        real.weight = bnb.nn.Int8Params(torch.randn(70, 300), has_fp16_weights=False, requires_grad=False).to("cpu")
        tensors = [real.weight, real.weight.SCB, real.bias]
    else:
        real = bnb.nn.Linear4bit(300, 70, compress_statistics=double, quant_type="nf4").to("cpu")
        state = real.weight.quant_state
        tensors = [real.weight, real.bias, state.absmax, state.code]
        tensors += [state.offset, state.state2.absmax, state.state2.code] if double else []
    assert planned == sum(each.numel() * each.element_size() for each in tensors)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_the_layers_that_are_quantised_are_those_that_diffusers_quantises(name):
    bnb = pytest.importorskip("bitsandbytes")
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    ours, theirs = (TINY[name].build().transformer.to("meta") for _ in range(2))
    quantize(ours, Quantization(4))
    kept = list(theirs._keep_in_fp32_modules or [])
    replace_with_bnb_linear(theirs, kept, quantization_config=BitsAndBytesConfig(load_in_4bit=True))

    def names(model, kind):
        return {name for name, module in model.named_modules() if isinstance(module, kind)}

    assert names(ours, QuantizedLinear) == names(theirs, bnb.nn.Linear4bit) != set()


@pytest.mark.parametrize("bits", quick([4, 8], 4))
def test_quantisation_shrinks_the_denoiser_which_then_stays_on_the_device(bits, predicted):
    before, after = predicted(), predicted(quantization=Quantization(bits, compute_dtype=torch.bfloat16))
    assert after.training.resident["denoiser"] < before.training.resident["denoiser"]
    assert after.step.gradients == before.step.gradients
    assert after.encoding.resident["denoiser"] == after.training.resident["denoiser"]


def test_quantising_what_is_trained_is_refused():
    for lora in (None, LoraConfig(use_dora=True)):
        with pytest.raises(ValueError, match="A quantised denoiser is not planned for"):
            predict(Setup("shapes", lora=lora, quantization=Quantization(4)))


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_optimizers_of_8_bits_keep_what_bitsandbytes_keeps(name):
    bnb = pytest.importorskip("bitsandbytes")
    from tgol_trainer.planning.memory import optimizer_bytes

    network = torch.nn.ParameterList([torch.zeros(100), torch.zeros(70, 100)])
    kind = {"adamw_8bit": bnb.optim.AdamW8bit, "lion_8bit": bnb.optim.Lion8bit}[name]
    optimizer = kind(network.parameters())
    for each in network:
        each.grad = torch.ones_like(each)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key]
    real = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert optimizer_bytes(network, name) == real
    with pytest.raises(ValueError, match="`optim` is 'lomo', whose memory is not known here"):
        optimizer_bytes(network, "lomo")


# ---- Time ----


def test_seconds_are_the_operations_at_a_fifth_to_three_fifths_of_the_published_rate(predicted):
    known = predicted()

    def seconds(card, **changes):
        setup = dataclasses.replace(known.setup, **{"accumulation": 3, "dtype": "bfloat16", **changes})
        return dataclasses.replace(known, setup=setup).update_seconds(card)

    operations, card = 3 * known.step.flops, Card("x", 1, 1e9)
    assert seconds(card) == pytest.approx((operations / 6e8, operations / 2e8))
    assert (
        seconds(card, dtype="float32") is seconds(card, quantization=Quantization(4)) is seconds(Card("x", 1)) is None
    )
