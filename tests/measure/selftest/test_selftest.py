"""`lumina selftest` from the command line, and its comparison by hand-worked numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import load_config
from lumina_ds.errors import StalledError
from lumina_ds.measure.selftest import run as selftest_run
from lumina_ds.measure.selftest.curves import Curve, compare
from lumina_ds.measure.selftest.layouts import PLAIN, Layout, Pair, layouts_of, pairs_for
from lumina_ds.measure.selftest.shape import tiny_run
from lumina_ds.measure.selftest.task import PROGRESS_FILE, configuration

PAIR = Pair("ZeRO", PLAIN, Layout(2, 3))


def curve(**changes):
    gradients = {"first/a": np.array([3.0, 4.0]), "first/b": np.array([0.0]), "all/a": np.ones(2), "all/b": np.zeros(1)}
    return Curve(
        **{"trained_tokens": [5, 6], "losses": [2.0, 1.0], "norms": [1.0, 1.0], "gradients": gradients, **changes}
    )


@pytest.mark.slow
def test_the_whole_self_test_passes_here(capfd):
    assert run_command(cli, ["selftest", "--steps", "3", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] and found["ranks"] == 2 and found["steps"] == 3
    topics = {pair["topic"] for pair in found["pairs"]}
    assert topics >= {"plain PyTorch", "number of ranks", "ZeRO", "expert parallelism", "accumulation", "packing"}
    assert topics >= {"checkpointing", "chunked loss", "starved experts"}
    for pair in found["pairs"]:
        assert max(pair["loss"], pair["grad_norm"], pair["gradients"]) < pair["tolerance"] == 1e-4, pair
    # Other layouts are another computation, which shows in the last bits: the comparison compares something. A single
    # pair may agree to the bit, as ZeRO 0 and 1 do with torch 2.11.
    differing = {pair["topic"] for pair in found["pairs"] if pair["gradients"] > 0}
    assert differing >= topics - {"checkpointing"}


def test_differences_by_hand():
    same = compare(PAIR, curve(), curve())
    assert (same.fault, same.loss, same.grad_norm, same.gradients) == (None, 0.0, 0.0, 0.0)
    # |(0, 0.005)| / |(3, 4)| = 0.001
    near = curve(gradients=curve().gradients | {"first/a": np.array([3.0, 4.005])})
    found = compare(PAIR, curve(), near)
    assert found.gradients == pytest.approx(0.001) and found.parameter == "a"
    assert found.fault == "the gradient of a differs by 1.0e-03, above the tolerance of 0.0001"
    assert compare(PAIR, curve(), curve(losses=[2.0, 1.1])).loss == pytest.approx(0.1)
    assert "loss differs by inf" in compare(PAIR, curve(), curve(losses=[2.0, float("nan")])).fault
    # A parameter whose gradient is nothing beside the others' is measured by theirs: 1e-9 / (1e-4 x 5).
    tiny = curve(gradients=curve().gradients | {"first/b": np.array([1e-9])})
    assert compare(PAIR, curve(), tiny).gradients == pytest.approx(2e-6)
    assert compare(PAIR, curve(), curve(trained_tokens=[5, 7])).fault == (
        "they train 6 and 7 tokens of the same conversations"
    )
    assert "1 step was skipped" in compare(PAIR, curve(), curve(skipped=1)).fault


def test_a_curve_survives_its_file(tmp_path):
    curve().save(tmp_path / "a.npz")
    found = Curve.load(tmp_path / "a.npz")
    assert compare(PAIR, curve(), found).gradients == 0 and found.losses == [2.0, 1.0]


def test_pairs_cover_what_the_machine_allows():
    layouts = layouts_of(pairs_for(2, 4, "fp32"))
    assert {(each.zero, each.expert_parallel) for each in layouts if each.num_ranks == 2} >= {
        (zero, size) for zero in range(4) for size in (1, 2)
    }
    assert {each.accumulation for each in layouts} >= {1, 2, 4}
    assert {each.expert_parallel for each in layouts_of(pairs_for(8, 8, "fp32"))} == {1, 8}
    assert {each.expert_parallel for each in layouts_of(pairs_for(2, 0, "fp32"))} == {1}
    alone = layouts_of(pairs_for(1, 4, "fp32"))
    assert {each.num_ranks for each in alone} == {1} and any(each.starved for each in alone)
    assert 0 not in {each.zero for each in layouts_of(pairs_for(2, 4, "bf16"))}


@pytest.mark.parametrize("preset", ["debug", "b7", "b300", "m120_speed"])
def test_presets_shrink_to_runs_that_can_be_trained(preset):
    from lumina_ds.config.checks import model_faults
    from lumina_ds.config.deepspeed.compose import compose_deepspeed

    given = load_config(preset).config
    values, notes = tiny_run(2, given)
    for layout in layouts_of(pairs_for(2, values["model"]["num_experts"], "fp32"))[1:]:
        config = configuration(values, layout, 8)
        assert model_faults(config) == []
        assert config.model.num_experts == min(16, given.model.num_experts)
        assert config.model.scoring_func == given.model.scoring_func
        if layout.zero is not None:
            compose_deepspeed(config, layout.num_ranks, "fp32")
    assert any("overflow_policy" in note for note in notes) == (given.model.overflow_policy != "dropless")


def test_a_hang_is_named(tmp_path):
    (tmp_path / PROGRESS_FILE).write_text('{"event": "begins", "layout": "2 ranks, ZeRO 3"}\n{"eve')
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(StalledError, match=r"no progress for 0\.5 s, at 2 ranks, ZeRO 3; .*--case-seconds"):
            selftest_run._watch(process, tmp_path / PROGRESS_FILE, 0.5, lambda line: None)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_difference_ends_with_code_7(monkeypatch, capfd):
    monkeypatch.setattr(
        selftest_run.SelfTest, "run", lambda self, *_: [compare(PAIR, curve(), curve(norms=[1.0, 1.5]))]
    )
    assert run_command(cli, ["selftest"]) == 7
    out, err = capfd.readouterr()
    assert "the gradient norm differs by 5.0e-01" in out
    assert err.startswith("error: the self-test failed: ZeRO (plain PyTorch / 2 ranks, ZeRO 3")
    assert len(err.splitlines()) == 1


def test_what_the_machine_cannot_do_is_refused(capfd):
    assert run_command(cli, ["selftest", "--precision", "fp16"]) == 4
    assert "fp16 is not possible on a CPU" in capfd.readouterr().err
