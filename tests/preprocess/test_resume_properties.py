"""Wherever a run dies, and whatever of the unsynced bytes a crash of the machine takes along, the next one ends with
the same bytes. Deaths are drawn by hypothesis; test_resuming.py has the same with SIGKILL in real processes."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.shards.writer import HashingFile
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess import journal
from preprocess.pipeline import preprocess_files

BLOCK_BYTES = 4000
NUM_EVENTS = 165  # about those of a whole run below


class Death(KeyboardInterrupt):
    """Passes every handler that a killed process would not run, but for the lock's."""


class Disk:
    """Stands before what a run does to its files: counts that, dies at one of the events, and knows what is synced."""

    def __init__(self, fatal: int, share_written: float) -> None:
        self.fatal = fatal
        self.share_written = share_written
        self.num_events = 0
        self.synced: dict[int, int] = {}  # bytes by inode

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        write, fsync = HashingFile.write, os.fsync

        def write_or_die(file: HashingFile, data: Any) -> int:
            with suppress(Death):
                self.event()
                return write(file, data)
            write(file, memoryview(data)[: int(len(data) * self.share_written)])
            file.flush()
            raise Death

        def sync(descriptor: int) -> None:
            self.event()
            fsync(descriptor)
            status = os.fstat(descriptor)
            self.synced[status.st_ino] = status.st_size

        patch.setattr(HashingFile, "write", write_or_die)
        patch.setattr(os, "fsync", sync)
        for name in ("replace", "rename", "unlink"):
            patch.setattr(os, name, self.before(getattr(os, name)))

    def event(self) -> None:
        self.num_events += 1
        if self.num_events == self.fatal:
            raise Death

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.event()
            return function(*arguments, **options)

        return call

    def lose_unsynced(self, folder: Path, share_kept: float) -> None:
        """Cut every file off somewhere between what was synced of it and its end."""
        for path in folder.rglob("*"):
            if path.is_file():
                status = path.stat()
                synced = min(self.synced.get(status.st_ino, 0), status.st_size)
                os.truncate(path, synced + int((status.st_size - synced) * share_kept))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DEATHS = st.lists(
    st.tuples(
        st.integers(2, NUM_EVENTS),  # event
        st.floats(0, 1),  # share of the last write that reaches the file
        st.none() | st.floats(0, 1),  # share of the unsynced bytes that a crash of the machine leaves; None: a kill
        st.sampled_from([0.0, 0.0, 1e9]),  # seal every block, or only at the end
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, make_lines: Callable[..., list[str]]) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    for number, lines in enumerate((["no JSON", *make_lines(60, seed=1)], make_lines(50, seed=2))):
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def expected(inputs: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(inputs, tokenizer, out, Disk(0, 0.0), 0.0)
    return content(out)


def run(inputs: list[str], tokenizer: Tokenizer, out: Path, disk: Disk, seal_every: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SEAL_EVERY_SECONDS", seal_every)
        disk.patch(patch)
        settings = Settings(seq_length=64, eval_fraction=0.2)
        preprocess_files(inputs, tokenizer.path, out, settings, block_bytes=BLOCK_BYTES)


@pytest.mark.slow
@settings(max_examples=18, deadline=None, derandomize=True)
@given(deaths=DEATHS)
def test_any_deaths(
    deaths: list[tuple[int, float, float | None, float]],
    inputs: list[str], tokenizer: Tokenizer, expected: dict[str, bytes],
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for fatal, share_written, share_kept, seal_every in deaths:
            disk = Disk(fatal, share_written)
            with suppress(Death):
                run(inputs, tokenizer, out, disk, seal_every)
            gc.collect()  # files that the dead run left open are flushed here, not into the next run's
            if share_kept is not None and not out.exists():
                disk.lose_unsynced(out.with_name("out.partial"), share_kept)
        run(inputs, tokenizer, out, Disk(0, 0.0), 0.0)
        assert content(out) == expected
        assert not out.with_name("out.partial").exists()  # a death at the very last event leaves the empty lock file


def test_the_deaths_cover_a_whole_run(inputs: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    disk = Disk(0, 0.0)
    run(inputs, tokenizer, tmp_path / "out", disk, 0.0)
    assert 0.9 * NUM_EVENTS < disk.num_events < 1.1 * NUM_EVENTS
