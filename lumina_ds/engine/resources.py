"""What there is to run on, as DeepSpeed sees it: hosts and devices that its runner will use, and ops it could build."""

from __future__ import annotations

import contextlib
import io
import os
from argparse import Namespace
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from lumina_ds.engine.deepspeed.log_level import deepspeed_log_level
from lumina_ds.engine.hostfile import check_filter, read_hostfile
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted

# NVIDIA's driver, AMD's, and Windows' below Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# DeepSpeed's launchers for several hosts, with the program that each needs here (multinode_runner.py, backend_exists).
LAUNCHERS = {
    "pdsh": "pdsh", "openmpi": "ompi_info", "mpich": "mpirun", "impi": "mpirun", "slurm": "sinfo", "mvapich": "mpiname",
}  # fmt: skip
# By DeepSpeed's parser, for --num_nodes and --num_gpus.
_NOT_GIVEN = -1


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
    return list(hosts.values())[parsed.node_rank if parsed.no_ssh else 0], by_number


def hosts_over_ssh(arguments: list[str]) -> RemoteHosts | None:
    """Whom the runner will start ranks on, or test, by ssh; None where it does neither."""
    parsed, hosts = _read(arguments)
    if parsed.no_ssh or not os.path.isfile(parsed.hostfile):
        return None
    several = parsed.force_multi or len(hosts) > 1
    # The runner tests ssh even for a hostfile of one host (deepspeed/launcher/runner.py, main).
    tested = [] if parsed.no_ssh_check else list(hosts) if several else list(hosts)[:1]
    asked = None if parsed.master_addr else next(iter(hosts))
    return RemoteHosts(tuple(tested), parsed.launcher.lower() if several else None, parsed.ssh_port, asked)


@dataclass(frozen=True)
class RemoteHosts:
    """`hosts` that ssh must reach, `launcher` that starts ranks on them (None: none does), `port` of ssh if not its own,
    and the host that is `asked` for its address, if any."""

    hosts: tuple[str, ...]
    launcher: str | None
    port: int | None
    asked: str | None


def _read(arguments: list[str]) -> tuple[Namespace, dict[str, list[int]]]:
    name_accelerator(os.environ)
    from deepspeed.launcher import runner

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = runner.parse_args([*arguments, "train.py"])
        pool = _hosts(parsed.hostfile, explicit=parsed.hostfile != runner.DLTS_HOSTFILE)
        _check(parsed, pool)
        active = runner.parse_inclusion_exclusion(pool, parsed.include, parsed.exclude)
        hosts = runner.apply_num_nodes_and_gpus(active, parsed.num_nodes, parsed.num_gpus)
    except (ValueError, SystemExit) as error:
        # argparse prints its usage and, in the last line, the reason.
        reason = str(error) if isinstance(error, ValueError) else complaint.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"the deepspeed runner does not take {' '.join(arguments)}: {reason}") from error
    if not hosts:
        raise ConfigError(f"--exclude {parsed.exclude} leaves no slot of any host; leave one out")
    if parsed.no_ssh and not 0 <= parsed.node_rank < len(hosts):
        raise ConfigError(
            f"--node_rank {parsed.node_rank} is none of the {counted(len(hosts), 'host')}; with --no_ssh, count the "
            "hostfile's hosts from 0"
        )
    return parsed, hosts


def _hosts(hostfile: str, explicit: bool) -> dict[str, int]:
    # Without --hostfile DeepSpeed still reads its default, /job/hostfile, where there is one.
    if explicit or os.path.isfile(hostfile):
        return read_hostfile(hostfile)
    return {"localhost": num_local_devices()}


def _check(parsed: Namespace, hosts: dict[str, int]) -> None:
    """Refuse what DeepSpeed would end on with a traceback, or would pass over."""
    if parsed.include and parsed.exclude:
        raise ConfigError("--include and --exclude exclude one another; give one of them")
    for option, text in (("--include", parsed.include), ("--exclude", parsed.exclude)):
        check_filter(option, text, hosts)
    for option, number in (("--num_nodes", parsed.num_nodes), ("--num_gpus", parsed.num_gpus)):
        if number == _NOT_GIVEN:
            continue
        if number < 1:
            raise ConfigError(f"{option} {number} starts nothing; give 1 or more, or leave it out")
        if parsed.include or parsed.exclude:
            raise ConfigError(f"{option} goes with neither --include nor --exclude; leave one of them out")
    if parsed.num_nodes > len(hosts):
        raise ConfigError(
            f"--num_nodes {parsed.num_nodes} are more than the {counted(len(hosts), 'host')}; see --hostfile"
        )
    if not 0 < parsed.master_port < 65536:
        raise ConfigError(f"--master_port {parsed.master_port} is no port; give a free one, 1024 to 65535")
    if parsed.launcher.lower() not in LAUNCHERS:
        raise ConfigError(f"--launcher {parsed.launcher} is none of {', '.join(LAUNCHERS)}; choose one")


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
