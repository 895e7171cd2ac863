"""How a CPU multiplies matrices fastest: in which type those of bf16, and with which library those of fp32."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type to multiply tensors of `dtype` in: their own, but fp32 for bf16 on a CPU that is slow at it.

    Both add up in fp32, so results agree to the rounding of the output.
    """
    return torch.float32 if dtype == torch.bfloat16 and device == "cpu" and _fp32_is_faster() else dtype


def prefer_onednn() -> bool:
    """Let oneDNN multiply fp32 matrices on AMD's CPUs without AVX-512, where MKL takes 1.5 to 2.3 times as long; whether
    it does.

    "medium" is what chooses oneDNN, and would also allow it to round to bf16. A product shows that it does not: the
    two libraries agree to 4e-7 where it stays in fp32, and bf16 would differ by 2e-3. On Intel's CPUs MKL is faster.
    On AMD's with AVX-512 oneDNN saves 4 % of a step, and keeps copies of its operands: a quarter more memory.
    """
    found = _capabilities()
    if "AMD" not in str(found.get("cpu_name")) or found.get("avx512_f"):
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    before, expected = torch.get_float32_matmul_precision(), left @ right
    torch.set_float32_matmul_precision("medium")
    exact = float((left @ right - expected).norm() / expected.norm()) < 1e-5
    if not exact:
        torch.set_float32_matmul_precision(before)
    return exact


@lru_cache(maxsize=1)
def _fp32_is_faster() -> bool:
    """By kind of CPU, not by timing, so that a run computes alike each time it starts.

    Measured on an Intel Xeon without AMX: 82 GFLOP/s in bf16, by instructions made for it, 150 in fp32. With AMX, and
    with the instructions of AMD's CPUs, bf16 is the faster one.
    """
    found = _capabilities()
    if found.get("architecture") != "x86_64" or found.get("amx_bf16"):
        return False
    return not found.get("avx512_bf16") or "Intel" in str(found.get("cpu_name"))


def _capabilities() -> dict[str, Any]:
    """What torch knows about this CPU; nothing before torch has the function."""
    return getattr(torch.cpu, "get_capabilities", dict)()
