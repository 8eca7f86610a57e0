"""What several test modules need: which cases are slow, what hangs, adapters that have moved."""

import signal
import time
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tgol_trainer import adapters


def quick(cases, *kept):
    """Parameters of which all but those kept are slow tests.

    For claims about code that all cases share: the fast tests run them on representatives, `-m slow` on the rest.

    Args:
        cases: values, or tuples of values, for `pytest.mark.parametrize`.
        kept: those that stay fast, each as in `cases`.
    """
    unknown = [case for case in kept if case not in cases]
    if unknown:
        raise ValueError(f"not among the cases: {unknown}")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in kept else [pytest.mark.slow])
        for case in cases
    ]


def over(names, kept):
    """Run a test for each name, all of one name in the same process; those not kept are slow."""
    cases = quick(list(names), *kept)
    return pytest.mark.parametrize(
        "name",
        [pytest.param(*c.values, marks=[*c.marks, pytest.mark.xdist_group(f"family {c.values[0]}")]) for c in cases],
    )


def randomize(model, scale=0.1):
    """Move the weights of the policy's adapter, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and f".{adapters.POLICY}" in name:
            parameter.data = parameter.data + scale * torch.randn(parameter.shape, generator=generator)


@contextmanager
def that_ends(seconds):
    """
    Fail where the body waits for so many seconds without using the processor, or uses it for so many.

    Args:
        seconds: on the clock alone a busy machine may take any number of them.
    """
    begun = last = time.process_time()

    def look(*_):
        nonlocal last
        now = time.process_time()
        if now - last < 0.01 * seconds or now - begun > seconds:
            raise AssertionError(f"no end, {now - begun:.1f} s of the processor")
        last = now
        signal.alarm(seconds)

    before = signal.signal(signal.SIGALRM, look)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Copies(TorchDispatchMode):
    """Refuses copies to the meta device that would wait for a real one."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        to_meta = str(keywords.get("device")) == "meta" and function is torch.ops.aten._to_copy.default
        if to_meta and arguments[0].device.type == "cpu" and not keywords.get("non_blocking"):
            raise AssertionError("a copy that waits for the device")
        return function(*arguments, **keywords)


def step_without_waiting(trainer, monkeypatch):
    """
    Make a step with the denoiser on the meta device, from which nothing can be read; return names of the gradients.

    Raises where a value is read from the device, and for a copy to it that waits.
    """
    monkeypatch.setattr("tgol_trainer.families.base.frozen_pass", lambda device: torch.no_grad())  # no autocast there
    autocast = torch.autocast  # which knows no meta device; ERNIE-Image and Ideogram 4 open one on their tensors'
    monkeypatch.setattr(torch, "autocast", lambda device_type, **options: autocast("cpu", **options))
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.family.denoiser.to("meta")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    model.train()
    with torch.no_grad():
        trainer.compute_loss(model, batch)  # Z-Image copies its table of rotary embeddings once
    with _Copies():
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.device.type == "meta"
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def until(browser, expression):
    """Wait until an expression is true in a browser's page: a minute, on a machine that is busy."""
    for _ in range(600):
        if browser.run(f"Boolean({expression})"):
            return
        time.sleep(0.1)
    raise AssertionError(expression)
