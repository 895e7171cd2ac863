"""What TensorBoard and W&B get, read back from what they wrote themselves."""

import json
import math
from pathlib import Path

import pytest

from lumina_ds.config.schema import RunSection
from lumina_ds.errors import MachineError
from lumina_ds.monitor import trackers
from lumina_ds.monitor.records import EvaluationRecord, StepRecord
from lumina_ds.monitor.trackers import missing_trackers, open_trackers, scalars_of
from lumina_ds.monitor.writers import MetricsWriter

RECORD = StepRecord(
    step=3, time=1e9, loss=2.5, skipped=1, perplexity=math.inf, grad_norm=math.nan, usage_entropy=[0.5, 0.25],
    router_entropy=[None, 1.0], expert_usage=[[1, 2], [3, 4]], samples=[1, 2], others={"theirs": 5.0},
)  # fmt: skip


def test_numbers_become_curves_and_lists_one_per_layer():
    assert scalars_of(RECORD) == {
        "train/loss": 2.5,
        "train/skipped": 1.0,
        "layers/usage_entropy/00": 0.5,
        "layers/usage_entropy/01": 0.25,
    }
    assert scalars_of(EvaluationRecord(3, 2.0, math.inf, 7)) == {"eval/loss": 2.0, "eval/trained_tokens": 7.0}


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    settings = RunSection(tensorboard=True, wandb="offline")
    assert missing_trackers(RunSection()) == []
    assert missing_trackers(settings) == [
        "run.tensorboard is on and the package tensorboard is not installed; pip install 'lumina-ds[tensorboard]'",
        "run.wandb is on and the package wandb is not installed; pip install 'lumina-ds[wandb]'",
    ]
    with pytest.raises(MachineError, match="tensorboard is not installed"):
        open_trackers(settings, tmp_path, {}, 0)


def write(folder: Path, settings: RunSection, resumed_step: int, losses: dict[int, float]) -> None:
    writer = MetricsWriter(folder, resumed_step, open_trackers(settings, folder, {"seed": 1}, resumed_step))
    for step, loss in losses.items():
        writer.write(StepRecord(step=step, loss=loss))
    writer.write_evaluation(EvaluationRecord(max(losses), 1.0))
    writer.close()


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = RunSection(tensorboard=True)
    write(tmp_path, settings, 0, {1: 5.0, 2: 4.0, 3: 3.0})
    write(tmp_path, settings, 1, {2: 4.5, 3: 3.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 5.0), (2, 4.5), (3, 3.5)]
    assert [event.value for event in events.Scalars("eval/loss")][-1] == 1.0


def test_wandb_offline_keeps_one_run_per_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = RunSection(wandb="offline", wandb_project="tests")
    write(tmp_path, settings, 0, {1: 5.0})
    write(tmp_path, settings, 1, {2: 4.0})
    [first, second] = sorted((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb/run-id").read_text()
    # Two that begin in the same second get a number behind it.
    assert identity and all(run.name.split("-")[3] == identity for run in (first, second))
    found = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 2
    assert b"train/loss" in found[0].read_bytes() and b"eval/loss" in found[0].read_bytes()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss"] == 4.0
