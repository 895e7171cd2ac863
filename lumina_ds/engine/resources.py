"""What there is to run on, as DeepSpeed sees it: hosts and devices that its runner will use, and ops it could build."""

from __future__ import annotations

import contextlib
import io
import os
from argparse import Namespace
from collections.abc import MutableMapping

import torch

from lumina_ds.engine.deepspeed.log_level import NOTHING, deepspeed_log_level
from lumina_ds.errors import ConfigError

# NVIDIA's driver, AMD's, and Windows' below Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def name_accelerator(environment: MutableMapping[str, str], device: str | None = None) -> None:
    """Name DeepSpeed's accelerator, before it is imported with this environment: it neither searches nor warns then.

    It is `device`, or else what the user has named, or else this machine's.
    """
    if device is not None:
        environment["DS_ACCELERATOR"] = device
    environment.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def planned_resources(arguments: list[str]) -> dict[str, list[int]]:
    """Slots by host, through the functions of deepspeed/launcher/runner.py that the runner itself uses."""
    return _read(arguments)[1]


def local_slots(arguments: list[str]) -> tuple[list[int] | None, bool]:
    """(slots that this host's ranks get, whether the arguments name slots); None where ssh or another launcher starts
    the ranks, this host's too."""
    parsed, hosts = _read(arguments)
    by_number = ":" in parsed.include + parsed.exclude
    if not parsed.no_ssh and (parsed.force_multi or len(hosts) > 1):
        return None, by_number
    node = parsed.node_rank if parsed.no_ssh else 0
    return (list(hosts.values())[node] if 0 <= node < len(hosts) else []), by_number


def _read(arguments: list[str]) -> tuple[Namespace, dict[str, list[int]]]:
    name_accelerator(os.environ)
    from deepspeed.launcher import runner

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = runner.parse_args([*arguments, "train.py"])
        pool = _hosts(parsed.hostfile, explicit=any(word.startswith(("--hostfile", "-H")) for word in arguments))
        active = runner.parse_inclusion_exclusion(pool, parsed.include, parsed.exclude)
        return parsed, runner.apply_num_nodes_and_gpus(active, parsed.num_nodes, parsed.num_gpus)
    except (ValueError, SystemExit) as error:
        # argparse prints its usage and, in the last line, the reason.
        reason = str(error) if isinstance(error, ValueError) else complaint.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"the deepspeed runner does not take {' '.join(arguments)}: {reason}") from error


def _hosts(hostfile: str, explicit: bool) -> dict[str, int]:
    from deepspeed.launcher import runner

    if not os.path.isfile(hostfile):
        if explicit:
            raise ConfigError(f"--hostfile {hostfile} does not exist; write one line `HOST slots=N` per machine")
        return {"localhost": num_local_devices()}
    try:
        # DeepSpeed logs on standard output, which may be waiting for a JSON document, what it then raises too.
        with deepspeed_log_level(NOTHING):
            return runner.fetch_hostfile(hostfile)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ConfigError(f"--hostfile {hostfile}: {reason}; write one line `HOST slots=N` per machine") from error


def num_local_devices() -> int:
    """GPUs of this machine, or 1 on a CPU."""
    return max(1, num_local_gpus())


def num_local_gpus() -> int:
    """GPUs of this machine that the environment lets this process see."""
    return torch.cuda.device_count()


def memory_of_rank(device: str, ranks_here: int) -> int:
    """Bytes that each of `ranks_here` ranks of this host may take: a GPU of their own, the smallest that there is, or an
    equal part of the host's memory."""
    if device == "cuda":
        return min(torch.cuda.get_device_properties(number).total_memory for number in range(num_local_gpus()))
    import psutil

    return int(psutil.virtual_memory().total) // max(1, ranks_here)


def may_have_gpus() -> bool:
    """Whether ranks could see a GPU with another environment: a driver is there, though this process may see none."""
    return num_local_gpus() > 0 or any(map(os.path.exists, _DRIVERS))


def is_amd() -> bool:
    """Whether this PyTorch drives AMD's GPUs."""
    return torch.version.hip is not None


def compatible_ops() -> dict[str, bool]:
    """Every op of DeepSpeed's by name, and whether it is there or could be built, as its own builder judges; nothing is
    compiled."""
    name_accelerator(os.environ)
    # The builders print their warnings.
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with deepspeed_log_level(), quiet[0], quiet[1]:
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        found = {name: bool(builder.is_compatible(verbose=False)) for name, builder in sorted(ALL_OPS.items())}
    return {name: usable for name, usable in found.items() if name != "deepspeed_not_implemented"}
