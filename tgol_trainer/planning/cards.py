"""Graphics cards: memory, and how fast their makers say they multiply."""

from __future__ import annotations

import dataclasses

GIB = 2**30

REACHED = (0.2, 0.6)
"""Share of the published rate that training reaches: an estimate, not measured with this library."""


@dataclasses.dataclass(frozen=True)
class Card:
    """
    A graphics card.

    Args:
        name (`str`): As the device names itself, in part.
        memory (`int`): Bytes.
        rate (`float`, *optional*):
            Floating-point operations a second of dense matrix products in bfloat16 with float32 sums, as published.
    """

    name: str
    memory: int
    rate: float | None = None


# From the makers' data sheets, without sparsity.
CARDS: dict[str, Card] = {
    "3090": Card("RTX 3090", 24 * GIB, 71e12),
    "4090": Card("RTX 4090", 24 * GIB, 165e12),
    "l4": Card("L4", 24 * GIB, 121e12),
    "a10": Card("A10", 24 * GIB, 125e12),
    "l40s": Card("L40S", 48 * GIB, 362e12),
    "a100-40": Card("A100", 40 * GIB, 312e12),
    "a100": Card("A100", 80 * GIB, 312e12),
    "h100": Card("H100", 80 * GIB, 989e12),
    "h200": Card("H200", 141 * GIB, 989e12),
}
"""By the name that `tgol plan --card` takes."""


def found_card() -> Card | None:
    """Return the first card of this machine, with its rate where it is known."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    # `A10` is also the beginning of `A100`, and `L4` that of `L40S`.
    known = [card for card in CARDS.values() if card.name in properties.name]
    best = max(known, key=lambda card: len(card.name), default=None)
    return Card(properties.name, properties.total_memory, best.rate if best else None)
