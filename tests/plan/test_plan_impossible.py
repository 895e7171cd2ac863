"""Impossible requests, on every verb: one line with the nearest possible choice, exit code 2, nothing started."""

from __future__ import annotations

import pytest

from lumina_ds.cli.main import cli, run_command

VERBS = {"": [], "time": ["--tokens", "1B"], "verify": [], "rehearse": []}
REQUESTS = [
    ("--gpus 13 --expert-parallel 8", "use 8 or 16 ranks, or --expert-parallel 1"),
    ("--seq-length 100000", "is above the context of 4096 tokens; lower --seq-length"),
    ("--zero 5", "5 is not in the range 0<=x<=3"),
    ("--gpus -1", "-1 is not in the range x>=1"),
    ("--micro-batch 0", "0 is not in the range x>=1"),
    ("--precision fp4", "is not one of 'auto', 'fp32', 'bf16'"),
]


def refused(capsys, words):
    code = run_command(cli, ["plan", *words])
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1), captured.err
    return captured.err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("words", "message"), REQUESTS)
def test_impossible_settings(verb, words, message, capsys):
    assert message in refused(capsys, [*verb.split(), "--config", "b7", *words.split(), *VERBS[verb]])


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_presets(verb, capsys):
    assert "did you mean b7?" in refused(capsys, [*verb.split(), "--config", "b77", *VERBS[verb]])


@pytest.mark.parametrize("verb", ["", "time", "rehearse"])
def test_unknown_cards(verb, capsys):
    words = [*verb.split(), "--config", "b7", "--gpu", "h101", *VERBS[verb]]
    assert "did you mean h100-80?" in refused(capsys, words)


def test_unknown_files(capsys):
    assert "did you mean zero" in refused(capsys, ["check", "zero9"])


@pytest.mark.parametrize("words", ["verify --config debug", "time --config debug --tokens 1M --calibrate"])
def test_more_ranks_than_the_machine_runs(words, capsys):
    assert "--gpus 5000 are more ranks than this machine with" in refused(capsys, [*words.split(), "--gpus", "5000"])


def test_a_run_that_the_machine_cannot_hold(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "do not fit the" in refused(capsys, ["verify", "--config", "b300", "--gpus", "2"])
