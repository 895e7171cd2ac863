"""`lumina plan time`: FLOPs by part, steps and seconds by hand, and checkpoint sizes against a written one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import TrainConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan import checkpoint_bytes, find_gpu, flops_per_token, plan_time
from lumina_ds.plan.duration import describe_saves, num_saves
from lumina_ds.plan.flops import flops_by_part

CHECKOUT = Path(__file__).parents[2]
H100 = find_gpu("h100")


@pytest.fixture
def run_cli(capsys, tmp_path, monkeypatch):
    # No calibration of this machine.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(*args):
        code = run_command(cli, ["plan", "time", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def config(name="debug", **fields):
    return load_config(name, [Override(key.replace("__", "."), value, key) for key, value in fields.items()]).config


def test_flops_of_debug_by_part():
    parts = flops_by_part(config().model, 256)
    # Two of four experts, 2 layers, 3 matrices of 88 x 128; a head of 1024 x 128; scores of width 128 over 257 tokens.
    assert parts["experts"] == 6 * 2 * 2 * 3 * 88 * 128
    assert parts["head"] == 6 * 1024 * 128
    assert parts["attention scores"] == 3 * 2 * 128 * 257 * 2
    assert parts["dense feed-forward"] == 0
    assert sum(parts.values()) == flops_per_token(config().model, 256)


def test_time_by_hand():
    plan = plan_time(config("b7", train__activation_checkpointing="none"), 8, H100, "bf16", 10**9, mfu=0.5)
    # 2 rows x 16 micro-batches x 8 GPUs x 4096 tokens; 953.7 steps.
    assert (plan.tokens_per_step, plan.steps) == (1_048_576, 954)
    assert plan.step_seconds == pytest.approx(plan.flops_per_token * 1_048_576 / (8 * 989e12 * 0.5))
    assert plan.total_seconds == pytest.approx(954 * plan.step_seconds)
    assert plan.tokens_per_second == pytest.approx(1_048_576 / plan.step_seconds)
    assert plan.gpu_hours == pytest.approx(8 * plan.total_seconds / 3600)
    assert plan.cost is None


def test_recomputation_costs_a_third_of_what_it_repeats():
    none, full, attention, half = (
        plan_time(
            config("b7", train__activation_checkpointing=mode, train__checkpoint_interval=n), 8, H100, "bf16", 1e9
        )
        for mode, n in (("none", 1), ("full", 1), ("attention", 1), ("full", 2))
    )
    total, parts = none.flops_per_token, none.flops
    assert full.step_seconds == pytest.approx(none.step_seconds * (total + (total - parts["head"]) / 3) / total)
    scores = parts["attention projections"] + parts["attention scores"]
    assert attention.step_seconds == pytest.approx(none.step_seconds * (total + scores / 3) / total)
    # 11 of 22 blocks.
    assert half.step_seconds - none.step_seconds == pytest.approx((full.step_seconds - none.step_seconds) / 2)
    assert full.flops_per_token == none.flops_per_token


def test_experts_and_dense_models_have_anchors_of_their_own():
    dense = config(model__num_experts=0, model__intermediate_size=256)
    assert plan_time(dense, 1, H100, "bf16", 10**6).mfu > plan_time(config(), 1, H100, "bf16", 10**6).mfu


def test_saves_and_disk():
    run = config(train__save_every_n_batches=10, train__max_steps=100, train__keep_checkpoints=3)
    plan = plan_time(run, 1, H100, "bf16")
    # After 10, 20, ..., 90 steps and at the end; three newest, the best, and one being written.
    assert plan.num_checkpoints == 10
    assert plan.disk_bytes == 5 * plan.checkpoint.total
    assert plan_time(config(train__max_steps=100), 1, H100, "bf16").disk_bytes == plan.checkpoint.total


def test_saves_by_minutes_are_counted_as_a_run_makes_them():
    """A save of either kind starts the minutes anew."""
    train = TrainConfig(save_every_n_batches=10, save_every_minutes=1)
    # Steps of 15 s: after 4, 8, 10, 14, 18, 20, 24 and at the end.
    assert num_saves(train, 25, 15) == 8
    assert num_saves(train, 25, 7) == 5  # 60 s are 9 steps: 9, 10, 19, 20, 25
    assert num_saves(train, 25, 6) == 3
    assert num_saves(TrainConfig(save_every_minutes=0), 25, 3600) == 1
    assert num_saves(TrainConfig(), 24, 3600) == 24


def test_a_long_plan_saves_every_half_hour():
    plan = plan_time(config("b7"), 8, H100, "bf16", 10**10)
    # One for every half hour that is over before the end, and the last.
    assert plan.num_checkpoints == int(plan.total_seconds / 1800) + 1 > 20
    assert plan.disk_bytes == 5 * plan.checkpoint.total


@pytest.mark.parametrize(
    ("fields", "when"),
    [
        ({}, "saves every 30 minutes and at the end"),
        ({"save_every_n_batches": 500}, "saves every 500 steps, every 30 minutes and at the end"),
        ({"save_every_minutes": 0}, "saves at the end only"),
    ],
)
def test_when_a_run_saves_in_words(fields, when):
    assert describe_saves(TrainConfig(**fields), 3 << 30) == f"{when}, 3.00 GiB each; the newest 3 and the best stay"


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    # bf16 weights whole, and fp32 weights with two moments, at every stage.
    [(1, 2 + 12), (3, 2 + 12)],
)
def test_checkpoint_of_an_untied_model(stage, bytes_per_parameter):
    run = config("b7", deepspeed__zero_stage=stage)
    assert checkpoint_bytes(run, "bf16").total == pytest.approx(bytes_per_parameter * 7_055_632_384, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_checkpoint_sizes_equal_a_written_one(stage, corpus, tmp_path):
    settings = ["--config", "debug", "--seq-length", "64", "--zero", str(stage), "--max-steps", "1"]
    done = subprocess.run(
        [sys.executable, CHECKOUT / "launch/train.py", *settings, "--data", corpus.shards, "--experiment-name", "one"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs/one/checkpoints").glob("step-*")
    planned = checkpoint_bytes(config(deepspeed__zero_stage=stage), "fp32")

    def written(pattern):
        return sum(path.stat().st_size for path in folder.glob(pattern))

    # Headers are a larger share of so small a model than of a real one.
    assert planned.weights == pytest.approx(written("model-*.safetensors"), rel=0.01)
    assert planned.optimizer_states == pytest.approx(written("optimizer-*.safetensors"), rel=0.01)


def test_command_as_json(run_cli, corpus):
    code, out, _ = run_cli("--config", "debug", "--data", corpus.shards, "--mfu", 0.4, "--price", 2, "--json")
    record = json.loads(out)
    total = json.loads((corpus.shards / "manifest.json").read_text())["totals"]["tokens"]
    assert code == 0
    epochs = config().train.epochs
    assert record["steps"] == -(-round(total * epochs) // record["tokens_per_step"])
    assert record["mfu"] == 0.4 and record["mfu_source"] == "as given"
    assert record["cost"] == pytest.approx(2 * record["gpu_hours"])
    assert record["checkpoint"]["total"] == sum(v for k, v in record["checkpoint"].items() if k != "total")


@pytest.mark.parametrize("tokens", ["10B", "1e10", "10_000_000_000", "10000m"])
def test_command_as_text(run_cli, tokens):
    code, out, _ = run_cli("--config", "b7", "--gpus", 8, "--tokens", tokens, "--price", "2.5")
    assert code == 0
    assert "9,537 steps of 1,048,576 tokens" in out and "GPU hours" in out and "Cost " in out
    assert "MFU 25 %, assumed (NeMo" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config b7", "give --tokens, --data, or a configuration with max_steps"),
        ("--config b7 --tokens 5 --data x", "both say how much is trained"),
        ("--config b7 --tokens many", "many is no number of tokens; write it as 300000000, 3e8 or 300M"),
        ("--config b7 --tokens 1B --precision fp32", "precision fp32 cannot be timed"),
        ("--config b7 --tokens 1B --gpu h101", "did you mean h100-80?"),
        ("--config b7 --tokens 1B --mfu 0", "0"),
        ("--config b7 --tokens 1B --gpus 13 --expert-parallel 8", "use 8 or 16 ranks"),
    ],
)
def test_errors(run_cli, words, message):
    code, out, err = run_cli(*words.split())
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_the_length_is_needed():
    with pytest.raises(ConfigError, match="the length of the run is open"):
        plan_time(config(), 1, H100, "bf16")
