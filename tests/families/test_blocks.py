"""Blocks whose weights are swapped in while they run: the same losses, less memory, the true weights when asked."""

import copy

import pytest
import torch
from diffusers import BitsAndBytesConfig
from peft import LoraConfig
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from tests.helpers import quick
from tests.pipelines import TINY
from tests.tiny import flux, stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.adapters import base_policy
from tgol_trainer.families import StoredBlocks, load_family, wrap_pipeline
from tgol_trainer.fingerprint import component_fingerprint
from tgol_trainer.planning.tracing import LiveBytes

CPU = torch.device("cpu")


def trained(name, config, folder, pipeline=None, **options):
    facts = TINY[name]
    options = {
        "activation_checkpointing": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": facts.learning_rate,
        **options,
    }
    args = config(output_dir=str(folder), **{**options, **facts.settings})
    trainer = TGOLTrainer(pipeline or facts.build(), args, facts.dataset())
    trainer.train()
    return trainer


def logged(trainer):
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def cast_by_diffusers(denoiser):
    """Names of the weights of blocks that diffusers' layerwise casting keeps in 8 bits."""
    twin = copy.deepcopy(denoiser)
    twin.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return [name for name, each in twin.named_parameters() if each.dtype == torch.float8_e4m3fn and each.dim() > 1]


@pytest.mark.parametrize("name", quick(list(TINY), "sd", "flux"))
def test_training_with_offloaded_blocks_is_the_same_to_the_bit(name, config, tmp_path):
    plain = trained(name, config, tmp_path / "plain")
    stored = trained(name, config, tmp_path / "stored", group_offload=True, activation_checkpointing=None)
    assert logged(stored) == logged(plain)
    assert stored.model.is_gradient_checkpointing or name in ("amused", "meissonic")  # these have switches of ours
    weights, there = plain.model.state_dict(), stored.model.state_dict()
    assert weights.keys() == there.keys()
    assert all(torch.equal(value, there[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", quick(list(TINY), "flux"))
def test_training_on_stored_8_bits_is_training_on_a_model_that_was_rounded_before(name, config, tmp_path):
    rounded = TINY[name].build()
    denoiser = load_family(rounded).denoiser
    inside = [each for block in StoredBlocks(copy.deepcopy(denoiser), CPU, True).weights for each in block]
    cast = cast_by_diffusers(denoiser)
    for key, parameter in denoiser.named_parameters():
        if key in cast and any(torch.equal(parameter, each.kept) for each in inside):
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    plain = trained(name, config, tmp_path / "plain", rounded)
    stored = trained(name, config, tmp_path / "stored", storage_dtype="float8_e4m3fn", group_offload=name == "flux")
    assert logged(stored) == logged(plain)
    kept = [each.kept.dtype for block in stored.family.blocks.weights for each in block]
    assert kept.count(torch.float8_e4m3fn) >= 4


def deep(blocks):
    """A tiny FLUX of many double blocks."""
    pipe = flux()
    config = {**pipe.transformer.config, "num_layers": blocks, "num_single_layers": 0}
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer).from_config(config)
    return wrap_pipeline(pipe)


def test_beside_activations_two_blocks_are_there_forward_and_backward_however_many_there_are():
    """The one that runs and the one that comes next, which the second step knows."""
    for number in (3, 9):
        peaks = {}
        for stored in (False, True):
            family = deep(number)
            if stored:
                family.blocks = StoredBlocks(family.denoiser, CPU, True)
            family.enable_gradient_checkpointing()
            family.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
            family.denoiser.train()
            for _ in range(2):
                with base_policy(family.denoiser):
                    family.denoiser(**inputs(family))
                with LiveBytes() as live:
                    family.denoiser(**inputs(family)).sample.square().mean().backward()
            peaks[stored] = live.peak
        one = sum(weight.kept.nbytes for weight in family.blocks.weights[0])
        assert 1.9 < (peaks[True] - peaks[False]) / one < 2.1


def inputs(family):
    config = family.denoiser.config
    return {
        "hidden_states": torch.ones(1, 4, config.in_channels),
        "encoder_hidden_states": torch.ones(1, 8, config.joint_attention_dim),
        "pooled_projections": torch.ones(1, config.pooled_projection_dim),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1) if config.guidance_embeds else None,
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def test_nothing_else_can_use_a_stored_weight_unseen_and_whoever_saves_gets_it():
    family = load_family(stable_diffusion())
    before, print_before = copy.deepcopy(family.denoiser.state_dict()), component_fingerprint(family.denoiser)
    family.blocks = StoredBlocks(family.denoiser, CPU, True)
    absent = [each for each in family.denoiser.parameters() if each.isnan().all()]
    assert sum(each.numel() * each.element_size() for each in absent) == family.blocks.bytes_saved
    assert sum(each.untyped_storage().nbytes() for each in absent) == 4 * len(absent)
    assert component_fingerprint(family.denoiser) == print_before
    assert all(torch.equal(value, before[key]) for key, value in family.denoiser.state_dict().items())


def test_the_fingerprint_of_a_quantised_weight_counts_each_tensor_that_it_is_made_of():
    """As torchao's weights are: a tensor of numbers and one of scales behind one parameter."""

    def layer(scale):
        layer = torch.nn.Linear(2, 2, bias=False)
        layer.weight = torch.nn.Parameter(TwoTensor(torch.ones(2, 2), torch.full((2, 2), scale)), requires_grad=False)
        return component_fingerprint(layer)

    assert layer(1.0) == layer(1.0) != layer(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_finetuning": True}, "`group_offload` does not go with `full_finetuning`, which trains"),
        ({"torch_compile": True}, "`group_offload` does not go with `torch_compile`"),
        ({"activation_checkpointing": False}, "`group_offload` needs `activation_checkpointing`.*Leave out"),
        ({"group_offload": False, "storage_dtype": "float8"}, "`storage_dtype` must be float8_e4m3fn or"),
    ],
)
def test_what_does_not_go_with_stored_blocks_is_refused(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**{"group_offload": True, **options})


def test_stored_blocks_are_refused_where_the_launcher_asks_for_shards(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`group_offload` does not go with `fsdp`"):
        config(group_offload=True)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel_leaves_what_stands_in_for_stored_weights_alone(config, dataset, process_group):
    trainer = TGOLTrainer(stable_diffusion(), config(group_offload=True), dataset)
    wrapped = DistributedDataParallel(trainer.model)  # PyTorch refuses to write into a tensor without elements
    blocks = {key for key, value in trainer.model.named_parameters() if value.isnan().all()}
    assert len(blocks) == sum(map(len, trainer.family.blocks.weights)) > 0
    assert wrapped.parameters_to_ignore >= blocks
    assert all(".lora_" not in name for name in wrapped.parameters_to_ignore)


def test_a_quantised_denoiser_and_dora_are_refused(config, dataset):
    pipe = stable_diffusion()
    pipe.unet.hf_quantizer = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="do not go with a quantised denoiser: leave one out"):
        TGOLTrainer(pipe, config(group_offload=True), dataset)
    with pytest.raises(ValueError, match="`use_dora` reads the weights"):
        TGOLTrainer(stable_diffusion(), config(group_offload=True), dataset, peft_config=LoraConfig(use_dora=True))
