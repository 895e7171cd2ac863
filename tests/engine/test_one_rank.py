"""Leaving out the reduction over one rank, and blocks for the norm, change no bit of the training. A gate of the norm
that cannot work says so."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_one_rank_without_reduction_trains_the_same():
    worker = Path(__file__).parent / "one_rank_worker.py"
    ran = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    results = found["same"]
    assert found["gates"] == [None] * 4
    for said, name in zip(
        found["missing"], ("scaled_global_norm", "scaled_global_norm", "_get_norm_groups"), strict=True
    ):
        assert said.startswith("MachineError: ") and f"has no {name} in DeepSpeedZeroOptimizer" in said, said
        assert "\n" not in said
    assert found["of its own"].startswith("ConfigError: health.spike_policy skip: BF16_Optimizer"), found["of its own"]
    before, after = found["levels"]
    assert before == after == logging.WARNING, "DeepSpeed's log level did not come back after an error"
    assert len(results) == 8 and all(same and as_expected for same, as_expected in results.values()), results
