"""Muon of DeepSpeed (deepspeed/runtime/zero/muon): which parameters it takes, and its kernels without a compiler.

Muon orthogonalises a matrix's momentum, so each of its updates has the same size whatever the gradient's
(https://kellerjordan.github.io/posts/muon/). It takes the hidden matrices and, each on its own, the experts.
Embedding, head, router and norms stay with AdamW.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import nn

from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.schema import TrainConfig
from lumina_ds.config.tensors import parameter_tensors
from lumina_ds.engine.deepspeed.changes import Need, existing, replace
from lumina_ds.errors import MachineError
from lumina_ds.model.transformer import CausalLM

_KERNELS = ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz", "muon_update")
NEEDS = (
    *(Need(f"deepspeed.runtime.zero.muon.original_muon:{name}") for name in _KERNELS),
    Need("deepspeed:DeepSpeedEngine._muon_param_groups", contains="use_muon"),
)


def muon_groups(model: CausalLM, train: TrainConfig) -> list[dict[str, Any]]:
    """Groups for DeepSpeed's Muon, whose parameters are marked for one half or the other.

    Decay is decoupled: a step takes off rate x weight_decay. Muon's rate is far above AdamW's, so its weight_decay
    is lowered by their ratio, and every matrix decays alike.
    """
    own_kinds = OPTIMIZERS[train.optimizer].own_kinds
    takes = {tensor.name: tensor.kind in own_kinds for tensor in parameter_tensors(model.config)}
    parts: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        parameter.use_muon = takes[name]  # type: ignore[attr-defined]
        part = "muon" if takes[name] else "decay" if parameter.dim() > 1 else "no_decay"
        parts[part].append(parameter)
    decay = {"muon": train.weight_decay / train.muon_rate_factor, "decay": train.weight_decay, "no_decay": 0.0}
    return [{"name": part, "params": params, "weight_decay": decay[part]} for part, params in parts.items() if params]


def use_plain_kernels(device: str) -> None:
    """Undo DeepSpeed's torch.compile of Muon's kernels on a CPU, and where no compiler is there.

    They would be compiled in the first step, for every shape once more, which takes minutes on a CPU.
    """
    if device == "cuda" and any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return
    from deepspeed.runtime.zero.muon import original_muon

    for name in _KERNELS:
        kernel = existing(original_muon, name)
        # Where torch keeps what it compiles (torch/_dynamo/eval_frame.py).
        plain = getattr(kernel, "_torchdynamo_orig_callable", kernel)
        if plain.__code__.co_filename != original_muon.__file__:
            raise MachineError(f"torch {torch.__version__} hides DeepSpeed's {name} behind torch.compile; use adamw")
        replace(original_muon, name, plain)
