"""What a run computes with, where machine or model decides: precision, torch.compile, tokens of a loss chunk."""

from __future__ import annotations

import shutil
from typing import get_args

from lumina_ds.config.schema import Precision, RunConfig
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.text import format_bytes

PRECISIONS: tuple[str, ...] = get_args(Precision)
# Below so many parameters, fp32 weights and gradients cost less than half a gigabyte more.
_SMALL_MODEL = 100_000_000
# Tensor cores for fp16 begin here; older cards compute fp16 no faster, some far slower.
_FP16_CAPABILITY = (7, 0)
# 2^25 logits are 128 MiB in fp32. Fewer than 1024 tokens make poor matrix products on a GPU, and add the weight's
# gradient up too often.
_CHUNK_LOGITS = 1 << 25
_MIN_CHUNK_TOKENS = 1024


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


def choose_compile(config: RunConfig, device: str) -> tuple[bool, str]:
    """(compile or not, one sentence that says why) on cuda or cpu; `auto` is on only where it works and may gain.

    `on` is taken at its word: what it cannot do is refused by config/checks.py, device_faults.
    """
    asked = config.train.compile
    if asked != "auto":
        return asked == "on", f"torch.compile is {asked} as asked"
    if device == "cpu":
        return False, "torch.compile is off: on a CPU every new arrangement of documents would be compiled anew"
    if config.model.num_experts:
        return False, "torch.compile is off: the dispatch to experts reads their loads on the host, which breaks graphs"
    if config.deepspeed.sequence_parallel_size > 1:
        return False, "torch.compile is off: it cannot trace the exchange of heads between ranks that share rows"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return False, "torch.compile is off: its Triton kernels need a C compiler (cc, gcc or clang), and there is none"
    return True, "torch.compile is on: a dense model on a GPU, with a compiler at hand"


def loss_chunk_tokens(requested: int | None, vocab_size: int) -> int:
    """Tokens of a chunk: `requested`, where 0 stands for all at once, or by the vocabulary when None."""
    return max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size) if requested is None else requested


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
