"""fp16: its dynamic loss scale, which no other precision takes over; its training, where there is a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.checkpoint.state import engine_counters, restore_loss_scale
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.monitor.writers import read_records


def test_the_scale_is_dynamic_unless_a_file_says_otherwise(tmp_path):
    config = RunConfig.model_validate({"model": {"intermediate_size": 8}})
    expected = {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2,
        "min_loss_scale": 1,
    }  # fmt: skip
    composed = compose_deepspeed(config, 1, "fp16")
    assert composed["fp16"] == expected
    assert composed["zero_optimization"]["stage"] == 1
    config.deepspeed.config = str(tmp_path / "own.json")
    (tmp_path / "own.json").write_text(json.dumps({"fp16": {"enabled": True, "initial_scale_power": 8}}))
    assert compose_deepspeed(config, 1, "fp16")["fp16"] == expected | {"initial_scale_power": 8}


def scaler(kind, scale):
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    if kind != "fp16":
        return loss_scaler.LossScaler(scale)
    made = loss_scaler.DynamicLossScaler(
        init_scale=scale, scale_window=1000, min_scale=1, delayed_shift=2,
        consecutive_hysteresis=False, raise_error_at_min_scale=True, dtype=torch.float16,
    )  # fmt: skip
    made.cur_iter = 7
    return made


@pytest.mark.parametrize(("saved_in", "scale", "iteration"), [("fp16", 512.0, 7), ("bf16", 65536.0, 0)])
def test_only_fp16_gives_its_scale_to_fp16(saved_in, scale, iteration):
    before = SimpleNamespace(loss_scaler=scaler(saved_in, 512.0 if saved_in == "fp16" else 1.0), param_groups=[])
    counters = engine_counters(SimpleNamespace(optimizer=before, skipped_steps=0))
    after = scaler("fp16", 65536.0)
    after.cur_iter = 0
    restore_loss_scale(after, saved_in, counters)
    assert (after.cur_scale, after.cur_iter, after.dynamic) == (scale, iteration, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 runs on a GPU only")
def test_fp16_trains_resumes_and_is_left(run_ranks, corpus, tmp_path):
    run_ranks(Path(__file__).parent / "fp16_worker.py", str(tmp_path), str(corpus.shards), world_size=1)
    whole, parts, left = (
        read_records(tmp_path / f"{name}-zero1-fp16" / "metrics.jsonl") for name in ("whole", "parts", "left")
    )
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    assert [record["loss"] for record in parts] == pytest.approx([record["loss"] for record in whole], rel=1e-3)
    # In fp32 with the scale of fp16 the first update would be of another size.
    assert [record["loss"] for record in left[5:]] == pytest.approx([record["loss"] for record in whole[5:]], rel=2e-2)
    step = tmp_path / "whole-zero1-fp16" / "checkpoints" / "step-00000010"
    assert read_manifest(step).engine.loss_scaler["cur_scale"] >= 1024
