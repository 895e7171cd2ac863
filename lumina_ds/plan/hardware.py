"""Memory and speed of the GPUs that a plan is compared with, by the names that people use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lumina_ds.errors import ConfigError
from lumina_ds.text import GIB, nearest


@dataclass(frozen=True)
class Card:
    """`memory_gb` is the size on the box; `usable_bytes` what the smallest of the `examples` gives a process."""

    memory_gb: int
    examples: str
    usable_bytes: int

    @property
    def label(self) -> str:
        return f"{self.memory_gb} GB"


@dataclass(frozen=True)
class Gpu:
    """A named model. `tflops` is the dense 16-bit tensor rate of the maker's data sheet, without sparsity;
    `bf16` whether it computes in bfloat16."""

    name: str
    memory_gb: int
    tflops: float
    bf16: bool = True

    @property
    def usable_bytes(self) -> int:
        return usable_bytes(self.memory_gb)


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

GPUS: tuple[Gpu, ...] = (
    Gpu("l4-24", 24, 121),
    Gpu("a10-24", 24, 125),
    Gpu("rtx3090-24", 24, 71),
    Gpu("rtx4090-24", 24, 165),
    Gpu("v100-32", 32, 125, bf16=False),
    Gpu("rtx5090-32", 32, 210),
    Gpu("a100-40", 40, 312),
    Gpu("l40s-48", 48, 362),
    Gpu("a6000-48", 48, 155),
    Gpu("a100-80", 80, 312),
    Gpu("h100-80", 80, 989),
    Gpu("h20-96", 96, 148),
    Gpu("rtxpro6000-96", 96, 500),
    Gpu("h200-141", 141, 989),
    Gpu("b200-192", 192, 2250),
    Gpu("mi300x-192", 192, 1307),
)


def find_gpu(name: str) -> Gpu:
    """The GPU that `name` means: `h100-80`, or without the size where only one size exists; case, spaces and a
    trailing gb do not matter. ConfigError names the nearest one."""
    wanted = re.sub(r"[\s_]", "", name.lower()).removesuffix("gb").removeprefix("nvidia")
    matches = [gpu for gpu in GPUS if wanted in _spellings(gpu.name)]
    if len(matches) == 1:
        return matches[0]
    names = [gpu.name for gpu in GPUS]
    if matches:
        raise ConfigError(f"--gpu {name} comes in several sizes; use {' or '.join(gpu.name for gpu in matches)}")
    # Of a known model with another size, the nearest size of that model.
    model, _, size = wanted.rpartition("-")
    same = [gpu for gpu in GPUS if gpu.name.rpartition("-")[0] == model]
    if same and size.isdigit():
        closest = min(same, key=lambda gpu: abs(gpu.memory_gb - int(size)))
        raise ConfigError(f"--gpu {name} is no known card; did you mean {closest.name}? (known: {', '.join(names)})")
    raise ConfigError(f"--gpu {name} is no known card{nearest(wanted, names)} (known: {', '.join(names)})")


def card_of_device(device_name: str, memory_bytes: int) -> Gpu | None:
    """The listed card behind a driver's name, such as "NVIDIA H100 80GB HBM3"; None for one that is not listed.

    Of a model in several sizes the one whose memory is nearest.
    """
    wanted = re.sub(r"[\s_-]", "", device_name.lower())
    models = {gpu.name.rpartition("-")[0] for gpu in GPUS}
    # Not the B200 in GB200, nor the A10 in A100 and A10G: other chips with other rates.
    found = [
        name for name in models if re.search(rf"(?<!g){name}(?![0-9a-z])|(?<!g){name}(?=sxm|pcie|[0-9]+gb)", wanted)
    ]
    sizes = [gpu for gpu in GPUS if found and gpu.name.rpartition("-")[0] == max(found, key=len)]
    return min(sizes, key=lambda gpu: abs(gpu.memory_gb * 1e9 - memory_bytes), default=None)


def _spellings(name: str) -> set[str]:
    """h100-80, h10080, h100; of a GeForce or RTX PRO also without rtx."""
    model = name.rpartition("-")[0]
    spellings = {name, name.replace("-", ""), model}
    return spellings | {spelling.removeprefix("rtx") for spelling in spellings}


def usable_bytes(memory_gb: float) -> int:
    """Bytes a process can use on a card sold as `memory_gb`; an unlisted size loses 8 %, the most of any listed."""
    for card in CARDS:
        if card.memory_gb == memory_gb:
            return card.usable_bytes
    return int(memory_gb * 0.92 * GIB)


def cards_that_fit(peak_bytes: int) -> list[Card]:
    """The listed cards whose usable memory holds `peak_bytes`, smallest first."""
    return [card for card in CARDS if peak_bytes <= card.usable_bytes]
