"""--batch-size auto: planned, tried in a real step, the same on all ranks, and kept."""

from pathlib import Path

import pytest
import yaml

from lumina_ds.monitor.writers import read_records

GIB = 1 << 30


def test_chosen_tried_and_kept(run_ranks, corpus, tmp_path):
    found = run_ranks(Path(__file__).parent / "batch_size_worker.py", str(tmp_path), str(corpus.shards), timeout=400)
    # The plan allows all rows at once; the kernel refuses them to rank 1, and both go on with the first part that fits.
    assert found["planned"] > GIB // 2
    [micro_batch, accumulation], of_rank_1 = found["batches"]
    assert of_rank_1 == [micro_batch, accumulation]
    assert micro_batch in (1024, 512, 256) and micro_batch * accumulation == 2048
    output = (tmp_path / "rank-0.log").read_text()
    line = f"micro-batch {micro_batch} x accumulation {accumulation} x 2 ranks = 4,096 rows; limited by memory: "
    assert f"{line}a step with {2 * micro_batch:,} rows was tried and did not fit" in output
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
