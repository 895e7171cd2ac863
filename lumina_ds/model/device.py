"""What this process computes on: a CUDA GPU if there is one, else the CPU, and the precision that fits it."""

from __future__ import annotations

import torch

from lumina_ds.config.precision import resolve_precision


def device_and_precision(requested: str) -> tuple[str, str, str]:
    """(cuda or cpu, precision, one sentence on why); raises MachineError for what the machine cannot do."""
    if not torch.cuda.is_available():
        return "cpu", *resolve_precision(requested, "cpu", False)
    # Without the flag older cards count too, which only emulate bf16, slowly.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "cuda", *resolve_precision(requested, "cuda", bf16)
