"""A run that dies goes on from its last sealed block and ends as if it had never died."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumina_ds.data.shards.manifest import Manifest, Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError, DataError, MachineError
from preprocess import journal, workers
from preprocess.pipeline import preprocess_files
from preprocess.sources import Block
from preprocess.train_tokenizer import train_tokenizer

SCRIPT = Path(__file__).with_name("interrupted_run.py")
BLOCK_BYTES = 4000


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(inputs: Path | str, tokenizer: Tokenizer, out: Path, **options: Any) -> Manifest:
    settings = Settings(seq_length=options.pop("seq_length", 64), eval_fraction=0.2)
    return preprocess_files(
        [str(inputs)], tokenizer.path, out, settings, block_bytes=options.pop("block_bytes", BLOCK_BYTES), **options
    )


@pytest.fixture
def chats(chats: Path) -> Path:
    """The common ones after a line that is refused."""
    chats.write_text("not json\n" + chats.read_text())
    return chats


class Encoder:
    """Stands before encode_block: counts blocks, and can be interrupted before one of them."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.interrupt_after = 1 << 30
        self._encode = workers.encode_block

    def __call__(self, block: Any, *arguments: Any) -> Any:
        if len(self.lines) == self.interrupt_after:
            raise KeyboardInterrupt
        self.lines.append(block.first_line)
        return self._encode(block, *arguments)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    encoder = Encoder()
    monkeypatch.setattr(workers, "encode_block", encoder)
    monkeypatch.setattr(journal, "SEAL_EVERY_SECONDS", 0)
    return encoder


@pytest.fixture
def interrupted(chats: Path, tokenizer: Tokenizer, tmp_path: Path, encoder: Encoder) -> Iterator[Path]:
    """OUT of a run that was interrupted with six blocks sealed; `encoder` counts from nought again."""
    encoder.interrupt_after = 6
    with pytest.raises(KeyboardInterrupt):
        run(chats, tokenizer, tmp_path / "out")
    encoder.lines, encoder.interrupt_after = [], 1 << 30
    yield tmp_path / "out"


@pytest.fixture
def expected(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, bytes]:
    run(chats, tokenizer, tmp_path / "whole")
    return content(tmp_path / "whole")


def test_sealed_blocks_are_not_tokenized_again(
    expected: dict[str, bytes], interrupted: Path, chats: Path, tokenizer: Tokenizer, encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    texts: list[str] = []
    encode = Tokenizer.encode_utf8
    monkeypatch.setattr(
        Tokenizer, "encode_utf8", lambda self, batch, symbol: texts.extend(batch.split()) or encode(self, batch, symbol)
    )
    run(chats, tokenizer, interrupted)
    assert content(interrupted) == expected
    assert not interrupted.with_name("out.partial").exists() and not interrupted.with_name("out.partial.lock").exists()
    first = encoder.lines[0]
    lines = chats.read_text().splitlines()
    assert first > 20 and len("\n".join(lines[: first - 1])) > 5 * BLOCK_BYTES
    assert 0 < len(texts) == sum(line.count('"role"') for line in lines[first - 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment(chats: Path, tokenizer: Tokenizer, tmp_path: Path, seed: int) -> None:
    """Two deaths at random events, then a whole run, in real processes that die by SIGKILL."""
    big = tmp_path / "big.jsonl"
    big.write_bytes(chats.read_bytes() * 30)

    def start(fatal: int, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), str(fatal), str(big), str(tokenizer.path), str(out)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    whole = start(0, tmp_path / "all")
    num_events = int(whole.stdout)
    assert num_events > 50 and len(list((tmp_path / "all").glob("shard-*"))) == 2
    generator = random.Random(seed)
    # One in the first half, one among the last events: packing, manifests and the renames. Blocks are sealed by the
    # clock too, so a quicker run has fewer events, and may end before its death.
    for fatal in (generator.randint(2, num_events // 2), num_events - generator.randint(0, 14)):
        out = tmp_path / f"out-{fatal}"
        survivors = [0] if fatal > num_events // 2 else []
        assert start(fatal, out).returncode in (-signal.SIGKILL, *survivors)
        start(generator.randint(2, 60), out)
        done = start(0, out)
        assert done.returncode == 0, done.stderr
        assert content(out) == content(tmp_path / "all"), f"killed at event {fatal} of {num_events}"
        assert not out.with_name(f"{out.name}.partial").exists()


def test_changed_input_keeps_the_blocks_before_the_change(
    interrupted: Path, chats: Path, tokenizer: Tokenizer, encoder: Encoder, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data = bytearray(chats.read_bytes())
    position = data.index(b"fox", 2 * BLOCK_BYTES + 1000)
    data[position : position + 3] = b"dog"
    chats.write_bytes(data)
    run(chats, tokenizer, interrupted)
    assert "the input is not that of the unfinished run from its block 3 on" in caplog.text
    num_encoded = len(encoder.lines)
    run(chats, tokenizer, tmp_path / "again")
    assert content(interrupted) == content(tmp_path / "again")
    assert num_encoded == len(encoder.lines) - num_encoded - 2


@pytest.mark.parametrize("longer", [True, False])
def test_input_that_grew_or_shrank(
    interrupted: Path, chats: Path, tokenizer: Tokenizer, tmp_path: Path, longer: bool
) -> None:
    data = chats.read_bytes()
    chats.write_bytes(data + data[:5000] if longer else data[: 3 * BLOCK_BYTES + 77])
    run(chats, tokenizer, interrupted)
    run(chats, tokenizer, tmp_path / "again")
    assert content(interrupted) == content(tmp_path / "again")


def test_other_settings_start_over(
    interrupted: Path, chats: Path, tokenizer: Tokenizer, encoder: Encoder, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run(chats, tokenizer, interrupted, seq_length=48)
    assert "out.partial is an unfinished run with another seq length; starting from the beginning" in caplog.text
    assert encoder.lines[0] == 1
    run(chats, tokenizer, tmp_path / "again", seq_length=48)
    assert content(interrupted) == content(tmp_path / "again")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["result/shard-00000.arrow", "result/eval/shard-00000.arrow", "train.lengths", "result/rejected.jsonl"])  # fmt: skip
@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, path.stat().st_size - 1), os.remove])
def test_damaged_output_starts_over(
    expected: dict[str, bytes], interrupted: Path, chats: Path, tokenizer: Tokenizer, encoder: Encoder, name: str,
    damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = interrupted.with_name("out.partial") / name
    damage(path)
    run(chats, tokenizer, interrupted)
    assert f"{path.name} is" in caplog.text and "starting from the beginning" in caplog.text
    assert content(interrupted) == expected and encoder.lines[0] == 1


def test_damaged_journal_ends_at_the_damage(
    expected: dict[str, bytes], interrupted: Path, chats: Path, tokenizer: Tokenizer, encoder: Encoder
) -> None:
    path = interrupted.with_name("out.partial") / "journal"
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 1 + 6 + 1
    lines[4] = lines[4].replace(b'"num_tokens":', b'"num_tokens":1')
    path.write_bytes(b"\n".join(lines))
    run(chats, tokenizer, interrupted)
    assert content(interrupted) == expected
    assert len(encoder.lines) > 3 and encoder.lines[0] > 1


def test_standard_input_resumes(
    chats: Path, tokenizer: Tokenizer, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pipe() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(chats.read_bytes()))))

    out = tmp_path / "piped"
    encoder.interrupt_after = 3
    pipe()
    with pytest.raises(KeyboardInterrupt):
        run("-", tokenizer, out)
    encoder.lines, encoder.interrupt_after = [], 1 << 30
    pipe()
    run("-", tokenizer, out)
    assert encoder.lines[0] > 1
    pipe()
    run("-", tokenizer, tmp_path / "again")
    assert content(out) == content(tmp_path / "again")


def test_errors_of_the_data_leave_nothing(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than --max-rejected 0"):
        run(chats, tokenizer, tmp_path / "out", max_rejected=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "out.rejected.jsonl"]


def test_a_full_disk_is_one_line_and_resumable(
    expected: dict[str, bytes], chats: Path, tokenizer: Tokenizer, tmp_path: Path, encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            MachineError, match=r"cannot write .*out: No space left on device; make room, and the same command goes on"
        ):
            run(chats, tokenizer, tmp_path / "out")
    run(chats, tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_an_input_that_breaks_off_loses_nothing(
    chats: Path, tokenizer: Tokenizer, tmp_path: Path, encoder: Encoder
) -> None:
    packed = gzip.compress(chats.read_bytes() * 20)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(packed[: len(packed) // 2])
    for _ in range(2):  # again without mending it
        with pytest.raises(DataError, match=r"Truncated .*; mend it, and the same command goes on after the blocks in"):
            run(broken, tokenizer, tmp_path / "out", block_bytes=100_000)
    encoder.lines = []
    broken.write_bytes(packed)
    run(broken, tokenizer, tmp_path / "out", block_bytes=100_000)
    assert encoder.lines[0] > 100
    run(broken, tokenizer, tmp_path / "again", block_bytes=100_000)
    assert content(tmp_path / "out") == content(tmp_path / "again")
    # nothing to go on from, so nothing left
    broken.write_bytes(packed[:12])
    with pytest.raises(DataError, match=r"Truncated compressed stream$"):
        run(broken, tokenizer, tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


@pytest.mark.slow
def test_two_runs_into_one_folder(chats: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and gets the folder once that is killed, workers and all."""
    # For a Unigram model SentencePiece encodes, so workers are processes.
    tokenizer = train_tokenizer([str(chats)], 330, tmp_path / "unigram.model", "unigram")
    big = tmp_path / "big.jsonl"
    big.write_bytes(chats.read_bytes() * 400)
    options = [
        "--tokenizer",
        str(tokenizer.path),
        "--seq-length",
        "64",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "3",
    ]
    command = [sys.executable, "-m", "preprocess", str(big), *options]
    first = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        started = psutil.Process(first.pid)
        while (
            not (tmp_path / "out.partial").exists() or len(started.children()) < 3
        ):  # a tracker, two workers beside itself
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=r"another run is writing .*out; wait for it, or choose another --out"):
            run(chats, tokenizer, tmp_path / "out")
        children = started.children(recursive=True)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers outlive the process that was killed"
    assert (tmp_path / "out.partial.lock").exists()
    run(chats, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "big.jsonl", "chats.jsonl", "out", "unigram.model",
    ]  # fmt: skip


def test_publishing_over_an_old_folder_is_resumable(
    expected: dict[str, bytes], interrupted: Path, chats: Path, tokenizer: Tokenizer
) -> None:
    """Death between the two renames leaves no OUT; the next run makes it."""
    shutil.copytree(interrupted.with_name("whole"), interrupted.with_name("out.partial") / "result-replaced")
    run(chats, tokenizer, interrupted, overwrite=True)
    assert content(interrupted) == expected


def test_a_tokenizer_replaced_in_the_middle_is_noticed(tokenizer: Tokenizer) -> None:
    """Workers load the file for themselves: they must not take another one for it."""
    with pytest.raises(DataError, match="is another file than where this run began"):
        workers._encode_elsewhere(tokenizer.path, "0" * 64, workers.EncodeOptions(), Block("s", 1, 0, b""))
