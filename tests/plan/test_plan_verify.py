"""`lumina plan verify` on real ranks, and the table it makes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.cli.plan.verify import Compared, compare, memory_request
from lumina_ds.config.load import load_config


def test_errors_are_relative_to_what_was_measured():
    assert Compared("x", 90, 100).error == pytest.approx(-0.1)
    assert Compared("x", 0, 0).error == 0


def test_compare_names_states_activations_and_peaks():
    _, plan = memory_request(load_config("debug").config, 2, "fp32", "cpu")
    found = {
        "components": {"parameters": 1, "master weights": 2, "moments": 3, "gradients": 4},
        "activations": 5,
        "peaks": {"forward": 6, "backward": 8, "step": 7},
    }
    lines = {line.name: line for line in compare(plan, found)}
    assert [line.measured for line in lines.values()] == [1, 2, 3, 4, 5, 6, 8, 7, 8]
    assert lines["peak"].predicted == max(lines[f"peak of {phase}"].predicted for phase in ("forward", "backward"))
    step = plan.phases["step"]
    assert lines["peak of step"].predicted == sum(step.values()) - step["margin"]


@pytest.mark.slow
def test_two_real_ranks_against_the_plan():
    words = ["plan", "verify", "--config", "debug", "--gpus", "2", "--zero", "2", "--precision", "fp32", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "lumina_ds", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    lines = {line["name"]: line for line in record["lines"]}
    for state in ("parameters", "master weights", "moments", "gradients"):
        assert lines[state]["predicted"] == lines[state]["measured"] > 0, state
    assert abs(lines["activations"]["error"]) < 0.01
    # In bf16 a CPU that multiplies faster in fp32 holds logits of another width than is planned.
    assert abs(lines["peak"]["error"]) < 0.03
    assert (record["device"], record["world_size"], len(record["seconds"])) == ("cpu", 2, 3)


def test_impossible_ranks(capsys):
    assert run_command(cli, ["plan", "verify", "--config", "debug", "--gpus", "3", "--expert-parallel", "2"]) == 2
    assert "3 ranks are not divisible by --expert-parallel 2; use 2 or 4 ranks" in capsys.readouterr().err
