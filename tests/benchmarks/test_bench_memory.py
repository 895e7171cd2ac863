"""The memory benchmark: its configurations, its table, and DeepSpeed's estimate beside ours. Nothing is measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
bench_memory = pytest.importorskip("bench_memory")


@pytest.mark.parametrize(("which", "ranks"), [("cpu", 2), ("gpu", 1), ("gpu", 8)])
def test_at_least_twenty_configurations(which, ranks):
    found = list(bench_memory.cases(which, ranks))
    assert len(found) >= 20
    assert len({name for name, _, _ in found}) == len(found)


def test_plan_only_starts_nothing(capsys):
    assert bench_memory.main(["--set", "gpu", "--ranks", "8", "--plan-only", "--only", "b1 "]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 11 and all("GiB in " in line for line in printed)


def test_deepspeeds_estimate_by_hand():
    pytest.importorskip("deepspeed")
    name, run, precision = bench_memory.case("debug", 2, "bf16", 1)
    plan = bench_memory.memory_request(run, 2, precision, "cpu")[1]
    # Parameters and gradients in 16 bits, and 12 bytes of optimizer shared by two ranks.
    assert bench_memory.deepspeed_estimate(plan, run) == pytest.approx((4 + 16 / 2) * 501_376, rel=0.4)
    assert bench_memory.deepspeed_estimate(bench_memory.memory_request(*bench_memory.case("debug", 1, "bf16", 1)[1:2], 2, precision, "cpu")[1], run) is None  # fmt: skip
    assert name == "debug ZeRO-2 bf16 batch 1"


def test_table_and_the_error_that_costs_money(monkeypatch, capsys):
    measured = {
        "name": "a", "device": "card", "estimate": 150 << 20, "predicted_peak": 110 << 20, "predicted_states": 100 << 20,
        "measured_states": 100 << 20, "measured_peak": 100 << 20, "lines": {"activations": (50 << 20, 40 << 20)},
    }  # fmt: skip
    failed = {"name": "b", "device": "card", "estimate": None, "predicted_total": 2 << 30, "out_of_memory": True}
    assert "| a | 100.0 | +0.0 % | +50.0 % | 40.0 | +25.0 % | 100.0 | +10.0 % |" in bench_memory.table([measured])
    assert "| b | out of memory | | | | | | planned 2.0 GiB |" in bench_memory.table([failed])
    monkeypatch.setattr(bench_memory, "rows", lambda *_: iter([measured, failed]))
    for capacity, code in ((3 << 30, 1), (1 << 30, 0)):
        monkeypatch.setattr(bench_memory, "_capacity", lambda capacity=capacity: capacity)
        assert bench_memory.main(["--ranks", "1"]) == code
    assert "1 x card, 2 configurations" in capsys.readouterr().out


def test_a_whole_table_on_a_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert bench_memory.main(["--only", "m70_memory", "--out", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().count("m70_memory") >= 8
