"""Which library multiplies fp32 matrices on which CPU."""

import pytest
import torch

from lumina_ds.model import cpu_products


@pytest.fixture(autouse=True)
def _precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("found", [{"cpu_name": "Intel Xeon"}, {}, {"cpu_name": "AMD EPYC", "avx512_f": True}])
def test_other_cpus_keep_what_they_have(monkeypatch, found):
    monkeypatch.setattr(cpu_products, "_capabilities", lambda: found)
    assert not cpu_products.prefer_onednn()
    assert torch.get_float32_matmul_precision() == "highest"


def test_amd_takes_onednn_only_where_it_stays_in_fp32(monkeypatch):
    monkeypatch.setattr(cpu_products, "_capabilities", lambda: {"cpu_name": "AMD EPYC"})
    left, right = torch.randn(64, 300), torch.randn(300, 64)
    exact = left.double() @ right.double()
    taken = cpu_products.prefer_onednn()
    # Either way: what is set now multiplies to fp32's accuracy on the CPU that this runs on.
    assert torch.get_float32_matmul_precision() == ("medium" if taken else "highest")
    assert float(((left @ right).double() - exact).norm() / exact.norm()) < 1e-5


def test_a_product_that_rounds_to_bf16_is_not_taken(monkeypatch):
    monkeypatch.setattr(cpu_products, "_capabilities", lambda: {"cpu_name": "AMD EPYC"})
    multiply = torch.Tensor.__matmul__

    def rounding(left, right):
        if torch.get_float32_matmul_precision() == "medium":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return multiply(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not cpu_products.prefer_onednn()
    assert torch.get_float32_matmul_precision() == "highest"
