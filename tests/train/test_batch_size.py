"""--batch-size auto: planned, tried in a real step, the same on all ranks, and kept."""

from pathlib import Path

import pytest
import yaml

from lumina_ds.monitor.writers import read_records

GIB = 1 << 30


def test_chosen_tried_and_kept(run_ranks, corpus, tmp_path):
    found = run_ranks(Path(__file__).parent / "batch_size_worker.py", str(tmp_path), str(corpus.shards), timeout=400)
    # The plan allows all rows at once; the kernel refuses them to rank 1, and both go on with half.
    assert found["planned"] > GIB
    assert found["batches"] == [[2048, 2], [2048, 2]]
    output = (tmp_path / "rank-0.log").read_text()
    assert "micro-batch 2048 x accumulation 2 x 2 ranks = 8192 rows; limited by memory: a step with 4096 rows" in output
    assert "micro-batch 4 x accumulation 1 x 2 ranks = 8 rows; limited by the rows of a step" in output
    assert "micro-batch 4 x accumulation 1 x 2 ranks = 8 rows; limited by what the run began with" in output
    run = tmp_path / "auto-zero1-fp32"
    train = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert (train["micro_batch_size"], train["gradient_accumulation_steps"]) == (4, 1)
    assert train["auto_micro_batch"] is False
    # The same rows in every step as with the numbers that defined them.
    records, given = (read_records(tmp_path / f"{name}-zero1-fp32" / "metrics.jsonl") for name in ("auto", "given"))
    assert [sorted(record["samples"]) for record in records] == [sorted(record["samples"]) for record in given]
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in given], rel=1e-4)
