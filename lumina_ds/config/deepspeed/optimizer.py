"""The `optimizer` section of the DeepSpeed JSON: AdamW of torch, AdamW of DeepSpeed's CPU kernel, or Muon."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from lumina_ds.config.deepspeed.tree import AUTO, Merger, section_of, value_at
from lumina_ds.config.schema import RunConfig, TrainConfig

_HALF_PRECISION = ("bf16", "fp16")
_TYPES = {"adamw": "AdamW", "cpu_adam": "AdamW", "muon": "Muon"}


def merge_optimizer(merger: Merger, config: RunConfig, stage: int, precision: str) -> None:
    """Write optimizer and clipping of the run into a user's file."""
    train = config.train
    name = _TYPES[train.optimizer]
    _merge_clipping(merger, train, stage, precision)
    kind = section_of(merger.merged, "optimizer").get("type", AUTO)
    merger.impose("optimizer.type", kind if str(kind).lower() == name.lower() else name, "train.optimizer")
    merger.impose("optimizer.params.lr", train.learning_rate, "--learning-rate")
    merger.impose("optimizer.params.betas", [train.adam_beta1, train.adam_beta2], "train.adam_beta1, adam_beta2")
    merger.impose("optimizer.params.eps", train.adam_epsilon, "train.adam_epsilon")
    merger.impose("optimizer.params.weight_decay", train.weight_decay, "--weight-decay")
    if train.optimizer == "cpu_adam":
        merger.impose("optimizer.params.torch_adam", False, "--optimizer cpu_adam")
        return
    # torch's AdamW needs no compiler, and its fused kernel is the fastest of the choices on a CPU too.
    merger.propose("optimizer.params.torch_adam", True)
    if train.optimizer == "muon":
        merger.impose("optimizer.params.muon_lr", train.muon_learning_rate, "train.muon_learning_rate")
        merger.impose("optimizer.params.momentum", train.muon_momentum, "train.muon_momentum")
    elif merger.merged["optimizer"]["params"]["torch_adam"]:
        merger.propose("optimizer.params.fused", True)


def optimizer_faults(train: TrainConfig, json: Mapping[str, Any]) -> list[str]:
    """Why this optimizer cannot run with this stage, offload and machine."""
    stage = value_at(json, "zero_optimization.stage")
    offloaded = value_at(json, "zero_optimization.offload_optimizer.device", "none")
    if train.optimizer == "muon" and stage not in (1, 2):
        reason = (
            "DeepSpeed then refuses the reduce_scatter that experts need"
            if stage == 3
            else "no ZeRO optimizer shields its momentum from a non-finite gradient"
        )
        return [f"--optimizer muon with ZeRO-{stage} is not possible: {reason}; use --zero 1 or --zero 2"]
    if train.optimizer == "muon" and offloaded in ("cpu", "nvme"):
        return ["--optimizer muon with offloaded optimizer states is untested and refused; use --optimizer adamw"]
    if train.optimizer == "cpu_adam" and offloaded not in ("cpu", "nvme"):
        return ["--optimizer cpu_adam runs on states in host memory; add --offload optimizer, or use --optimizer adamw"]
    if train.optimizer == "cpu_adam" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return [
            "--optimizer cpu_adam is built on its first use, and this machine has no C++ compiler (c++, g++ or "
            "clang++); install one, or use --optimizer adamw, which is as fast"
        ]
    return []


def _merge_clipping(merger: Merger, train: TrainConfig, stage: int, precision: str) -> None:
    if train.optimizer == "muon":
        # DeepSpeed clips what Muon has made of the gradients, whose size does not depend on theirs: it would only
        # lower the learning rate.
        merger.impose("gradient_clipping", 0.0, "--optimizer muon, which does not clip")
        return
    merger.impose("gradient_clipping", train.max_grad_norm, "--max-grad-norm")
    if stage == 0 and precision not in _HALF_PRECISION:
        # DeepSpeed reports no gradient norm here, so the trainer clips and must be the only one that does.
        merger.merged["gradient_clipping"] = 0.0
