"""Who types another trainer's option reads ours; and a run's file and fields without dashes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import dotted_fields
from lumina_ds.config.options import SHORT_OPTIONS
from lumina_ds.config.peer_options import PEER_OPTIONS, peer_hint
from lumina_ds.config.schema import RunConfig

DRY = ["train", "--config", "debug", "--data", "shards", "--dry-run"]
RUNNERS = {"--num_gpus", "--hostfile", "--out", "--config"}


def refused(words: list[str], capsys: Any) -> str:
    capsys.readouterr()
    assert run_command(cli, words) == 2
    error: str = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_every_remedy_names_options_that_there_are() -> None:
    ours = {option.flag for option in SHORT_OPTIONS} | {f"--{field}" for field in dotted_fields(RunConfig)} | RUNNERS
    for name, meaning in PEER_OPTIONS.items():
        assert set(re.findall(r"--[\w.-]+", meaning)) <= ours, (name, meaning)
        assert not {f"--{name.replace('_', '-')}", f"--{name}"} & (ours - RUNNERS), f"{name} is ours"
    assert len(PEER_OPTIONS) > 150


@pytest.mark.parametrize(
    "name", ["lr", "per_device_train_batch_size", "output_dir", "deepspeed", "bf16", "nproc_per_node"]
)
@pytest.mark.parametrize("spelled", ["--{}", "--{}=3", "--{} 3"])
def test_a_peers_option_is_answered_with_ours(name: str, spelled: str, capsys: Any) -> None:
    words = spelled.format(name).split()
    assert peer_hint(f"--{name}") in refused([*DRY, *words], capsys)
    assert peer_hint(f"--{name.replace('_', '-')}") == peer_hint(f"--{name}") != ""


def test_options_of_the_runner_before_the_dashes(capsys: Any) -> None:
    assert "--num_gpus; here it is: goes to the deepspeed runner, behind ` -- `, as in: -- --num_gpus 2" in refused(
        [*DRY, "--num_gpus", "2"], capsys
    )
    assert "behind ` -- `: --hostfile" in refused([*DRY, "--hostfile", "hosts"], capsys)


def test_what_is_nobodys_gets_the_nearest(capsys: Any) -> None:
    assert peer_hint("--learnin-rate") == ""
    assert "did you mean --learning-rate?" in refused([*DRY, "--learnin-rate", "1"], capsys)


def test_a_file_and_fields_without_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("preset: debug\ntrain: {learning_rate: 0.002}\ndata: {shards: here}\n")
    from lumina_ds.cli.config_options import resolve
    from lumina_ds.cli.train import command

    def config(*words: str) -> RunConfig:
        with command.make_context("train", list(words), obj={}) as context:
            return resolve(context).config

    found = config(
        "mine.yaml", "train.seed=7", "model.num_experts=2", "--train.max_steps=3", "--train.max_grad_norm", "2.0"
    )
    assert (found.train.learning_rate, found.data.shards) == (0.002, "here")
    assert (found.train.seed, found.model.num_experts, found.train.max_steps) == (7, 2, 3)
    assert config("--seed", "9", "mine.yaml").train.seed == 9
    assert config("--config", "mine.yaml", "data.tokenizer=x=y").data.tokenizer == "x=y"
    both = refused(["train", "--config", "debug", "mine.yaml", "--dry-run"], capsys)
    assert "--config debug and mine.yaml both name a configuration" in both
    assert "neither a preset nor a file" in refused(["train", "other.yaml", "--dry-run"], capsys)
    assert "unknown field train.sed" in refused(["train", "mine.yaml", "train.sed=1", "--dry-run"], capsys)
    assert "unknown argument debug" in refused(["train", "debug", "--dry-run"], capsys)
    assert "unknown argument seed=1" in refused(["train", "mine.yaml", "seed=1", "--dry-run"], capsys)
