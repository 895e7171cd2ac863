"""Which fused kernels a run computes with, and why: by name, or all that can run here and compute what ours do."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import get_args

import torch

from lumina_ds.config.compile import choose_compile
from lumina_ds.config.schema import FusedKernel, RunConfig
from lumina_ds.engine.fused_check import check_kernel
from lumina_ds.errors import MachineError
from lumina_ds.model import fused_kernels
from lumina_ds.model.kernels import PLAIN, Kernels

_LIGER = {
    "rms_norm": fused_kernels.liger_rms_norm,
    "rope": fused_kernels.liger_rope,
    "swiglu": fused_kernels.liger_swiglu,
    "cross_entropy": fused_kernels.liger_cross_entropy,
}


@dataclass(frozen=True)
class KernelChoice:
    """`names` are the fused kernels of a run, `kernels` what its model computes with, `reason` a sentence for the log.

    `combine` is no part of the model: engine/deepspeed/expert_parallel.py sets it in DeepSpeed's layers.
    """

    names: tuple[str, ...]
    kernels: Kernels
    reason: str


def choose_kernels(config: RunConfig, device: str, precision: str, compares: bool = True) -> KernelChoice:
    """The fused kernels for training on "cuda" or "cpu" in a resolved precision.

    `compares`: each is run beside ours on the device first (fused_check.py), a few seconds of compilation. Raises MachineError where one that was asked for cannot run or computes something else, with the difference.
    """
    asked = config.train.fused_kernels
    if asked == "off":
        return KernelChoice((), PLAIN, "none, because of train.fused_kernels off")
    if asked == "auto" and device == "cpu":
        return KernelChoice((), PLAIN, "none, because they are for CUDA GPUs")
    if asked == "auto" and choose_compile(config, device)[0]:
        return KernelChoice((), PLAIN, "none, because torch.compile fuses by itself")
    names = [name for name in get_args(FusedKernel) if asked in ("auto", "on") or name in asked]
    used = [name for name in names if _has_use(name, config)]
    obstacles = {name: _obstacle(name, device) for name in used}
    if compares:
        runnable = [name for name in used if obstacles[name] is None]
        obstacles |= {name: check_kernel(name, config.model, precision, torch.device(device)) for name in runnable}
    lacking = {name: obstacle for name, obstacle in obstacles.items() if obstacle is not None}
    if asked != "auto" and lacking:
        [(name, obstacle), *_] = lacking.items()
        raise MachineError(
            f"the fused kernel {name} is not possible: {obstacle}; use train.fused_kernels auto, off, or others"
        )
    chosen = tuple(name for name in used if name not in lacking)
    kernels = replace(PLAIN, **{name: _LIGER[name] for name in chosen if name in _LIGER})
    return KernelChoice(chosen, kernels, _reason(chosen, lacking, compares))


def _reason(chosen: tuple[str, ...], lacking: dict[str, str], compared: bool) -> str:
    by_obstacle: dict[str, list[str]] = {}
    for name, obstacle in lacking.items():
        by_obstacle.setdefault(obstacle, []).append(name)
    plain = [f"{', '.join(names)} plain: {obstacle}" for obstacle, names in by_obstacle.items()]
    if not chosen:
        return "; ".join(["none", *plain])
    state = "which compute here what plain PyTorch does" if compared else "if they prove equal to ours at the start"
    return "; ".join([f"{', '.join(chosen)}, {state}", *plain])


def _has_use(name: str, config: RunConfig) -> bool:
    """Whether the model has what a kernel computes. DeepSpeed's experts have a fused SwiGLU of their own."""
    model = config.model
    has_dense = not all(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))
    if name == "cross_entropy":
        return config.train.may_fuse_loss
    return {"swiglu": has_dense or model.num_shared_experts > 0, "combine": model.num_experts > 0}.get(name, True)


def _obstacle(name: str, device: str) -> str | None:
    """Why a kernel cannot run here, or None."""
    if device != "cuda" and (name == "combine" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"it needs a CUDA GPU and this run is on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if name in _LIGER and importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'lumina-ds[fused]')"
    return None
