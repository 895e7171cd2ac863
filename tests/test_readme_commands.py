"""The README's commands, executed in its order in one folder, on a small corpus and a few steps instead of 400.

Installing, fetching and the scripts are the quickstart's (tests/launch), which a CI run executes as a whole.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_readme import TRAINERS, blocks, code_spans

from lumina_ds.cli.main import VERBS, cli, run_command

ROOT = Path(__file__).parent.parent
# A smaller vocabulary, which is above the 262 ids of bytes and markers, and a shorter run.
SMALLER = {
    "--vocab-size 1024": "--vocab-size 390",
    "--max-steps 400": "--max-steps 4",
    "--stop-at-step 200": "--stop-at-step 2",
}
# Started for real by the tests named.
ELSEWHERE = {
    "lumina bench train": "tests/cli/test_bench_train_and_profile.py",
    "lumina profile": "tests/cli/test_bench_train_and_profile.py",
    "lumina plan rehearse": "tests/engine/test_rehearsal.py",
    "lumina selftest": "tests/selftest/test_selftest.py",
    "lumina plan verify": "tests/plan/test_plan_verify.py",
    "lumina gguf": "tests/export/test_other_loaders.py",
}


def shown_commands() -> list[str]:
    """Lines of bash blocks, then commands in the text that are whole: with arguments, and no placeholder among them."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    spans = [span for span in code_spans() if span.startswith("lumina ")]
    return [line for line in lines if line.split()[0] in {"lumina", *TRAINERS}] + [s for s in spans if _is_whole(s)]


def _is_whole(span: str) -> bool:
    words = span.split()[1:]
    named = any(word.startswith("--") and word != "--help" for word in words) or words[:2] == ["presets", "show"]
    return named and not any(word.isupper() for word in words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Any) -> Path:
    """What a reader has: conversations, a hostfile, prompts; shards/train is the reader's own shard folder."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "quickstart").mkdir()
    for source, name in ((corpus.train, "quickstart/train.jsonl"), (corpus.eval, "quickstart/eval.jsonl")):
        shutil.copyfile(source, folder / name)
    shutil.copyfile(corpus.train, folder / "chats.jsonl")
    (folder / "hostfile").write_text("localhost slots=8\n")
    (folder / "questions.jsonl").write_text('{"prompt": "what is 3 plus 4?"}\n')
    (folder / "shards").mkdir()
    (folder / "shards/train").symlink_to(folder / "quickstart/shards/train")
    return folder


def execute(line: str, trained: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    for real, small in SMALLER.items():
        line = line.replace(real, small)
    words = shlex.split(line, comments=True)
    if words[0] in TRAINERS:
        words = ["lumina", "train", *words[words.index("launch/train.py") + 1 :]]
    if words[1] == "train" and "quickstart" in words:
        trained.append(line)
        command = [sys.executable, "-m", "lumina_ds", *words[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=folder, env=environment, timeout=300).returncode
    if words[1] == "train" and "--dry-run" not in words:
        place = words.index("--") if "--" in words else len(words)
        words.insert(place, "--dry-run")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return run_command(cli, words[1:])


def test_every_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commands = shown_commands()
    elsewhere = {prefix for prefix in ELSEWHERE if any(line.startswith(prefix) for line in commands)}
    assert elsewhere == set(ELSEWHERE), "a command is not shown any more"
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
    executed, trained = [], []
    for line in commands:
        if line.startswith(tuple(ELSEWHERE)):
            continue
        code = execute(line, trained, folder, monkeypatch)
        printed = capfd.readouterr()
        assert code == 0, f"{line}: {code}\n{printed.out[-1500:]}\n{printed.err[-1500:]}"
        executed.append(line)
    assert len(trained) == 2 and len(executed) > 30
    left_out = {"completion", *(prefix.split()[1] for prefix in ELSEWHERE)}
    assert {line.split()[1] for line in executed if line.startswith("lumina")} >= set(VERBS) - left_out
    for made in (
        "exported/config.json",
        "start/config.yaml",
        "validation.html",
        "shards.html",
        "masks.html",
        "replies.jsonl",
    ):
        assert (folder / made).is_file(), made
