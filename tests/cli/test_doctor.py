"""`lumina doctor` as a user runs it: what it prints, its exit code, its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.doctor.checks import CHECKS


def doctor(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lumina_ds", "doctor", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )


def test_a_line_per_check_within_seconds(processor_seconds: Callable[[], float]) -> None:
    before = processor_seconds()
    done = doctor()
    seconds = processor_seconds() - before
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "warning ", "fault "))]
    assert len(lines) == len(CHECKS)
    assert done.stdout.splitlines()[-1].endswith("0 faults")
    # 2.3 s on a CPU; the rest is for slower ones.
    assert seconds < 6


@pytest.mark.slow
def test_json_is_one_document_and_verbose_asks_the_ops() -> None:
    done = doctor("--json", "--verbose")
    document = json.loads(done.stdout)
    assert document["can_train"] is True
    findings = {finding["check"]: finding for finding in document["findings"]}
    assert len(findings) == len(CHECKS)
    assert any(line.startswith("cpu_adam: can") for line in findings["DeepSpeed ops"]["details"])


@pytest.mark.slow
def test_a_fault_gives_exit_code_4(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node1 slots=2\nnode2 slots=2\n")
    (tmp_path / "bin").mkdir()
    done = doctor("--hostfile", tmp_path / "hostfile", "--json", PATH=str(tmp_path / "bin"))
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        "error: training cannot run here: pdsh, host node1, host node2; mend what is marked fault"
    ]
    assert json.loads(done.stdout)["can_train"] is False


def test_a_missing_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["doctor", "--hostfile", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err
