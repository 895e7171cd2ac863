"""Leaving out the reduction over one rank, and blocks for the norm, change no bit of the training."""

import json
import subprocess
import sys
from pathlib import Path


def test_one_rank_without_reduction_trains_the_same():
    worker = Path(__file__).parent / "one_rank_worker.py"
    ran = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads(ran.stdout.splitlines()[-1])
    assert len(results) == 8 and all(same and as_expected for same, as_expected in results.values()), results
