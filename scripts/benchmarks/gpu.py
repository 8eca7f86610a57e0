"""
Time training steps of random networks of published sizes on one GPU, and hold their memory against the plan.

`scripts/benchmarks/gpu.sh` runs it. `prepare` needs no GPU: it writes configs and what is planned for each case. `run`
reads both, makes each denoiser with random weights on the device, and trains a LoRA on random latents and prompts as
the trainer does: a pass of the reference, a pass of the policy, backward, AdamW. A line of the results is one case.

    python scripts/benchmarks/gpu.py prepare --folder prepared
    python scripts/benchmarks/gpu.py run --folder prepared --output gpu.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.functional import softplus

from tgol_trainer import adapters
from tgol_trainer.families import FamilySettings, ModelFamily, StoredBlocks
from tgol_trainer.families.compiling import compile_blocks
from tgol_trainer.families.skeleton import load_skeleton
from tgol_trainer.likelihoods import RowGenerators, log_likelihood
from tgol_trainer.planning import Quantization, Setup, predict
from tgol_trainer.planning.memory import trace_encoding
from tgol_trainer.planning.networks import forget_weights, networks
from tgol_trainer.planning.tracing import without_memory

WARM, TIMED = 3, 5
"""Steps before the clock starts, the compiler's among them, and steps on it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and how it is trained."""

    model: str
    batch_size: int
    resolution: tuple[int, int]
    num_frames: int | None = None
    dtype: str = "bfloat16"
    checkpointing: bool = False
    bits: int | None = None
    group_offload: bool = False
    storage_dtype: str | None = None
    compiled: bool = False

    def setup(self, folder: Path) -> Setup:
        """What is planned."""
        given = {key: value for key, value in vars(self).items() if key not in ("model", "bits", "compiled")}
        quantization = Quantization(self.bits, compute_dtype=torch.bfloat16) if self.bits else None
        lora = LoraConfig(r=16, lora_alpha=16)
        options = {"quantization": quantization, "lora": lora, "optimizer": "adamw_torch", "sampling_batch": 0}
        return Setup(model=str(folder / self.model), **options, **given)


FULL = [
    Case("sd15", 8, (512, 512)),
    Case("sd15", 8, (512, 512), compiled=True),
    Case("sd15", 8, (512, 512), dtype="float32"),
    Case("sdxl", 4, (1024, 1024), checkpointing=True),
    Case("sd35", 4, (1024, 1024), checkpointing=True),
    Case("sd35", 4, (1024, 1024), checkpointing=True, group_offload=True),
    Case("sd35", 4, (1024, 1024), checkpointing=True, storage_dtype="float8_e4m3fn"),
    Case("flux", 1, (1024, 1024), checkpointing=True),
    Case("flux", 1, (1024, 1024), checkpointing=True, bits=4),
    Case("flux", 1, (1024, 1024), checkpointing=True, bits=8),
    Case("flux", 1, (1024, 1024), checkpointing=True, group_offload=True),
    Case("z-image", 1, (1024, 1024), checkpointing=True),
    Case("wan", 1, (480, 832), num_frames=33, checkpointing=True),
]
SMALL = [
    Case("sd", 2, (16, 16), dtype="float32"),
    Case("sd", 2, (16, 16)),
    Case("flux", 2, (16, 16), checkpointing=True, group_offload=True),
    Case("flux", 2, (16, 16), checkpointing=True, storage_dtype="float8_e4m3fn"),
]


def prepare(folder: Path, cases: list[Case], tiny: bool) -> None:
    """Write configs and plans."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the sizes of the networks stand beside the tests
    from tests.pipelines import TINY
    from tests.sizes import write

    plans = []
    for case in cases:
        if not (folder / case.model).exists():
            if tiny:
                TINY[case.model].build().save_pretrained(folder / case.model)
            else:
                write(case.model, folder / case.model)
        print(f"planning {case}", flush=True)
        found = predict(case.setup(folder))
        plan = {"tensors": found.training.tensors, "total": found.training.total, "flops": found.step.flops}
        plans.append({"case": dataclasses.asdict(case), "plan": plan})
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))


def random_like(value: Any, batch: int, device: torch.device) -> Any:
    """Random tensors for a batch, of the shapes of one row's tensors without values."""
    if isinstance(value, list):
        return [torch.randn(value[0].shape, device=device).to(value[0].dtype) for _ in range(batch)]
    made = torch.randn(batch, *value.shape[1:], device=device)
    return made.to(value.dtype) if value.is_floating_point() else torch.ones_like(made, dtype=value.dtype)


def inputs_of(case: Case, folder: Path, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents and conditioning of a batch."""
    family = load_skeleton(folder / case.model, dtype=case.dtype, settings=FamilySettings(num_frames=case.num_frames))
    with without_memory():
        for network in networks(family).values():
            forget_weights(network)
        encoding = trace_encoding(family, case.resolution)
    conditioning = {key: random_like(each, case.batch_size, device) for key, each in encoding.conditioning.items()}
    return random_like(encoding.latents, case.batch_size, device), conditioning


def trained_family(case: Case, folder: Path, device: torch.device) -> ModelFamily:
    """Make the denoiser with random weights and an adapter; the other networks stay without."""
    family = load_skeleton(folder / case.model, dtype=case.dtype, settings=FamilySettings(num_frames=case.num_frames))
    denoiser = family.denoiser
    place = torch.device("cpu") if case.group_offload else device
    if case.bits:
        quantize(denoiser, case.bits, device)
    for module in denoiser.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or value.device.type != "meta":
                    continue
                if name == "weight" and value.dim() == 1:  # of a norm
                    new = torch.ones(value.shape, dtype=value.dtype, device=place)
                else:  # the same numbers in each dtype
                    new = (0.02 * torch.randn(value.shape, device=device)).to(value.dtype).to(place)
                table[name] = torch.nn.Parameter(new, False) if isinstance(value, torch.nn.Parameter) else new
    if case.group_offload or case.storage_dtype:
        family.blocks = StoredBlocks(denoiser, device, case.group_offload, case.storage_dtype)
    denoiser.to(device)
    adapters.add_policy(denoiser, LoraConfig(r=16, lora_alpha=16, target_modules=set(family.default_target_modules)))
    if case.checkpointing:
        family.enable_gradient_checkpointing()
    if case.compiled:
        compile_blocks(denoiser)
    denoiser.train()
    return family


def quantize(denoiser: Any, bits: int, device: torch.device) -> None:
    """Put bitsandbytes' layers with random weights in place of the linear ones, one by one."""
    import bitsandbytes as bnb

    kept = set(denoiser._keep_in_fp32_modules or ())
    for name, layer in list(denoiser.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or kept.intersection(name.split(".")):
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        weight = (0.02 * torch.randn(layer.weight.shape, device=device)).to(torch.bfloat16).cpu()
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
        new.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, new)
    setattr(denoiser, f"is_loaded_in_{bits}bit", True)


def measure(case: Case, folder: Path, device: torch.device) -> dict[str, Any]:
    """Train a few steps; return seconds, memory and the first log-ratios of a moved adapter."""
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    latents, conditioning = inputs_of(case, folder, device)
    family = trained_family(case, folder, device)
    trained = [each for each in family.denoiser.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    rows = RowGenerators(0, 0, range(case.batch_size))
    sign = torch.tensor([1.0, -1.0] * case.batch_size, device=device)[: case.batch_size]
    ratios: list[list[float]] = []
    seconds = []
    for _ in range(WARM + TIMED):
        began = time.perf_counter()
        draw = family.likelihood.draw(latents, rows)
        with adapters.reference_policy(family.denoiser):
            reference = family.likelihood.error(family.predict(family.denoiser, draw, conditioning), draw)
        error = family.likelihood.error(family.predict(family.denoiser, draw, conditioning), draw)
        ratio = log_likelihood(family.likelihood, error, 0.001) - log_likelihood(family.likelihood, reference, 0.001)
        softplus(-sign * ratio).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        ratios.append(ratio.tolist())
    return {
        "seconds": sorted(seconds[WARM:])[TIMED // 2],
        "all_seconds": seconds,
        "log_ratios": ratios[:2],
        "peak_allocated": torch.cuda.max_memory_allocated() if gpu else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if gpu else None,
    }


def measured_rate(device: torch.device, side: int) -> float:
    """Operations a second of one large matrix product in bfloat16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    left @ right
    wait()
    began = time.perf_counter()
    for _ in range(10):
        left @ right
    wait()
    return 10 * 2 * side**3 / (time.perf_counter() - began)


def run(options: argparse.Namespace) -> None:
    """Measure every case that was prepared, as far as the time goes."""
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rate = measured_rate(device, 8192 if device.type == "cuda" else 256)
    with options.output.open("a") as file:
        for line in json.loads((options.folder / "plans.json").read_text()):
            case, plan = Case(**{**line["case"], "resolution": tuple(line["case"]["resolution"])}), line["plan"]
            row: dict[str, Any] = {**line, "device": name, "torch": torch.__version__, "bf16_rate": rate}
            if time.monotonic() - began > options.seconds:
                row["left_out"] = "the time was over"
            else:
                try:
                    found = measure(case, options.folder, device)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                else:
                    step = found["seconds"]
                    row |= {**found, "steps_per_second": 1 / step, "images_per_second": case.batch_size / step}
                    row["share_of_rate"] = plan["flops"] / step / rate
                    if found["peak_allocated"]:
                        row["peak_to_plan"] = found["peak_allocated"] / plan["tensors"]
            gc.collect()
            file.write(json.dumps(row) + "\n")
            file.flush()
            print({key: row.get(key) for key in ("case", "seconds", "peak_to_plan", "error", "left_out")}, flush=True)


def main() -> None:
    """Prepare, or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("--folder", type=Path, required=True, help="configs and plans")
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--seconds", type=float, default=360, help="no case begins after these (default: 360)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU")
    options = parser.parse_args()
    if options.what == "prepare":
        options.folder.mkdir(parents=True, exist_ok=True)
        prepare(options.folder, SMALL if options.tiny else FULL, options.tiny)
    else:
        run(options)


if __name__ == "__main__":
    main()
