"""Shell completion as a shell asks for it: bash itself runs the script that `lumina completion bash` prints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.cli.main import VERBS

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path):
    """A `lumina` on the path that is this checkout's."""
    script = tmp_path / "lumina"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{CHECKOUT}" exec "{sys.executable}" -c "{PROGRAM}" "$@"\n')
    script.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


PROGRAM = "import sys; sys.argv[0] = 'lumina'; from lumina_ds.cli.main import main; main()"


def complete(environment, *words):
    """What bash offers for the last of `words`."""
    script = (
        'eval "$(lumina completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); compopt() { :; }; '
        '_lumina_completion lumina; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_bash_completes_verbs_options_presets_and_choices(environment):
    assert complete(environment, "lumina", "") == list(VERBS)
    assert complete(environment, "lumina", "tr") == ["train"]
    assert complete(environment, "lumina", "checkpoint", "ver") == ["verify"]
    assert complete(environment, "lumina", "train", "--learning") == ["--learning-rate"]
    assert complete(environment, "lumina", "train", "--config", "m1") == ["m120_speed"]
    assert complete(environment, "lumina", "train", "--precision", "f") == ["fp32", "fp16"]
    assert complete(environment, "lumina", "bench", "train", "--config", "deb") == ["debug"]


@pytest.mark.slow
def test_bash_completes_fields_cards_runs_and_steps(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("one", "other"):
        (tmp_path / "runs" / run / "checkpoints" / "step-00000010").mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").write_text("preset: debug\n")
    fields = complete(environment, "lumina", "train", "--train.")
    assert "--train.learning_rate" in fields and all(field.startswith("--train.") for field in fields)
    assert complete(environment, "lumina", "train", "--train.lr") == ["--train.lr_scheduler_type"]
    assert complete(environment, "lumina", "train", "--train.optimizer", "m") == ["muon"]
    assert complete(environment, "lumina", "train", "train.see") == ["train.seed="]
    assert complete(environment, "lumina", "presets", "show", "m1") == ["m120_speed"]
    assert complete(environment, "lumina", "plan", "--gpu", "h100n") == ["h100nvl-94"]
    assert complete(environment, "lumina", "evaluate", "ru") == ["runs/one", "runs/other"]
    assert complete(environment, "lumina", "checkpoint", "verify", "runs/one/") == [
        "runs/one/checkpoints/step-00000010"
    ]
    assert complete(environment, "lumina", "config", "explain", "deepspeed.zero") == ["deepspeed.zero_stage"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_script(shell, environment, tmp_path):
    printed = subprocess.run(["lumina", "completion", shell], env=environment, capture_output=True, text=True)
    assert printed.returncode == 0 and f"_LUMINA_COMPLETE={shell}_complete" in printed.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script is printed, not run")
    script = tmp_path / "script"
    script.write_text(printed.stdout)
    assert subprocess.run([shell, "-n", script]).returncode == 0
