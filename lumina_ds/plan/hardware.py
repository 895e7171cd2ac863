"""Memory of the GPUs that a plan is compared with."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """`memory_gb` is the size on the box; `usable_bytes` what the smallest of the `examples` gives a process."""

    memory_gb: int
    examples: str
    usable_bytes: int

    @property
    def label(self) -> str:
        return f"{self.memory_gb} GB"


def _card(memory_gb: int, examples: str, usable_gib: float) -> Card:
    return Card(memory_gb, examples, int(usable_gib * GIB))


# Total capacity as CUDA reports it, which ECC and the driver's reserve make smaller than the box says.
CARDS: tuple[Card, ...] = (
    _card(24, "L4, A10, RTX 3090, RTX 4090", 22.0),
    _card(32, "V100, RTX 5090", 31.3),
    _card(40, "A100", 39.3),
    _card(48, "L40S, A6000", 44.3),
    _card(80, "A100, H100", 79.1),
    _card(96, "H20, RTX PRO 6000", 94.9),
    _card(141, "H200", 139.8),
    _card(192, "B200, MI300X", 178.3),
)


def usable_bytes(memory_gb: float) -> int:
    """Bytes a process can use on a card sold as `memory_gb`; an unlisted size loses 8 %, the most of any listed."""
    for card in CARDS:
        if card.memory_gb == memory_gb:
            return card.usable_bytes
    return int(memory_gb * 0.92 * GIB)


def cards_that_fit(peak_bytes: int) -> list[Card]:
    """The listed cards whose usable memory holds `peak_bytes`, smallest first."""
    return [card for card in CARDS if peak_bytes <= card.usable_bytes]
