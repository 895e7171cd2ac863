"""Rows 16, 17 and 18 of the fault matrix, on two real ranks: NaN on one rank, NaNs in a row, and a finite spike."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_row_16_and_18_skips_on_all_ranks_at_every_stage_and_precision(run_ranks, corpus, runs_dir):
    found = run_ranks(HERE / "health_worker.py", str(runs_dir), str(corpus.shards))
    assert found["answers of rank 0"] == [[{"rank": 0}, "rank 0 refuses"]] * 2
    nans = [name for name in found if name.startswith("nan-")]
    assert len(nans) == 11
    for name in nans:
        for rank in found[name]:
            assert rank == {"error": None, "finite": True, "step": 4, "skipped": 1, "rollbacks": 0}, name
        records = read_records(runs_dir / name / "metrics.jsonl")
        assert [record["skipped"] for record in records] == [0, 1, 1, 1], name
        assert records[1]["loss"] is None and records[2]["loss"] is not None, name
    for name in (name for name in found if name.startswith("skip-")):
        assert [rank["skipped"] for rank in found[name]] == [1, 1], name
        records = read_records(runs_dir / name / "metrics.jsonl")
        assert [record["skipped"] for record in records] == [0] * 6 + [1, 1], name
        assert records[6]["anomaly_score"] > 6 > records[7]["anomaly_score"], name
        # What was injected is what the record shows: 50 times the loss, whose gradient is not taken, or 50 times the
        # gradient of an ordinary loss.
        (_, before), (loss, norm) = ((record["loss"], record["grad_norm"]) for record in records[5:7])
        if name.endswith("-spike"):
            assert loss > 10 * records[5]["loss"] and norm is None, name
        else:
            assert loss < 2 * records[5]["loss"] and norm > 10 * before, name
    assert len([name for name in found if name.startswith("skip-")]) == 8
    for rank in found["limit"]:
        assert "3 steps in a row were skipped, the last at step 5" in rank["error"]
        assert rank["step"] == 5 and rank["finite"]


def test_row_17_and_18_going_back_is_exact_and_passes_over_the_samples(run_ranks, corpus, runs_dir):
    first = run_ranks(HERE / "rollback_worker.py", "first", str(runs_dir), str(corpus.shards))
    second = run_ranks(HERE / "rollback_worker.py", "second", str(runs_dir), str(corpus.shards))
    rows = PackedRows(ShardFolder.open(corpus.shards), 64)
    order = TrainingOrder(rows.num_rows, 42)
    for stage in (1, 3):
        assert [rank["rollbacks"] for rank in first[f"whole-{stage}"]] == [1, 1]
        assert [rank["step"] for rank in second[f"parts-{stage}"]] == [12, 12]
        whole, parts = (read_records(runs_dir / f"{part}-{stage}" / "metrics.jsonl") for part in ("whole", "parts"))
        assert [record["step"] for record in whole] == list(range(1, 13))
        for key in ("loss", "grad_norm", "samples", "anomaly_score"):
            assert [record[key] for record in whole] == [record[key] for record in parts], key
        # A step has 4 rows; those of step 7 are left out, and each other one is trained exactly once.
        expected = [order.row_at(position) for position in [*range(24), *range(28, 52)]]
        assert [row for record in whole for row in record["samples"]] == expected
        passed = read_records(runs_dir / f"whole-{stage}" / "passed_over.jsonl")
        assert list(dict.fromkeys(record["row"] for record in passed)) == [order.row_at(p) for p in range(24, 28)]
        origins = [(o.source, o.line) for p in range(24, 28) for o in rows.origins(order.row_at(p))]
        assert [(record["source"], record["line"]) for record in passed] == origins
        health = read_manifest(runs_dir / f"parts-{stage}" / "checkpoints" / "step-00000012").health
        assert health.passed_over == [[24, 4]] and health.rollbacks == 1


def test_row_17_nans_that_come_again_end_the_run_with_the_weights_of_the_checkpoint(runs_dir, corpus):
    names = sorted(path.name for path in (runs_dir / "nans/checkpoints").glob("step-*"))
    assert names == ["step-00000000", "step-00000004"]
    passed = read_records(runs_dir / "nans" / "passed_over.jsonl")
    assert [list(each) for each in dict.fromkeys(tuple(r["steps"]) for r in passed)] == [[6, 8]]


def test_epochs_end_earlier_and_every_other_row_is_seen_once(runs_dir, corpus):
    records = read_records(runs_dir / "epochs" / "metrics.jsonl")
    num_rows = PackedRows(ShardFolder.open(corpus.shards), 64).num_rows
    seen = Counter(row for record in records for row in record["samples"] if row >= 0)
    passed = {record["row"] for record in read_records(runs_dir / "epochs" / "passed_over.jsonl")}
    assert len(passed) == 4 and set(seen.values()) == {1}
    assert set(seen) | passed == set(range(num_rows)) and not passed & set(seen)
    manifest = json.loads(
        next((runs_dir / "epochs/checkpoints").glob(f"step-{len(records):08d}/manifest.json")).read_text()
    )
    assert manifest["step"] == len(records) == -(-(num_rows - 4) // 4)
