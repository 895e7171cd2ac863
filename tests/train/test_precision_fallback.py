"""An unstable run goes on in a safer precision from its checkpoint; weights and moments survive the change."""

import json
from pathlib import Path

import pytest

from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.errors import CheckpointError
from lumina_ds.monitor.writers import read_records
from lumina_ds.train.precision_fallback import read_record, safer_precision


def losses(runs, name):
    records = read_records(runs / name / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def test_precision_changes_between_lives(run_ranks, corpus, tmp_path):
    run_ranks(Path(__file__).parent / "precision_worker.py", str(tmp_path), str(corpus.shards))
    for stage in (1, 2):
        assert losses(tmp_path, f"muon-zero{stage}") == losses(tmp_path, f"muon-parts-zero{stage}")
    for stage in (2, 3):
        whole, taken_up = losses(tmp_path, f"bf16-zero{stage}"), losses(tmp_path, f"taken-up-zero{stage}")
        assert taken_up[:5] == whole[:5] and taken_up[5:] != whole[5:]
        # Without Adam's moments the next steps would be of the size of the first: off by far more.
        assert taken_up[5:] == pytest.approx(whole[5:], rel=2e-3)
    run = tmp_path / "fallback-zero2"
    record = json.loads((run / "precision.json").read_text())
    assert (record["precision"], record["instead_of"], record["step"]) == ("mixed_bf16", "bf16", 8)
    # Steps 5 to 8 of the failed life are replaced by those since the checkpoint of step 4.
    assert losses(tmp_path, "fallback-zero2")[:10] == pytest.approx(losses(tmp_path, "bf16-zero2"), rel=2e-2)
    assert len(losses(tmp_path, "fallback-zero2")) == 12
    assert read_records(run / "metrics.jsonl")[-1]["skipped"] == 0
    for step in (8, 10, 12):
        folder = run / "checkpoints" / f"step-{step:08d}"
        assert read_manifest(folder).topology.precision == "mixed_bf16"


def test_the_order_of_safer_precisions(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [safer_precision(p) for p in ("fp16", "bf16", "mixed_bf16", "fp32")] == [
        "mixed_bf16", "mixed_bf16", "fp32", None
    ]  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    assert safer_precision("fp16") == "fp32"


def test_a_damaged_record_is_named(tmp_path):
    assert read_record(tmp_path / "precision.json") is None
    (tmp_path / "precision.json").write_text("{}")
    with pytest.raises(CheckpointError, match="remove it and set --precision"):
        read_record(tmp_path / "precision.json")
