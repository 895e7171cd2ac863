"""`lumina plan time --calibrate`: rates by hand, the file, and what two real ranks measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError
from lumina_ds.plan.calibration import (
    Calibration,
    default_path,
    rates_from_steps,
    read_calibration,
    smaller_runs,
    write_calibration,
)
from lumina_ds.plan.duration import plan_time
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.hardware import find_gpu
from lumina_ds.plan.parameters import count_parameters

MEASURED = Calibration(
    "here", "NVIDIA H100 80GB HBM3", "h100-80", "2026-01-01 00:00 UTC", 2, "b7", "bf16", 4e14, 1e-12, 2e9, 1e10, 1e10
)


def run_of(accumulation, name="debug", **values):
    fields = {"train.gradient_accumulation_steps": accumulation, "train.micro_batch_size": 2} | values
    return load_config(name, [Override(key, value, key) for key, value in fields.items()]).config


def test_two_steps_give_both_rates():
    run = run_of(1)
    work = 2 * 256 * flops_per_token(run.model, 256)
    flops, once = rates_from_steps(run, {1: 5.0, 3: 9.0})
    assert flops == pytest.approx(work / 2)
    assert once == pytest.approx(3 / count_parameters(run.model).total)
    # Noise that turns them around leaves the longer one's average, and nothing negative.
    flops, once = rates_from_steps(run, {1: 5.0, 4: 4.0})
    assert flops == pytest.approx(work) and once >= 0


def test_time_by_hand():
    run = run_of(4, "b7", **{"train.activation_checkpointing": "none"})
    plan = plan_time(run, 8, find_gpu("h100"), "bf16", 10**9, calibration=MEASURED, price_per_gpu_hour=2)
    work = flops_per_token(run.model, run.seq_length) * 2 * run.seq_length * 4
    assert plan.step_seconds == pytest.approx(work / 4e14 + count_parameters(run.model).total * 1e-12)
    assert (plan.basis, plan.mfu) == ("calibrated", pytest.approx(work / plan.step_seconds / 989e12))
    assert plan.save_seconds == pytest.approx(plan.checkpoint.total / 2e9)
    assert plan.cost == pytest.approx(2 * plan.gpu_hours)
    assumed = plan_time(run, 8, find_gpu("h100"), "bf16", 10**9, mfu=0.5, calibration=MEASURED)
    assert (assumed.basis, assumed.mfu) == ("assumed", 0.5)


def test_a_calibrated_device_needs_no_tabulated_rate():
    cpu = replace(MEASURED, device="cpu", card=None, precision="fp32")
    plan = plan_time(run_of(1), 1, None, "fp32", 10**6, calibration=cpu)
    assert plan.mfu is None and plan.gpu == "cpu"
    with pytest.raises(ConfigError, match="give --gpu, or --calibrate"):
        plan_time(run_of(1), 1, None, "fp32", 10**6)


def test_smaller_runs_keep_their_widths():
    runs = smaller_runs(run_of(2, "b7"))
    shapes = [(run.train.micro_batch_size, run.model.num_hidden_layers, run.seq_length) for run in runs]
    assert shapes[0] == (2, 22, 4096) and shapes[1] == (1, 22, 4096) and shapes[2] == (1, 11, 4096)
    assert shapes[-1] == (1, 1, 256)
    assert {run.model.hidden_size for run in runs} == {runs[0].model.hidden_size}


def test_the_file(tmp_path):
    path = tmp_path / "deep" / "here.json"
    write_calibration(MEASURED, path)
    assert read_calibration(path) == MEASURED
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"is no calibration; make one with lumina plan time --calibrate"):
        read_calibration(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_calibration(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--calibration none.json", "none.json cannot be read: No such file or directory; make it with"),
        ("--calibration h100.json --gpu a100-80", "the calibration is of NVIDIA H100 80GB HBM3, not of a100-80"),
        ("--calibration h100.json --precision fp32", "the calibration is of bf16, and the run is in fp32"),
        ("--calibrate --mfu 0.4", "--calibrate measures what --mfu assumes; give one of them"),
        ("--calibrate --gpus 3 --expert-parallel 2", "3 ranks are not divisible by --expert-parallel 2"),
    ],
)
def test_errors(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_calibration(MEASURED, tmp_path / "h100.json")
    code = run_command(cli, ["plan", "time", "--config", "debug", "--tokens", "1M", *words.split()])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert message in error


@pytest.mark.slow
def test_rates_of_two_ranks_are_kept_and_used(tmp_path, monkeypatch, capfd):
    cache = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = ["--config", "debug", "--gpus", "2", "--zero", "2", "--micro-batch", "2", "--tokens", "1M", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "lumina_ds", "plan", "time", *words, "--calibrate"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=cache,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads(done.stdout)
    calibration = first["calibration"]
    assert (first["basis"], calibration["device"], calibration["num_ranks"]) == ("calibrated", "cpu", 2)
    assert min(calibration[f"{name}_bytes_per_second"] for name in ("write", "all_reduce", "all_to_all")) > 1e6
    assert not (tmp_path / "runs").exists()

    # Kept, and used for another run on the same device.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_path(calibration["host"], "cpu").is_file()
    assert run_command(cli, ["plan", "time", *words]) == 0
    again = json.loads(capfd.readouterr().out)
    assert (again["calibration"], again["step_seconds"]) == (calibration, first["step_seconds"])
    assert run_command(cli, ["plan", "time", *words, "--gpu", "h100-80"]) == 0
    assert json.loads(capfd.readouterr().out)["basis"] == "assumed"
