"""Shared by the planner's tests: the command line inside this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lumina_ds.cli.main import cli, run_command


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run_cli(*words) gives (exit code, stdout, stderr) of `lumina WORDS`."""

    def run(*words: object) -> tuple[int, str, str]:
        code = run_command(cli, [str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
