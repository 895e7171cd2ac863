"""Real runs in several lives: nothing is left out, erased or taken for something else."""

from collections import Counter
from pathlib import Path

import pytest

from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.config.load import load_config
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.files import file_digest
from lumina_ds.monitor.writers import read_records

WORKER = Path(__file__).parent / "lives_worker.py"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def samples(path):
    return [row for record in read_records(path) for row in record["samples"] if row >= 0]


def test_lives_lose_nothing(run_ranks, corpus, runs_dir, tmp_path):
    found = run_ranks(WORKER, str(runs_dir), str(corpus.shards), world_size=1)
    printed = (tmp_path / "rank-0.log").read_text()
    num_rows = PackedRows(ShardFolder.open(corpus.shards), 64).num_rows
    # Otherwise nothing is shown: steps of 32 rows must not divide an epoch, nor one and a half.
    assert num_rows % 32 and round(1.5 * num_rows) % 32

    long, lives = (samples(runs_dir / f"{name}-zero1-fp32" / "metrics.jsonl") for name in ("long", "lives"))
    assert long == lives
    assert Counter(lives) == Counter({row: 2 for row in range(num_rows)})
    steps = [record["step"] for record in read_records(runs_dir / "lives-zero1-fp32" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert f"ended at step {len(steps)} of {len(steps)}" in printed

    killed = runs_dir / "killed-zero1-fp32"
    assert "--resume must" in found["refused"] and "holds no checkpoint" in found["refused"]
    assert samples(killed / "metrics.1.jsonl") == samples(killed / "metrics.jsonl") == long[:num_rows]
    assert (killed / "metrics.1.csv").exists()
    last = len(read_records(killed / "metrics.jsonl"))
    assert f"what an earlier life recorded, to step {last}, is kept as metrics.1.jsonl, metrics.1.csv" in printed
    assert printed.count("no checkpoint to resume from") == 1

    assert "saves every 30 minutes and at the end" in printed and "saves every 1 step, every 30 minutes" in printed
    moved = runs_dir / "moved-zero1-fp32" / "checkpoints"
    saved = read_manifest(moved / (moved / "latest").read_text())
    assert saved.step == -(-num_rows // 32) > 2
    assert saved.data.sha256 == file_digest(corpus.shards / "manifest.json")
    assert samples(runs_dir / "moved-zero1-fp32" / "metrics.jsonl") == long[:num_rows]
    _stops(runs_dir / "stops-zero1-fp32", printed)


def _stops(folder, printed):
    """Checkpoints that somebody removed cost only themselves; each start says why it ends where it does."""
    checkpoints = folder / "checkpoints"
    assert f"{checkpoints} is gone; it is made again for the checkpoint of step 4" in printed
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000004", "step-00000006"]
    assert (checkpoints / "latest").read_text() == "step-00000006"
    assert "ended at step 4 of 6; start again without --stop-at-step to go on" in printed
    assert "step 4 is trained already, and --stop-at-step is 4; raise it, or leave it out, to go on" in printed
    assert "--stop-at-step 40 is beyond the run's end at step 6; it ends there" in printed
    assert printed.count("train.max_steps 6 is the run's length; train.epochs 2.0 is not used") == 3
    again = load_config(str(folder / "config.yaml")).config
    assert again.train.stop_at_step is None
    assert (again.run.runs_dir, again.run_name) == (str(folder.parent), folder.name)
