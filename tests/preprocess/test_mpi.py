"""The offline stage over real MPI ranks writes what one process writes."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.cli.main import run_command
from lumina_ds.cli.preprocess import command
from lumina_ds.data.tokenizer.tokenizer import Tokenizer

MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None, reason="needs mpirun and mpi4py (extra mpi)"
)


def mpirun(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    assert MPIRUN is not None
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(num_ranks)),
            *(sys.executable, "-m", "preprocess", "--mpi", *map(str, arguments)),
        ],
        capture_output=True, text=True, timeout=120, env=environment, cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def big(tmp_path: Path, make_lines: Callable[..., list[str]]) -> Path:
    """Five blocks of the command line's size."""
    path = tmp_path / "big.jsonl"
    text = "\n".join(["not json", *make_lines(2000)]) + "\n"
    path.write_text(text * (20_000_000 // len(text)))
    return path


@pytest.mark.slow
@needs_mpi
def test_two_ranks_write_what_one_process_writes(big: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = ["--tokenizer", str(tokenizer.path), "--seq-length", "64", "--eval-fraction", "0.1"]
    done = mpirun(2, big, *options, "--out", tmp_path / "ranks", "--json")
    assert done.returncode == 0, done.stderr
    assert run_command(command, [str(big), *options, "--out", str(tmp_path / "one")]) == 0
    assert content(tmp_path / "ranks") == content(tmp_path / "one")
    manifest = json.loads(done.stdout)  # rank 0 speaks alone
    assert manifest["totals"]["rejected"] > 1 and manifest["totals"]["held_out"] > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl", "one", "ranks"]


@pytest.mark.slow
@needs_mpi
def test_an_error_ends_all_ranks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = mpirun(
        2, tmp_path / "none.jsonl", "--tokenizer", tokenizer.path, "--seq-length", 64, "--out", tmp_path / "o"
    )
    assert done.returncode == 3
    assert done.stderr.count("no such file") == 1 and "Traceback" not in done.stderr


@needs_mpi
def test_one_rank_encodes_by_itself(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = ["--tokenizer", str(tokenizer.path), "--seq-length", "64"]
    assert mpirun(1, chats, *options, "--out", tmp_path / "rank").returncode == 0
    assert run_command(command, [str(chats), *options, "--out", str(tmp_path / "one")]) == 0
    assert content(tmp_path / "rank") == content(tmp_path / "one")


def test_without_mpi4py(
    chats: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError("No module named 'mpi4py'")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    arguments = [
        str(chats),
        "--tokenizer",
        str(tokenizer.path),
        "--seq-length",
        "64",
        "--out",
        str(tmp_path / "out"),
        "--mpi",
    ]
    assert run_command(command, arguments) == 4
    assert "--mpi needs mpi4py and an MPI library" in capsys.readouterr().err
    assert run_command(command, [*arguments, "--workers", "2"]) == 2
    assert "--mpi makes the ranks the workers" in capsys.readouterr().err
