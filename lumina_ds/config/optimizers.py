"""The optimizers: what DeepSpeed is told about each, where it runs, and what a plan counts for its states.

To add one that DeepSpeed or torch.optim knows by name, add an entry to OPTIMIZERS; `train.optimizer` then takes its
name, and engine, checkpoints and plan follow the entry.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# DeepSpeed's argument -> the fields of `train` that give it; several make a list.
_ADAM_PARAMS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
}


def _none(stage: int, offload: str) -> str | None:
    return None


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    type: its name in DeepSpeed's `optimizer.type`, which is also that of a class of torch.optim, or DeepSpeed's own.
    params: argument -> the fields of `train` that give it. fixed: further arguments that must have these values.
        proposed: those that a user's file may set otherwise.
    is_tested: whether DeepSpeed takes it together with ZeRO unasked (runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS);
        else `zero_allow_untested_optimizer` is set.
    moment_bytes: of all its fp32 states together, for each element that it steps. step_bytes: of what one step makes
        beside them, unless its kernel is fused.
    own_kinds: kinds of tensors (config/tensors.py) whose matrices have Muon's rule, and one momentum of whole matrices
        as wide as a gradient; `moment_bytes` are then those of the rest.
    clips: whether gradients are clipped at train.max_grad_norm. stages: ZeRO stages that it may take by itself.
    obstacle(stage, offload device): why it cannot run, or None.
    """

    type: str
    params: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    proposed: Mapping[str, Any] = field(default_factory=dict)
    is_tested: bool = True
    moment_bytes: int = 8
    step_bytes: int = 8
    own_kinds: tuple[str, ...] = ()
    clips: bool = True
    stages: tuple[int, ...] = (0, 1, 2, 3)
    obstacle: Callable[[int, str], str | None] = _none


def _of_cpu_adam(stage: int, offload: str) -> str | None:
    if offload not in ("cpu", "nvme"):
        return "--optimizer cpu_adam runs on states in host memory; add --offload optimizer, or use --optimizer adamw"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return (
            "--optimizer cpu_adam is built on its first use, and this machine has no C++ compiler (c++, g++ or "
            "clang++); install one, or use --optimizer adamw, which is as fast"
        )
    return None


def _of_muon(stage: int, offload: str) -> str | None:
    if stage not in (1, 2):
        reason = (
            "DeepSpeed then refuses the reduce_scatter that experts need"
            if stage == 3
            else "no ZeRO optimizer shields its momentum from a non-finite gradient"
        )
        return f"--optimizer muon with ZeRO-{stage} is not possible: {reason}; use --zero 1 or --zero 2"
    if offload in ("cpu", "nvme"):
        return "--optimizer muon with offloaded optimizer states is untested and refused; use --optimizer adamw"
    return None


OPTIMIZERS: dict[str, Optimizer] = {
    # torch's AdamW needs no compiler, and its fused kernel is the fastest of the choices on a CPU too.
    "adamw": Optimizer("AdamW", _ADAM_PARAMS, proposed={"torch_adam": True, "fused": True}),
    "cpu_adam": Optimizer("AdamW", _ADAM_PARAMS, fixed={"torch_adam": False}, obstacle=_of_cpu_adam),
    # DeepSpeed clips what Muon has made of the gradients, whose size does not depend on theirs: it would only lower the
    # learning rate.
    "muon": Optimizer(
        "Muon",
        {**_ADAM_PARAMS, "muon_lr": ("muon_learning_rate",), "momentum": ("muon_momentum",)},
        proposed={"torch_adam": True},
        own_kinds=("attention", "shared_experts", "dense_feed_forward", "experts"),
        clips=False,
        stages=(1, 2),
        obstacle=_of_muon,
    ),
}
