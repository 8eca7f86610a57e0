"""
Run scripts/train_tgol.py once for each group of flags, and write down what every process saw.

    torchrun --nproc_per_node 2 tests/launch/train.py RECORDS WORLD_SIZE --flags of one run -- --flags of the next

RECORDS gets a file `run-<n>-process-<rank>.json` for each run and process. A run whose flags follow the word `refused`
must end with an exit code other than 0, and leaves no file. So must one that follows `stopped`, whose second process
gets a SIGTERM in its second step. One that follows `sharded` shards with FSDP2, one that follows
`zero2` with DeepSpeed. In one that follows `broken` the loss of the last process is NaN in the second step; in one
that follows `frozen` that process stops itself there (SIGSTOP).
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tgol.py"


def record_run(file_of, world_size):
    """Wrap the places where a process could do something else than its neighbour; returns what undoes it."""
    import torch.distributed

    from tgol_trainer import adapters, trainer
    from tgol_trainer.saving import trainer as saving

    seen = {"adapters": [], "cards": [], "states": [], "row_ids": [], "labels": [], "eval_row_ids": []}
    write_json, train, compute_loss = saving.write_json, trainer.TGOLTrainer.train, trainer.TGOLTrainer.compute_loss
    save_adapter, write_card = adapters.save_adapter, saving.write_card

    def recorded_train(self, *args, **kwargs):
        started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if started != world_size or self.args.world_size != world_size:
            raise RuntimeError(f"{started} processes talk to each other, {world_size} were wanted: this tests nothing")
        seen.update(world_size=started, process=self.args.process_index, threshold=self.threshold.value)
        result = train(self, *args, **kwargs)
        seen["log_history"] = self.state.log_history
        file_of(self.args.process_index).write_text(json.dumps(seen))
        return result

    def recorded_loss(self, model, inputs, *args, **kwargs):
        rows = inputs["row_id"].tolist()
        if model.training:
            seen["row_ids"].append(rows)
            seen["labels"].append((inputs["margin"] >= 0).tolist())
        else:
            seen["eval_row_ids"].append(rows)
        return compute_loss(self, model, inputs, *args, **kwargs)

    def recorded(name, function, folder_of):
        def call(*args, **kwargs):
            seen[name].append(Path(folder_of(args)).name)
            if "process" in seen:  # the last save comes after training
                file_of(seen["process"]).write_text(json.dumps(seen))
            return function(*args, **kwargs)

        return call

    trainer.TGOLTrainer.train, trainer.TGOLTrainer.compute_loss = recorded_train, recorded_loss
    saving.write_json = recorded("states", write_json, lambda args: args[0].parent)
    saving.write_card = recorded("cards", write_card, lambda args: args[1])
    adapters.save_adapter = recorded("adapters", save_adapter, lambda args: args[3].parents[1])  # a draft

    def undo():
        trainer.TGOLTrainer.train, trainer.TGOLTrainer.compute_loss = train, compute_loss
        saving.write_json, saving.write_card, adapters.save_adapter = write_json, write_card, save_adapter

    return undo


def run(records, world_size, flags, number=0):
    """Train as the script does, in this process."""
    arguments = sys.argv
    undo = record_run(lambda rank: Path(records) / f"run-{number}-process-{rank}.json", world_size)
    try:
        sys.argv = [str(SCRIPT), *flags]
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        undo()
        sys.argv = arguments


def main():
    records, world_size, *flags = sys.argv[1:]
    groups = [[]]
    for flag in flags:
        if flag == "--":
            groups.append([])
        else:
            groups[-1].append(flag)
    for number, group in enumerate(groups):
        gc.freeze()  # each `train` ends with a full collection, which need not look through what is imported
        run_group(records, int(world_size), group, number)


def run_group(records, world_size, group, number=0):
    """Train with the flags of one run, in the way of the word before them."""
    word, *flags = group if group[0] in WAYS else ["", *group]
    with WAYS.get(word, contextlib.nullcontext)():
        (must_be_refused if word in ("refused", "stopped") else run)(records, world_size, flags, number)


@contextlib.contextmanager
def patched(state, trainer, environment, initialized, checked):
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(state, "__init__", initialized),
        mock.patch.object(trainer, "training_step", checked),
    ):
        yield


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
SHARDED |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock"}
"""What `accelerate launch` makes of scripts/accelerate_configs/fsdp2.yaml."""


@contextlib.contextmanager
def sharded():
    """Shard as on GPUs: accelerate takes FSDP for a setting of GPUs, while PyTorch's own runs on CPUs too."""
    from accelerate import state
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    from tgol_trainer.trainer import TGOLTrainer

    initialize, step = state.AcceleratorState.__init__, TGOLTrainer.training_step

    def initialized(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    def checked(self, *args):
        # Those of no block stay whole between the look at the base model and the first backward pass.
        if not any(isinstance(value, DTensor) for value in self.model.parameters()):
            raise RuntimeError("weights are whole: this tests nothing")
        return step(self, *args)

    with patched(state.AcceleratorState, TGOLTrainer, SHARDED, initialized, checked):
        yield


ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
"""What `accelerate launch` makes of scripts/accelerate_configs/zero2.yaml, and DeepSpeed's word for CPUs."""


@contextlib.contextmanager
def zero2():
    """Use DeepSpeed as on GPUs: accelerate takes it, too, for a setting of GPUs."""
    from accelerate import state
    from accelerate.utils import DistributedType

    from tgol_trainer.trainer import TGOLTrainer

    initialize, step = state.AcceleratorState.__init__, TGOLTrainer.training_step

    def initialized(self, *args, deepspeed_plugin=None, **kwargs):
        initialize(self, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if deepspeed_plugin is not None:
            from deepspeed import comm

            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin

    def checked(self, *args):
        if type(self.optimizer.optimizer).__name__ != "DeepSpeedZeroOptimizer":
            raise RuntimeError("the optimizer is whole: this tests nothing")
        return step(self, *args)

    with patched(state.AcceleratorState, TGOLTrainer, ZERO2, initialized, checked):
        yield


@contextlib.contextmanager
def terminated():
    from tgol_trainer.trainer import TGOLTrainer

    step = TGOLTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 1 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    TGOLTrainer.training_step = interrupted
    try:
        yield
    finally:
        TGOLTrainer.training_step = step


@contextlib.contextmanager
def second_step(change):
    """Change what the last process computes as the loss of the second step."""
    from tgol_trainer.trainer import TGOLTrainer

    compute = TGOLTrainer.compute_loss

    def changed(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        last = self.args.process_index == self.args.world_size - 1
        return change(loss) if last and model.training and self.state.global_step == 1 else loss

    TGOLTrainer.compute_loss = changed
    try:
        yield
    finally:
        TGOLTrainer.compute_loss = compute


def with_nan(loss):
    return loss * float("nan")


def then_frozen(loss):
    sys.stderr.write("frozen\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSTOP)
    return loss


def must_be_refused(records, world_size, flags, number):
    try:
        run(records, world_size, flags, number)
    except SystemExit as end:
        sys.stderr.write(f"refused with exit code {end.code}\n")
    else:
        raise RuntimeError(f"run {number} should have been refused")


WAYS = {
    "sharded": sharded,
    "zero2": zero2,
    "refused": contextlib.nullcontext,
    "stopped": terminated,
    "broken": lambda: second_step(with_nan),
    "frozen": lambda: second_step(then_frozen),
}


if __name__ == "__main__":
    main()
