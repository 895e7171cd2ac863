"""What this process computes on: a CUDA GPU if there is one, else the CPU, and the precision that fits it."""

from __future__ import annotations

import torch

from lumina_ds.config.precision import resolve_precision
from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import num_parameters


def device_and_precision(requested: str, model: ModelConfig | None = None) -> tuple[str, str, str]:
    """(cuda or cpu, precision, one sentence on why); raises MachineError for what the machine cannot do.

    `auto` also goes by the size of a `model` that is to be trained.
    """
    if not torch.cuda.is_available():
        return "cpu", *resolve_precision(requested, "cpu", False)
    # Without the flag older cards count too, which only emulate bf16, slowly.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = torch.cuda.get_device_capability() if requested == "auto" else None
    size = None if model is None else num_parameters(model)
    return "cuda", *resolve_precision(requested, "cuda", bf16, size, capability)
