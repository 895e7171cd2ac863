"""The model benchmarks run and compare every contender; no timing is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_bench_moe_layer_runs():
    script = Path(__file__).parent / "bench_moe_layer.py"
    words = ["--experts", "4", "--tokens", "32", "--hidden", "32", "--width", "16", "--rounds", "1", "--json"]
    ran = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (result,) = json.loads(ran.stdout.splitlines()[-1])
    assert len(result["layers"]) == 8 and result["layers"]["dense"]["of_dense"] == 1
    assert all(found["milliseconds"] > 0 for found in result["layers"].values())


def test_bench_step_runs():
    script = Path(__file__).parent / "bench_step.py"
    sizes = {"hidden": 64, "layers": 1, "experts": 4, "width": 32, "vocabulary": 256, "rows": 1, "length": 64}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, script, *words, "--steps", "1", "--rounds", "1", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads(ran.stdout)
    assert set(result["contenders"]) == {"lumina plain", "lumina plain, fp32 masters", "lumina engine", "transformers"}
    assert all(found["seconds"] > 0 and found["peak_bytes"] > 0 for found in result["contenders"].values())


def test_bench_mfu_runs_dry_and_refuses_a_cpu():
    script = Path(__file__).parent / "bench_mfu.py"
    words = ["--dry", "--model", "moe-e64", "--steps", "2", "--json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["mfu"] is None and result["tokens_per_second"] > 0
    assert set(result["parts"]) == {"attention", "experts", "router+dispatch", "head+loss", "optimizer", "other"}
    assert abs(sum(result["parts"].values()) - 1) < 1e-6
    # Each part was seen, and none twice: they do not add up to more than the step.
    assert all(share > 0 for share in result["parts"].values())
    refused = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200, env=environment)
    assert refused.returncode == 1 and refused.stderr.startswith("Error: no CUDA GPU")
