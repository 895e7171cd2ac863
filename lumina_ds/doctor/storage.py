"""Checks of memory, disks, shared memory, leftovers of killed runs, and limits of the shell and the network."""

from __future__ import annotations

import locale
import os
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

from lumina_ds.doctor.devices import gpus
from lumina_ds.doctor.finding import Finding, Surroundings
from lumina_ds.engine.launchers import read_launch
from lumina_ds.engine.world import free_port
from lumina_ds.errors import MachineError
from lumina_ds.files import cache_folder
from lumina_ds.text import GIB, counted, format_bytes

_STALE_SECONDS = 600
# `debug` needs about half a GiB per rank; less than one GiB runs nothing.
_MEMORY_FAULT, _MEMORY_WARNING = 1 * GIB, 4 * GIB
_DISK_FAULT, _DISK_WARNING = GIB // 10, 10 * GIB
_SHARED_WARNING = 1 * GIB
_OPEN_FILES = 4096
LEFTOVERS = "deepspeed_allreduce_buffer_*"
_DEFAULT_PORT = 29500


def memory(around: Surroundings) -> Finding:
    import psutil  # here, so that a machine without it still gets its other lines

    available, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _memory_limit()
    if limit is not None and limit < total:
        total, available = limit, min(available, limit)
    says = f"{format_bytes(available)} of {format_bytes(total)} available"
    remedy = "end other programs; lumina plan says what a run needs"
    if available < _MEMORY_FAULT:
        return Finding("memory", "fault", says, remedy)
    if available < _MEMORY_WARNING:
        return Finding("memory", "warning", f"{says}: room for the smallest presets only", remedy)
    return Finding("memory", "ok", says)


def runs_disk(around: Surroundings) -> Finding:
    """The disk that checkpoints go to."""
    folder = around.runs_dir.resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return _disk("disk of runs", existing, "set --runs-dir to a folder with room", full_is_fault=True)


def temporary_disk(around: Surroundings) -> Finding:
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        return Finding("temporary disk", "fault", f"no folder can be written: {error.strerror}", "set TMPDIR")
    return _disk("temporary disk", folder, "clear it, or set TMPDIR to a folder with room", full_is_fault=False)


def shared_memory(around: Surroundings) -> Finding:
    """Ranks of one machine exchange tensors through it; killed runs of DeepSpeed leave buffers behind."""
    folder = around.shared_memory
    try:
        free = shutil.disk_usage(folder).free
        left = [path for path in folder.glob(LEFTOVERS) if path.is_file()]
        size = sum(path.stat().st_size for path in left)
    except OSError as error:
        remedy = "mount a tmpfs there (docker: --shm-size 8g)"
        return Finding("shared memory", "warning", f"{folder} cannot be used: {error.strerror}", remedy)
    says = f"{format_bytes(free)} free in {folder}"
    if left:
        shown = f"{says}; {counted(len(left), 'buffer')} left by DeepSpeed, {format_bytes(size)}"
        remedy = f"when nothing trains: rm {folder}/{LEFTOVERS}"
        return Finding("shared memory", "warning", shown, remedy, tuple(map(str, left)))
    if free < _SHARED_WARNING:
        remedy = "give more (docker: --shm-size 8g), or NCCL may fail between GPUs"
        return Finding("shared memory", "warning", says, remedy)
    return Finding("shared memory", "ok", says)


def extension_locks(around: Surroundings) -> Finding:
    """A build of an op that was killed leaves a lock, and later ranks wait on it without a word."""
    locks = {lock for folder in extension_folders(around) for lock in folder.glob("**/lock") if lock.is_file()}
    stale = sorted(str(lock) for lock in locks if time.time() - lock.stat().st_mtime > _STALE_SECONDS)
    if stale:
        says = f"{counted(len(stale), 'lock')} of builds that have ended: {stale[0]}"
        return Finding("extension locks", "warning", says, f"when nothing builds: rm {' '.join(stale)}", tuple(stale))
    if locks:
        return Finding("extension locks", "ok", "an op is being built now", details=tuple(map(str, sorted(locks))))
    return Finding("extension locks", "ok", "none")


def extension_folders(around: Surroundings) -> list[Path]:
    """Where ops are built: the folder that the environment names, ours, and PyTorch's own."""
    cache = cache_folder(around.environment)
    named = around.environment.get("TORCH_EXTENSIONS_DIR")
    return [*([Path(named)] if named else []), cache / "lumina-ds", cache / "torch_extensions"]


def ports(around: Surroundings) -> Finding:
    """A free port on the loopback, and whether DeepSpeed's fixed default is taken."""
    try:
        port = free_port()
    except OSError as error:
        return Finding("ports", "fault", f"none can be opened: {error.strerror}", "check the loopback interface")
    with socket.socket() as probe:
        probe.settimeout(0.5)
        taken = probe.connect_ex(("127.0.0.1", _DEFAULT_PORT)) == 0
    if taken:
        says = f"{_DEFAULT_PORT}, the default of launchers, is in use; {port} is free"
        return Finding("ports", "warning", says, "give --master_port where a launcher chooses none (lumina train does)")
    return Finding("ports", "ok", f"{_DEFAULT_PORT} and {port} are free")


def host_name(around: Surroundings) -> Finding:
    """gloo looks up the name of its own host."""
    name = socket.gethostname()
    status, shown, _ = around.run(["getent", "hosts", name])
    if status in (2, 124):
        says = f"{name} does not resolve, and gloo looks it up"
        return Finding("host name", "warning", says, f"add {name} to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo")
    return Finding("host name", "ok", name, details=(shown,) if shown else ())


def launcher_variables(around: Surroundings) -> Finding:
    """Variables left in a shell make a run believe that a launcher started it."""
    try:
        launch = read_launch(around.environment)
    except MachineError as error:
        says, _, remedy = str(error).rpartition("; ")
        return Finding("launcher variables", "fault", says, remedy)
    if launch is not None:
        says = f"set: a run started here takes itself for rank {launch.rank} of {launch.size}"
        remedy = "fine below srun, mpirun or torchrun; else unset RANK LOCAL_RANK WORLD_SIZE"
        return Finding("launcher variables", "warning", says, remedy)
    return Finding("launcher variables", "ok", "none set")


def limits(around: Surroundings) -> Finding:
    """Open files, and memory that may be locked where InfiniBand wants it."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files != resource.RLIM_INFINITY and files < _OPEN_FILES:
        return Finding("limits", "warning", f"only {files:,} open files", "ulimit -n 65536")
    if locked != resource.RLIM_INFINITY and gpus(around) and Path("/sys/class/infiniband").exists():
        says = f"only {format_bytes(locked)} of locked memory, and InfiniBand wants all"
        return Finding("limits", "warning", says, "ulimit -l unlimited (docker: --ulimit memlock=-1)")
    shown = "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}"
    return Finding("limits", "ok", f"{shown} open files")


def text_encoding(around: Surroundings) -> Finding:
    encoding = locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") != "utf8":
        return Finding("locale", "warning", f"{encoding}: chats may not be printable", "export LANG=C.UTF-8")
    return Finding("locale", "ok", encoding)


def _disk(name: str, folder: Path, remedy: str, full_is_fault: bool) -> Finding:
    free = shutil.disk_usage(folder).free
    says = f"{format_bytes(free)} free in {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(name, "fault" if full_is_fault else "warning", f"{folder} cannot be written", remedy)
    if free < _DISK_FAULT and full_is_fault:
        return Finding(name, "fault", says, remedy)
    if free < _DISK_WARNING:
        return Finding(name, "warning", says, remedy)
    return Finding(name, "ok", says)


def _memory_limit() -> int | None:
    """The limit of the control group in bytes, None without one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None
