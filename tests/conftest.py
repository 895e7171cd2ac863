"""Shared by all tests: real ranks as real processes."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rank_server import start_rank
from tiny_corpus import write_conversations

from lumina_ds.cli.main import cli, run_command

TESTS = Path(__file__).parent
CHECKOUT = TESTS.parent


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        # What several packages' tests share lies in tests/; pyproject.toml puts it on pytest's own path.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    }
    return os.environ | {name: str(value) for name, value in values.items()}


# (file, names of its marks) of every test that was collected, deselected ones too.
_COLLECTED = pytest.StashKey[list[tuple[Path, set[str]]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that start ranks are slow, but for the one spawn that --quick keeps; files of slow tests run first.

    Where two workers share the files (tests/run.sh), none is left alone with a long one at the end.
    """
    for item in items:
        if "run_ranks" in getattr(item, "fixturenames", ()) and item.get_closest_marker("quick") is None:
            item.add_marker(pytest.mark.slow)
    config.stash[_COLLECTED] = [(item.path, {mark.name for mark in item.iter_markers()}) for item in items]
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What stays until the end is left out of every later collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> list[tuple[Path, set[str]]]:
    """(file, names of its marks) of every test that was collected, deselected ones too."""
    return pytestconfig.stash[_COLLECTED]


@pytest.fixture
def processor_seconds() -> Callable[[], float]:
    """Processor time of the programs that ended so far: unlike the wall's, no other program lengthens it much."""

    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    return seconds


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run_ranks(script, *arguments) starts the script on two gloo ranks and returns the JSON that rank 0 wrote.

    The script gets the path of its result file as first argument. On a failure or after `timeout` seconds the
    whole group is ended and the ranks' output is shown.
    """

    def run(script: Path, *arguments: str, world_size: int = 2, timeout: float = 300) -> dict[str, Any]:
        result = tmp_path / "result.json"
        result.unlink(missing_ok=True)
        from lumina_ds.engine.world import free_port  # torch: not for tests that need none

        port = free_port()
        logs = [tmp_path / f"rank-{rank}.log" for rank in range(world_size)]
        ranks = [
            start_rank(script, [str(result), *arguments], rank_environment(rank, world_size, port), CHECKOUT, log)
            for rank, log in enumerate(logs)
        ]
        ends = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0.0, ends - time.monotonic()))
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.join()
        if any(code != 0 for code in codes):
            shown = []
            for rank, log in enumerate(logs):
                shown.append(f"--- rank {rank} ---\n{log.read_text()[-4000:]}")
            pytest.fail(f"ranks ended with {codes} (None: at the limit of {timeout} s)\n" + "\n".join(shown))
        return json.loads(result.read_text())

    return run


@dataclass(frozen=True)
class Corpus:
    """A tiny corpus, made once per test session through the command line."""

    train: Path
    eval: Path
    tokenizer: Path
    shards: Path
    eval_shards: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, lumina: Callable[..., None]) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    made = Corpus(
        write_conversations(folder / "train.jsonl", 150),
        write_conversations(folder / "eval.jsonl", 20, first=150),
        folder / "tokenizer.model",
        folder / "shards",
        folder / "eval-shards",
    )
    lumina("tokenizer", "train", made.train, "--vocab-size", 400, "--out", made.tokenizer)
    for source, out in ((made.train, made.shards), (made.eval, made.eval_shards)):
        lumina("preprocess", source, "--tokenizer", made.tokenizer, "--seq-length", 64, "--out", out)
    return made


@pytest.fixture(scope="session")
def lumina() -> Callable[..., None]:
    """lumina(*words) runs a lumina command in this process; it must succeed."""

    def run(*words: object) -> None:
        assert run_command(cli, [str(word) for word in words]) == 0, words

    return run
