"""Which precision a run trains in: what was asked, fitted to what the machine can do."""

from __future__ import annotations

from lumina_ds.errors import ConfigError, MachineError

PRECISIONS = ("auto", "fp32", "bf16", "mixed_bf16", "fp16")


def resolve_precision(requested: str, device: str, bf16_supported: bool) -> tuple[str, str]:
    """The precision to use and one sentence that says why.

    `device` is "cuda" or "cpu"; `bf16_supported` is asked of the GPU and does not matter on a CPU, where
    bf16 is emulated or native but always right. Raises MachineError for what the machine cannot do.
    """
    if requested not in PRECISIONS:
        raise ConfigError(f"precision {requested!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if requested == "auto":
        return _automatic(device, bf16_supported)
    if requested == "fp16" and device == "cpu":
        raise MachineError("fp16 is not possible on a CPU: DeepSpeed supports it on GPUs only; use fp32 or mixed_bf16")
    if requested in ("bf16", "mixed_bf16") and device == "cuda" and not bf16_supported:
        raise MachineError(f"{requested} needs a GPU of compute capability 8.0 or above; use fp16 or fp32")
    return requested, f"{requested} as requested"


def _automatic(device: str, bf16_supported: bool) -> tuple[str, str]:
    if device == "cpu":
        return "fp32", "fp32 because the run is on a CPU"
    if bf16_supported:
        return "bf16", "bf16 because the GPU supports it"
    return "fp16", "fp16 because the GPU has no bf16"
