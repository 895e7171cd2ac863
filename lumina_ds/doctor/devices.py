"""Checks of the processors: GPUs as the driver's own program lists them, CPUs and the ranks that share them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lumina_ds.doctor.finding import Finding, Surroundings
from lumina_ds.text import MIB, counted, format_bytes

# By major.minor compute capability, from below (CUDA C++ Programming Guide, compute capabilities).
GENERATIONS = (
    (0.0, "older than Pascal"),
    (6.0, "Pascal"),
    (7.0, "Volta"),
    (7.5, "Turing"),
    (8.0, "Ampere"),
    (8.9, "Ada"),
    (9.0, "Hopper"),
    (10.0, "Blackwell"),
)
_QUERY = ("name", "compute_cap", "memory.total", "memory.used", "driver_version")
_CPUS_PER_GPU = 2
# The driver wakes every card first where persistence mode is off.
_DRIVER_SECONDS = 15.0
_USED_SHARE = 0.1


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi. `capability` is major.minor; memory in MiB."""

    name: str
    capability: float
    total_mib: int
    used_mib: int
    driver: str

    @property
    def generation(self) -> str:
        return [name for least, name in GENERATIONS if self.capability >= least][-1]

    @property
    def has_bf16(self) -> bool:
        return self.capability >= 8.0

    @property
    def has_flash_attention(self) -> bool:
        return self.capability >= 8.0

    @property
    def has_fast_fp16(self) -> bool:
        """Tensor cores for fp16."""
        return self.capability >= 7.0


def gpus(around: Surroundings) -> list[Gpu]:
    """The GPUs of this machine by nvidia-smi, which makes no CUDA context; none where it does not answer."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    status, listed, _ = around.run(query, _DRIVER_SECONDS)
    found = []
    for line in listed.splitlines() if status == 0 else ():
        parts = [part.strip() for part in line.split(",")]
        try:
            name, capability, total, used, driver = parts
            found.append(Gpu(name, float(capability), int(total), int(used), driver))
        except ValueError:
            continue  # a MIG parent or a lost card answers with words
    return found


def gpu_generation(around: Surroundings) -> Finding:
    """What the GPUs can compute with."""
    cards = gpus(around)
    if not cards:
        status, _, complaint = around.run(["nvidia-smi", "-L"], _DRIVER_SECONDS)
        if around.find("nvidia-smi") and status:
            says = f"nvidia-smi fails ({complaint.splitlines()[0] if complaint else f'status {status}'})"
            return Finding("GPUs", "warning", says, "reload the NVIDIA driver, or reboot after its update")
        return Finding("GPUs", "ok", "none")
    details = tuple(
        f"{card.name}: {card.generation} ({card.capability}), {format_bytes(card.total_mib * MIB)}, {format_bytes(card.used_mib * MIB)} used"
        for card in cards
    )
    kinds = sorted({card.name for card in cards})
    says = f"{len(cards)} x {', '.join(kinds)}: {_abilities(cards)}"
    if len(kinds) > 1:
        remedy = "choose equal ones with CUDA_VISIBLE_DEVICES or --include"
        return Finding("GPUs", "warning", f"{says}; the slowest sets the pace", remedy, details)
    busy = [number for number, card in enumerate(cards) if card.used_mib > _USED_SHARE * card.total_mib]
    if busy:
        shown = ", ".join(map(str, busy))
        remedy = "end the other programs (nvidia-smi lists them), or choose other GPUs"
        return Finding("GPUs", "warning", f"{says}; memory in use on GPU {shown}", remedy, details)
    if not all(card.has_fast_fp16 for card in cards):
        return Finding("GPUs", "warning", f"{says}; too old for tensor cores", "use --precision fp32", details)
    return Finding("GPUs", "ok", says, details=details)


def cpus(around: Surroundings) -> Finding:
    """Cores that this process may use against the ranks that it would start: one per GPU, or one."""
    count, ranks = usable_cpus(), max(1, len(gpus(around)))
    says = f"{count} for {counted(ranks, 'rank')}"
    if ranks > 1 and count < ranks * _CPUS_PER_GPU:
        remedy = f"give the job at least {ranks * _CPUS_PER_GPU} cores (SLURM: --cpus-per-task)"
        return Finding("CPUs", "warning", f"{says}: ranks will wait for one another", remedy)
    return Finding("CPUs", "ok", says, details=(f"{os.cpu_count()} in the machine",))


def usable_cpus() -> int:
    """Cores of the affinity mask, or fewer where a control group limits the time."""
    allowed = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as stream:
            quota, period = stream.read().split()
        return max(1, min(allowed, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return allowed


def _abilities(cards: list[Gpu]) -> str:
    generations = ", ".join(sorted({card.generation for card in cards}))
    able = [
        ("bf16", all(card.has_bf16 for card in cards)),
        ("fp16", all(card.has_fast_fp16 for card in cards)),
        ("flash-attn", all(card.has_flash_attention for card in cards)),
    ]
    can, cannot = ([name for name, has in able if has is wanted] for wanted in (True, False))
    return f"{generations}, " + "; ".join(
        part for part in (", ".join(can), f"no {', no '.join(cannot)}" if cannot else "") if part
    )
