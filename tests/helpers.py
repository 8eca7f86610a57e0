"""What several test modules need: which cases are slow, adapters that have moved."""

import pytest
import torch

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
