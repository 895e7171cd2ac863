"""The table of precisions: what is asked, what the machine can, what is used."""

from __future__ import annotations

import re

import pytest

from lumina_ds.config.precision import resolve_precision
from lumina_ds.errors import ConfigError, MachineError


@pytest.mark.parametrize(
    ("requested", "device", "bf16_supported", "used"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("auto", "cpu", True, "fp32"),
        ("auto", "cpu", False, "fp32"),
        ("fp32", "cuda", True, "fp32"),
        ("bf16", "cpu", False, "bf16"),
        ("mixed_bf16", "cpu", False, "mixed_bf16"),
        ("mixed_bf16", "cuda", True, "mixed_bf16"),
        ("fp16", "cuda", False, "fp16"),
    ],
)
def test_precision(requested, device, bf16_supported, used):
    precision, reason = resolve_precision(requested, device, bf16_supported)
    assert precision == used
    assert reason.startswith(used)


@pytest.mark.parametrize(
    ("bf16_supported", "capability", "millions", "used", "why"),
    [
        (
            True,
            (9, 0),
            1200,
            "bf16",
            r"GPU \(compute capability 9.0\) supports it, and with 1,200.0 million parameters",
        ),
        (True, (8, 0), 100, "bf16", "memory counts"),
        (True, (8, 0), 99, "mixed_bf16", "in fp32 take 377.66 MiB more and round less"),
        (False, (7, 5), 1, "fp16", "fp16 with dynamic loss scaling"),
        (False, (7, 0), 5000, "fp16", "compute capability 7.0"),
        (False, (6, 1), 1, "fp32", "no tensor cores"),
    ],
)
def test_auto_goes_by_card_and_size(bf16_supported, capability, millions, used, why):
    precision, reason = resolve_precision("auto", "cuda", bf16_supported, millions * 10**6, capability)
    assert precision == used
    assert re.search(why, reason)


@pytest.mark.parametrize(
    ("requested", "device", "bf16_supported", "message"),
    [
        ("fp16", "cpu", True, "fp16 is not possible on a CPU.*use fp32 or mixed_bf16"),
        ("bf16", "cuda", False, "bf16 needs a GPU of compute capability 8.0 or above; use fp16 or fp32"),
        ("mixed_bf16", "cuda", False, "mixed_bf16 needs a GPU of compute capability"),
    ],
)
def test_what_the_machine_cannot(requested, device, bf16_supported, message):
    with pytest.raises(MachineError, match=message):
        resolve_precision(requested, device, bf16_supported)


def test_an_unknown_precision():
    with pytest.raises(ConfigError, match="precision 'fp8' is unknown"):
        resolve_precision("fp8", "cuda", True)
