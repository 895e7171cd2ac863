"""Every card by the names that people, drivers and cloud consoles write."""

from __future__ import annotations

import pytest

from lumina_ds.errors import ConfigError
from lumina_ds.plan.hardware import GPUS, card_of_device, find_gpu

DRIVERS = {
    "Tesla T4": "t4-16",
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-SXM2-32GB": "v100-32",
    "NVIDIA L4": "l4-24",
    "NVIDIA A10": "a10-24",
    "NVIDIA A10G": "a10g-24",
    "NVIDIA A30": "a30-24",
    "NVIDIA A40": "a40-48",
    "NVIDIA L40": "l40-48",
    "NVIDIA L40S": "l40s-48",
    "NVIDIA RTX A6000": "a6000-48",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada-48",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtxpro6000-96",
    "NVIDIA GeForce RTX 3090": "rtx3090-24",
    "NVIDIA GeForce RTX 4090": "rtx4090-24",
    "NVIDIA GeForce RTX 5090": "rtx5090-32",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA A800-SXM4-80GB": "a800-80",
    "NVIDIA H100 80GB HBM3": "h100-80",
    "NVIDIA H100 PCIe": "h100pcie-80",
    "NVIDIA H100 NVL": "h100nvl-94",
    "NVIDIA H800": "h800-80",
    "NVIDIA H20": "h20-96",
    "NVIDIA H200": "h200-141",
    "NVIDIA GH200 480GB": "gh200-96",
    "NVIDIA B200": "b200-192",
    "NVIDIA GB200": "gb200-186",
    "NVIDIA B300 SXM6 AC": "b300-288",
    "AMD Instinct MI250X": "mi250x-64",
    "AMD Instinct MI300X": "mi300x-192",
    "AMD Instinct MI325X": "mi325x-256",
    "AMD Instinct MI355X": "mi355x-288",
}


def test_every_card_has_a_drivers_name_here() -> None:
    assert set(DRIVERS.values()) == {gpu.name for gpu in GPUS}


@pytest.mark.parametrize("name", DRIVERS)
def test_a_drivers_name(name: str) -> None:
    assert find_gpu(name).name == DRIVERS[name]
    found = card_of_device(name, find_gpu(name).usable_bytes)
    assert found is not None and found.name == DRIVERS[name]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_names_that_people_write(gpu: object) -> None:
    names = [gpu.name, gpu.name.upper(), gpu.name.replace("-", " "), f"{gpu.name}GB"]
    if sum(other.model == gpu.model for other in GPUS) == 1:
        names.append(gpu.model)
    for name in names:
        assert find_gpu(name) is gpu, name
    assert 0.9 * gpu.memory_gb < gpu.usable_gib <= gpu.memory_gb  # GiB are larger than GB; ECC and the driver take some


def test_the_published_figures_of_some() -> None:
    """Dense 16-bit rates and sizes, each from its maker's data sheet."""
    published = {
        "a100-80": 312,
        "h100-80": 989.4,
        "h100pcie-80": 756,
        "mi300x-192": 1307.4,
        "t4-16": 65,
        "l40s-48": 362,
    }
    assert all(abs(find_gpu(name).tflops - tflops) < 1 for name, tflops in published.items())
    assert not find_gpu("t4").bf16 and not find_gpu("v100-16").bf16 and find_gpu("mi250x").bf16


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM-64GB", "H1000", "Radeon"])
def test_a_card_that_is_not_listed_is_not_guessed(name: str) -> None:
    with pytest.raises(ConfigError, match="is no known card"):
        find_gpu(name)
