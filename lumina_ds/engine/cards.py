"""Which GPUs the ranks of this host take: CUDA_VISIBLE_DEVICES (AMD: HIP_VISIBLE_DEVICES) on its way to them.

DeepSpeed's runner drops the variable as soon as it is told how many ranks to start, and its launch module gives the
ranks slot numbers instead (deepspeed/launcher/runner.py and launch.py), so cards 2 and 3 would become 0 and 1, a UUID
could not be said at all, and hidden cards would be seen again. Hence the value travels in CARDS beside it, and each rank
turns slots back into the cards that the user named. ROCR_VISIBLE_DEVICES needs nothing: no launcher touches it, and the
numbers of the other two count what it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

from lumina_ds.engine.launchers import Launch
from lumina_ds.errors import MachineError
from lumina_ds.text import counted

CARDS = "LUMINA_CARDS"
CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


def choose_cards(
    environment: Mapping[str, str],
    num_devices: int,
    slots: Sequence[int],
    by_number: bool = False,
    is_amd: bool = False,
) -> list[str]:
    """The card of each rank on this host by its name in the environment; [] for ranks on a CPU.

    `num_devices` is how many GPUs a process with this environment can use, `slots` what the deepspeed runner numbers its
    ranks by. `by_number`: the user chose the slots with --include or --exclude. Raises MachineError for more ranks than
    cards, for names that no card has, and for two choices that differ.
    """
    if num_devices == 0:
        return []
    value = environment.get(_variable(environment, is_amd))
    names = [str(number) for number in range(num_devices)] if value is None else _split(value)
    shown = "" if value is None else f" ({_variable(environment, is_amd)}={value})"
    if len(names) > num_devices:
        slices = any(name.startswith("MIG-") for name in names)
        reason = "; a process sees one MIG slice only" if slices else ""
        raise MachineError(
            f"{counted(len(names), 'card')} are named{shown}, and {num_devices} can be used{reason}; name "
            f"{','.join(names[:num_devices])}, or mend the others"
        )
    if max(slots) >= len(names):
        raise MachineError(
            f"{counted(len(slots), 'rank')} up to slot {max(slots)} were asked for, and {counted(len(names), 'card')} "
            f"can be used here{shown}; give --num_gpus {len(names)} or less"
        )
    chosen = [names[slot] for slot in slots]
    if by_number and chosen != [str(slot) for slot in slots]:
        raise MachineError(
            f"--include or --exclude and {_variable(environment, is_amd)}={value} choose different cards; keep one of them"
        )
    return chosen


def check_reach(environment: Mapping[str, str], is_amd: bool = False) -> None:
    """Refuse a choice of cards that ranks started through ssh would not get; counting from 0 on is none."""
    variable = _variable(environment, is_amd)
    names = _split(environment.get(variable, ""))
    if names != [str(number) for number in range(len(names))]:
        raise MachineError(
            f"{variable}={environment[variable]} does not reach ranks that are started through ssh; unset it, and choose "
            "with -- --include HOST:2,3@HOST:2,3"
        )


def carry_cards(environment: MutableMapping[str, str], is_amd: bool = False) -> None:
    """Move the choice to where DeepSpeed's runner leaves it alone; `obey_cards` is the other end."""
    variable = _variable(environment, is_amd)
    environment.pop(CARDS, None)
    if variable in environment:
        environment[CARDS] = f"{variable}={environment.pop(variable)}"


def obey_cards(environment: MutableMapping[str, str]) -> None:
    """In a rank, before torch looks for GPUs: name the cards that its slots stand for."""
    variable, _, value = environment.pop(CARDS, "").partition("=")
    if not variable:
        return
    names, slots = _split(value), _split(environment.pop(CUDA, ""))
    if slots and all(slot.isdecimal() and int(slot) < len(names) for slot in slots):
        value = ",".join(names[int(slot)] for slot in slots)
    environment[variable] = value


def device_index(launch: Launch, num_devices: int) -> int:
    """The GPU of a rank among the `num_devices` that it sees. A task with one visible GPU takes that.

    Raises MachineError where a host has fewer GPUs than ranks, or a host's only rank would leave GPUs unused.
    """
    if launch.one_per_host and num_devices > 1:
        raise MachineError(
            f"RANK and WORLD_SIZE without LOCAL_RANK mean one rank per host, and {num_devices} GPUs are visible here; "
            f"start with torchrun --nproc-per-node {num_devices}, or make one visible (CUDA_VISIBLE_DEVICES=0)"
        )
    if num_devices == 1:
        return 0
    ranks = max(launch.local_rank + 1, launch.local_size or 0)
    if ranks > num_devices:
        raise MachineError(
            f"{launch.launcher} started {ranks} ranks on this host, and {counted(num_devices, 'GPU is', 'GPUs are')} visible; start "
            f"{num_devices} or fewer per host"
        )
    return launch.local_rank


def card_name(environment: Mapping[str, str], index: int, is_amd: bool = False) -> str:
    """The card that this process counts as `index`, as the environment names it."""
    names = _split(environment.get(_variable(environment, is_amd), ""))
    return names[index] if index < len(names) else str(index)


def cards_line(places: Sequence[tuple[str, str]]) -> str:
    """(host, card) of every rank, in the order of ranks, as one sentence."""
    hosts: dict[str, list[str]] = {}
    for host, card in places:
        hosts.setdefault(host, []).append(card)
    return "GPUs, rank by rank: " + "; ".join(f"{', '.join(cards)} on {host}" for host, cards in hosts.items())


def _variable(environment: Mapping[str, str], is_amd: bool) -> str:
    return HIP if is_amd and HIP in environment else CUDA


def _split(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]
