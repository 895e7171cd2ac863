"""Memory and speed of the GPUs that a plan is compared with, by the names that people and drivers use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lumina_ds.errors import ConfigError
from lumina_ds.text import GIB, nearest


@dataclass(frozen=True)
class Gpu:
    """A named model, `model-size`. `tflops` is the dense 16-bit tensor rate of the maker's data sheet, without sparsity;
    `usable_gib` the capacity that CUDA reports, which ECC and the driver's reserve make smaller than the box says;
    `bf16` whether it computes in bfloat16."""

    name: str
    memory_gb: int
    tflops: float
    usable_gib: float
    bf16: bool = True

    @property
    def model(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def usable_bytes(self) -> int:
        return int(self.usable_gib * GIB)


# To add a card, add its entry; everything else follows from this list. Rates are those of NVIDIA's and AMD's data sheets
# without sparsity (of GeForce cards with 32-bit accumulation), sizes what torch.cuda.get_device_properties reports, rounded
# down; of an MI250X, which shows itself as two devices, they are those of one.
GPUS: list[Gpu] = [
    Gpu("t4-16", 16, 65, 14.5, bf16=False),
    Gpu("v100-16", 16, 125, 15.7, bf16=False),
    Gpu("l4-24", 24, 121, 22.0),
    Gpu("a10-24", 24, 125, 22.0),
    Gpu("a10g-24", 24, 70, 22.0),
    Gpu("a30-24", 24, 165, 23.4),
    Gpu("rtx3090-24", 24, 71, 23.6),
    Gpu("rtx4090-24", 24, 165, 23.5),
    Gpu("v100-32", 32, 125, 31.3, bf16=False),
    Gpu("rtx5090-32", 32, 210, 31.3),
    Gpu("a100-40", 40, 312, 39.3),
    Gpu("a40-48", 48, 150, 44.3),
    Gpu("l40-48", 48, 181, 44.3),
    Gpu("l40s-48", 48, 362, 44.3),
    Gpu("a6000-48", 48, 155, 44.3),
    Gpu("rtx6000ada-48", 48, 364, 44.3),
    Gpu("mi250x-64", 64, 191, 63.9),
    Gpu("a100-80", 80, 312, 79.1),
    Gpu("a800-80", 80, 312, 79.1),
    Gpu("h100-80", 80, 989, 79.1),
    Gpu("h100pcie-80", 80, 756, 79.1),
    Gpu("h800-80", 80, 989, 79.1),
    Gpu("h100nvl-94", 94, 835, 93.0),
    Gpu("h20-96", 96, 148, 94.9),
    Gpu("gh200-96", 96, 989, 94.5),
    Gpu("rtxpro6000-96", 96, 500, 94.9),
    Gpu("h200-141", 141, 989, 139.8),
    Gpu("gb200-186", 186, 2500, 183.0),
    Gpu("b200-192", 192, 2250, 178.3),
    Gpu("mi300x-192", 192, 1307, 191.5),
    Gpu("mi325x-256", 256, 1307, 255.5),
    Gpu("b300-288", 288, 2250, 267.5),
    Gpu("mi355x-288", 288, 2516, 287.5),
]


@dataclass(frozen=True)
class Card:
    """A size on the box, in GB; `usable_bytes` is what the smallest listed GPU of that size gives a process."""

    memory_gb: int
    usable_bytes: int

    @property
    def label(self) -> str:
        return f"{self.memory_gb} GB"


def cards() -> list[Card]:
    """The sizes of GPUS, smallest first."""
    sizes = sorted({gpu.memory_gb for gpu in GPUS})
    return [Card(size, min(gpu.usable_bytes for gpu in GPUS if gpu.memory_gb == size)) for size in sizes]


def find_gpu(name: str) -> Gpu:
    """The GPU that `name` means: `h100-80`, or without the size where only one size exists; case, spaces and a
    trailing gb do not matter; or what its driver calls it. ConfigError names the nearest one."""
    wanted = re.sub(r"[\s_]", "", name.lower()).removesuffix("gb").removeprefix("nvidia")
    matches = [gpu for gpu in GPUS if wanted in _spellings(gpu)] or _of_driver(name)
    if len(matches) == 1:
        return matches[0]
    names = [gpu.name for gpu in GPUS]
    if matches:
        raise ConfigError(f"--gpu {name} comes in several sizes; use {' or '.join(gpu.name for gpu in matches)}")
    # Of a known model with another size, the nearest size of that model.
    model, _, size = wanted.rpartition("-")
    same = [gpu for gpu in GPUS if gpu.model == model]
    if same and size.isdigit():
        closest = min(same, key=lambda gpu: abs(gpu.memory_gb - int(size)))
        raise ConfigError(f"--gpu {name} is no known card; did you mean {closest.name}? (known: {', '.join(names)})")
    raise ConfigError(f"--gpu {name} is no known card{_nearest_card(wanted)} (known: {', '.join(names)})")


def _nearest_card(wanted: str) -> str:
    """The hint to a card of a similar name, with its size where there is one."""
    sizes = {gpu.model: [other.name for other in GPUS if other.model == gpu.model] for gpu in GPUS}
    hint = nearest(wanted, [*(gpu.name for gpu in GPUS), *sizes])
    model = hint.removeprefix("; did you mean ").removesuffix("?")
    return hint.replace(model, sizes[model][0]) if len(sizes.get(model, ())) == 1 else hint


def card_of_device(device_name: str, memory_bytes: int) -> Gpu | None:
    """The listed card behind a driver's name, such as "NVIDIA H100 80GB HBM3"; None for one that is not listed.

    Of a model in several sizes the one whose memory is nearest.
    """
    sizes = _models(device_name)
    return min(sizes, key=lambda gpu: abs(gpu.memory_gb * 1e9 - memory_bytes), default=None)


def _models(device_name: str) -> list[Gpu]:
    """The listed sizes of the model in a driver's name."""
    wanted = re.sub(r"[\s_-]", "", device_name.lower())
    wanted = wanted.replace("gh200480gb", "gh200")  # the memory of its processor
    # Not the B200 in GB200, nor the A10 in A100 and A10G: other chips with other rates.
    found = [
        name
        for name in {gpu.model for gpu in GPUS}
        if re.search(rf"(?<!g){name}(?![0-9a-z])|(?<!g){name}(?=sxm|pcie|blackwell|generation|[0-9]+gb)", wanted)
    ]
    return [gpu for gpu in GPUS if found and gpu.model == max(found, key=len)]


def _of_driver(device_name: str) -> list[Gpu]:
    """The same, of the size that the name gives, where it gives one."""
    size = re.search(r"([0-9]+) ?gb", device_name.lower().replace("480gb", ""))
    return [gpu for gpu in _models(device_name) if size is None or gpu.memory_gb == int(size[1])]


def _spellings(gpu: Gpu) -> set[str]:
    """h100-80, h10080, h100; of a GeForce or RTX PRO also without rtx."""
    spellings = {gpu.name, gpu.name.replace("-", ""), gpu.model}
    return spellings | {spelling.removeprefix("rtx") for spelling in spellings}


def usable_bytes(memory_gb: float) -> int:
    """Bytes a process can use on a card sold as `memory_gb`; an unlisted size loses 8 %, the most of any listed."""
    for card in cards():
        if card.memory_gb == memory_gb:
            return card.usable_bytes
    return int(memory_gb * 0.92 * GIB)


def cards_that_fit(peak_bytes: int) -> list[Card]:
    """The listed cards whose usable memory holds `peak_bytes`, smallest first."""
    return [card for card in cards() if peak_bytes <= card.usable_bytes]
