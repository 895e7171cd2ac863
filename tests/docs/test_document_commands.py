"""Every command of the documents, executed in their order in one folder, on a small corpus and a few steps instead of 400.

A line of a bash block is executed here, or it begins with a prefix of ELSEWHERE, whose test executes it. Anything else
fails. A command that stands on several pages runs once. Runs other than the quickstart's are dry ones.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import GENERATED, ROOT, all_pages, as_lumina, split, without_assignments

from lumina_ds.cli.main import VERBS, cli, run_command

# A smaller vocabulary, which is above the 262 ids of bytes and markers, and a shorter run.
SMALLER = {
    "--vocab-size 1024": "--vocab-size 390",
    "--max-steps 400": "--max-steps 4",
    "--stop-at-step 200": "--stop-at-step 2",
}
# Started for real by the files named.
ELSEWHERE = {
    "bash launch/quickstart.sh": "tests/launch/test_quickstart.py",
    "python launch/chitchat_to_jsonl.py": "tests/launch/test_chitchat.py",
    "bash tests/run.sh": ".ci/run",
    "python3 -m venv .venv": "launch/environment.sh",
    ". .venv/bin/activate": "launch/environment.sh",
    "pip install": "launch/environment.sh",
    "kubectl apply -f launch/kubernetes.yaml": "tests/launch/test_cluster_scripts.py",
    "kubectl apply -f launch/kubernetes-elastic.yaml": "tests/launch/test_cluster_scripts.py",
    "torchrun --nnodes": "tests/train/test_elastic_runs.py",
    "mpirun -n 5 python -m preprocess --mpi": "tests/preprocess/test_mpi.py",
    "python tests/benchmarks/bench_memory.py": "tests/benchmarks/test_bench_memory.py",
    "python tests/benchmarks/bench_moe_layer.py": "tests/benchmarks/test_bench_moe_layer.py",
    "python tests/benchmarks/bench_preprocess.py": "tests/benchmarks/test_bench_preprocess.py",
    'eval "$(lumina completion bash)"': "tests/cli/test_completion.py",
    "lumina bench train": "tests/cli/test_bench_train_and_profile.py",
    "lumina profile": "tests/cli/test_bench_train_and_profile.py",
    "lumina plan rehearse": "tests/measure/test_rehearsal.py",
    "lumina selftest": "tests/measure/selftest/test_selftest.py",
    "lumina plan verify": "tests/plan/test_plan_verify.py",
    "lumina gguf": "tests/export/test_other_loaders.py",
    "ruff ": "tests/run.sh",
    "mypy": "tests/run.sh",
    "python -m pytest": "tests/run.sh",
    "pre-commit install": ".pre-commit-config.yaml",
    "python docs/references.py": "tests/docs/test_references.py",
    "python docs/pictures/draw.py": "tests/docs/test_pictures.py",
    "zensical build": "tests/docs/test_site.py",
}
# Programs that take minutes and have no test: their --help must list the options shown.
BY_HELP = ("python tests/benchmarks/bench_step.py", "python tests/benchmarks/bench_mfu.py")


def shown_commands() -> list[str]:
    """Lines of bash blocks, then commands in the text that are whole: with arguments, and no placeholder among them."""
    lines: dict[str, None] = {}
    for page in all_pages():
        spans = [] if page.path.name in GENERATED else page.code_spans()
        whole = [span for span in spans if span.startswith("lumina ") and _is_whole(span)]
        lines |= dict.fromkeys([*page.shown_commands(), *whole])
    return list(lines)


def _is_whole(span: str) -> bool:
    words = span.split()[1:]
    named = any(word.startswith("--") and word != "--help" for word in words) or words[:2] == ["presets", "show"]
    return named and not any(word.isupper() or word == "..." for word in words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Any) -> Path:
    """What a reader has: conversations, a hostfile, prompts; shards/train is the reader's own shard folder."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "quickstart").mkdir()
    for source, name in ((corpus.train, "quickstart/train.jsonl"), (corpus.eval, "quickstart/eval.jsonl")):
        shutil.copyfile(source, folder / name)
    shutil.copyfile(corpus.train, folder / "chats.jsonl")
    [mixture] = [block for page in all_pages() if page.path.name == "mixtures.md" for block in page.blocks("yaml")]
    (folder / "mixture.yaml").write_text(mixture)
    (folder / "theirs.yaml").write_text("base_model: some/model\nmicro_batch_size: 2\n")
    (folder / "llama-3.2-1b").mkdir()
    [model] = [block for page in all_pages() if page.path.name == "planner.md" for block in page.blocks("json")]
    (folder / "llama-3.2-1b" / "config.json").write_text(model)
    (folder / "hostfile").write_text("localhost slots=8\n")
    (folder / "questions.jsonl").write_text('{"prompt": "what is 3 plus 4?"}\n')
    (folder / "shards").mkdir()
    (folder / "shards/train").symlink_to(folder / "quickstart/shards/train")
    return folder


def execute(line: str, trained: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    for real, small in SMALLER.items():
        line = line.replace(real, small)
    words = as_lumina(split(line))
    assert words[0] == "lumina", f"no test executes this command, and none is named in ELSEWHERE: {line}"
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


def _is_setting(line: str) -> bool:
    return re.fullmatch(r"export [A-Z_]+=\S+", line) is not None


def _begins(line: str, prefixes: tuple[str, ...]) -> bool:
    return line.startswith(prefixes) or " ".join(without_assignments(line.split())).startswith(prefixes)


@pytest.mark.slow
def test_every_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    executed, trained, failed = [], [], []
    for line in shown_commands():
        if _begins(line, (*ELSEWHERE, *BY_HELP)) or _is_setting(line):
            continue
        code = execute(line, trained, folder, monkeypatch)
        printed = capfd.readouterr()
        if code:
            failed.append(f"{line}: {code}\n{printed.out[-1500:]}\n{printed.err[-1500:]}")
        executed.append(line)
    assert not failed, "\n".join(failed)
    assert len(trained) == 2 and len(executed) > 50
    left_out = {"completion", *(prefix.split()[1] for prefix in ELSEWHERE if prefix.startswith("lumina "))}
    assert {line.split()[1] for line in executed if line.startswith("lumina")} >= set(VERBS) - left_out
    for made in (
        "exported/config.json",
        "start/config.yaml",
        "validation.html",
        "shards.html",
        "masks.html",
        "compared.html",
        "replies.jsonl",
    ):
        assert (folder / made).is_file(), made


def test_commands_that_run_elsewhere_are_shown_and_have_a_test() -> None:
    commands = shown_commands()
    assert [prefix for prefix in ELSEWHERE if not any(_begins(line, (prefix,)) for line in commands)] == []
    assert [test for test in ELSEWHERE.values() if not (ROOT / test).is_file()] == []


@pytest.mark.slow
def test_long_programs_take_the_options_shown() -> None:
    lines = [line for line in shown_commands() if _begins(line, BY_HELP)]
    assert len(lines) >= len(BY_HELP)
    for program in BY_HELP:
        words = [sys.executable, *program.split()[1:], "--help"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for line in lines:
            if _begins(line, (program,)):
                assert [word for word in split(line) if word.startswith("--") and word not in done.stdout] == [], line
