"""Which precision a run trains in: what was asked, fitted to what the machine can do and to the model's size."""

from __future__ import annotations

from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.text import format_bytes

PRECISIONS = ("auto", "fp32", "bf16", "mixed_bf16", "fp16")
# Below so many parameters, fp32 weights and gradients cost less than half a gigabyte more.
_SMALL_MODEL = 100_000_000
# Tensor cores for fp16 begin here; older cards compute fp16 no faster, some far slower.
_FP16_CAPABILITY = (7, 0)


def resolve_precision(
    requested: str,
    device: str,
    bf16_supported: bool,
    num_parameters: int | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """The precision to use and one sentence that says why.

    `device` is "cuda" or "cpu"; `bf16_supported` is asked of the GPU and does not matter on a CPU, where
    bf16 is emulated or native but always right. `auto` goes by the GPU's compute `capability`, where it is known, and
    trains a small model with fp32 weights. Raises MachineError for what the machine cannot do.
    """
    if requested not in PRECISIONS:
        raise ConfigError(f"precision {requested!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if requested == "auto":
        return _automatic(device, bf16_supported, num_parameters, capability)
    if requested == "fp16" and device == "cpu":
        raise MachineError("fp16 is not possible on a CPU: DeepSpeed supports it on GPUs only; use fp32 or mixed_bf16")
    if requested in ("bf16", "mixed_bf16") and device == "cuda" and not bf16_supported:
        raise MachineError(f"{requested} needs a GPU of compute capability 8.0 or above; use fp16 or fp32")
    return requested, f"{requested} as requested"


def _automatic(
    device: str, bf16_supported: bool, num_parameters: int | None, capability: tuple[int, int] | None
) -> tuple[str, str]:
    if device == "cpu":
        return "fp32", "fp32 because the run is on a CPU"
    card = f"the GPU (compute capability {capability[0]}.{capability[1]})" if capability else "the GPU"
    size = f"{num_parameters / 1e6:,.1f} million parameters" if num_parameters is not None else ""
    if bf16_supported and num_parameters is not None and num_parameters < _SMALL_MODEL:
        more = f"weights and gradients in fp32 take {format_bytes(4 * num_parameters)} more and round less"
        return "mixed_bf16", f"mixed_bf16 because {card} supports bf16, and with {size} {more}"
    if bf16_supported:
        return "bf16", f"bf16 because {card} supports it" + (f", and with {size} memory counts" if size else "")
    if capability is not None and capability < _FP16_CAPABILITY:
        return "fp32", f"fp32 because {card} has no bf16, and no tensor cores that would make fp16 fast"
    return "fp16", f"fp16 with dynamic loss scaling because {card} has no bf16"
