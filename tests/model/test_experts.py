"""The two fast ways through the experts against the loop under autograd, forward and backward."""

import pytest
import torch

from lumina_ds.model import cpu_products
from lumina_ds.model.experts import Experts, RowPlan, experts_reference, mix_grouped, mix_on_cpu

TOKENS, EXPERTS, WIDTH, INNER = 30, 5, 16, 24
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
PATHS = {"cpu": mix_on_cpu, "grouped": mix_grouped}


def run(mix, dtype, top_k=2, weight_dtype=None, starved=None):
    """Output and all gradients, inputs alike for every `mix`; `starved` is an expert that gets nothing."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, upstream = draw(TOKENS, WIDTH).to(dtype).requires_grad_(), draw(TOKENS, WIDTH).to(dtype)
    shapes = ((EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER), (EXPERTS, INNER, WIDTH))
    w1, w2, w3 = ((0.3 * draw(*shape)).to(weight_dtype or dtype).requires_grad_() for shape in shapes)
    scores = draw(TOKENS, EXPERTS).softmax(-1)
    if starved is not None:
        scores[:, starved] = 0
    weights, indices = scores.topk(top_k)
    weights = weights.requires_grad_()
    counts = torch.bincount(indices.flatten(), minlength=EXPERTS)
    out = mix(x, weights.flatten(), RowPlan.of(indices, counts), w1, w2, w3)
    out.backward(upstream)
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, "w1": w1.grad, "w2": w2.grad, "w3": w3.grad}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("top_k, starved", [(1, None), (2, None), (3, 2)])
def test_equals_the_loop_over_experts(path, dtype, top_k, starved):
    expected = run(experts_reference, torch.float32, top_k, starved=starved)
    for name, found in run(PATHS[path], dtype, top_k, starved=starved).items():
        difference = ((found.float() - expected[name]).norm() / expected[name].norm()).item()
        assert difference < TOLERANCE[dtype], (name, difference)
        assert found.dtype == (torch.float32 if name == "weights" else dtype), name
    if starved is not None:
        assert expected["w1"][starved].count_nonzero() == 0 and expected["w1"][0].count_nonzero() > 0


@pytest.mark.parametrize("path", PATHS)
def test_fp32_weights_serve_bf16_tokens(path):
    """As under autocast: products in bf16, gradients in the weights' own type."""
    expected = run(experts_reference, torch.float32)
    for name, found in run(PATHS[path], torch.bfloat16, weight_dtype=torch.float32).items():
        assert ((found.float() - expected[name]).norm() / expected[name].norm()).item() < 1e-2, name
        assert found.dtype == (torch.bfloat16 if name in ("out", "x") else torch.float32), name


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_in_either_kind_of_product(monkeypatch, faster, autocast):
    monkeypatch.setattr(cpu_products, "_fp32_is_faster", lambda: faster)
    expected = run(experts_reference, torch.float32)
    with torch.autocast("cpu", enabled=autocast):
        results = run(mix_on_cpu, torch.bfloat16, weight_dtype=torch.float32 if autocast else None)
    for name, found in results.items():
        assert ((found.float() - expected[name]).norm() / expected[name].norm()).item() < 1e-2, name


@pytest.mark.parametrize(
    "machine, dtype",
    [
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"architecture": "x86_64", "avx512_bf16": True, "cpu_name": "AMD EPYC 9654"}, torch.bfloat16),
        ({"architecture": "x86_64", "avx512_bf16": False, "cpu_name": "AMD EPYC 7763"}, torch.float32),
        ({"architecture": "aarch64"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_type_of_products_by_cpu(monkeypatch, machine, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: machine, raising=False)
    cpu_products._fp32_is_faster.cache_clear()
    assert cpu_products.product_dtype(torch.bfloat16, "cpu") == dtype
    assert cpu_products.product_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert cpu_products.product_dtype(torch.float32, "cpu") == torch.float32
    monkeypatch.undo()
    cpu_products._fp32_is_faster.cache_clear()


def test_widths_that_the_grouped_product_refuses_take_the_loop():
    x = torch.randn(6, 5)
    w1, w2, w3 = torch.randn(2, 3, 5), torch.randn(2, 5, 3), torch.randn(2, 3, 5)
    plan = RowPlan.of(torch.tensor([[0], [1], [0], [1], [1], [1]]), torch.tensor([2, 4]))
    weights = torch.rand(6)
    torch.testing.assert_close(mix_grouped(x, weights, plan, w1, w2, w3), mix_on_cpu(x, weights, plan, w1, w2, w3))


def test_sorted_rows_with_padding_behind_them():
    """What DeepSpeed's exchange hands over: rows by expert, then rows that belong to none."""
    experts = Experts(2, 8, 8)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 8).requires_grad_()
    out = experts(x, torch.tensor([2, 3], dtype=torch.int32))
    by_hand = [
        experts.w2[e] @ (torch.nn.functional.silu(experts.w1[e] @ x[row]) * (experts.w3[e] @ x[row]))
        for row, e in enumerate((0, 0, 1, 1, 1))
    ]
    torch.testing.assert_close(out[:5], torch.stack(by_hand), rtol=1e-4, atol=1e-4)
    assert out[5:].count_nonzero() == 0
    out.sum().backward()
    assert x.grad[5:].count_nonzero() == 0 and x.grad[:5].count_nonzero() == 40


def test_rows_of_a_plan_by_hand():
    plan = RowPlan.of(torch.tensor([[2, 0], [0, 1]]), torch.tensor([2, 1, 1]))
    # Assignments 1 and 2 go to expert 0, 3 to expert 1, 0 to expert 2.
    assert plan.slot_N.tolist() == [1, 2, 3, 0]
    assert plan.token_N.tolist() == [0, 1, 1, 0]
    assert plan.row_TK.tolist() == [[3, 0], [1, 2]]
