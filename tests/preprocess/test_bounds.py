"""Hostile and huge inputs: bounded memory and time, and nothing vanishes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from lumina_ds.data.shards.manifest import Manifest, Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess.containers import compression
from preprocess.pipeline import preprocess_files
from preprocess.sources import resolve_inputs
from preprocess.validation.validate import validate_files

CHECKOUT = Path(__file__).parent.parent.parent


def peak_bytes(pieces: Iterator[bytes], tokenizer: Tokenizer, out: Path) -> tuple[int, dict[str, int]]:
    """(peak memory of `python -m preprocess -` fed with `pieces`, its manifest's totals)."""
    command = [sys.executable, "-m", "preprocess", "-", "--tokenizer", str(tokenizer.path)]
    with (out.parent / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--seq-length", "256", "--out", str(out)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=CHECKOUT,
        )  # fmt: skip
        assert process.stdin is not None
        for piece in pieces:
            process.stdin.write(piece)
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (out.parent / "log").read_text()
    return usage.ru_maxrss << 10, json.loads((out / "manifest.json").read_text())["totals"]


@pytest.mark.slow
def test_row_27_memory_is_flat_and_a_giant_line_adds_little(
    tokenizer: Tokenizer, tmp_path: Path, make_lines: Callable[..., list[str]]
) -> None:
    lines = make_lines(3000)
    chunk = ("\n".join(lines) + "\n").encode()
    chunk *= 4_000_000 // len(chunk)

    def corpus(num_chunks: int) -> Iterator[bytes]:
        yield from [chunk] * num_chunks

    def with_giant_line() -> Iterator[bytes]:
        """A good message of 1 GiB between good lines, and one that nests 10^5 deep."""
        yield from corpus(1)
        yield b'{"messages": [{"role": "assistant", "content": "'
        for _ in range(1 << 10):
            yield b"x" * (1 << 20)
        yield b'"}]}\n' + b"[" * 100_000 + b"\n"
        yield from corpus(1)

    small, few = peak_bytes(corpus(4), tokenizer, tmp_path / "small")
    large, many = peak_bytes(corpus(12), tokenizer, tmp_path / "large")
    assert many["conversations"] == 3 * few["conversations"]
    assert large < small + (48 << 20), f"{small >> 20} MiB for 16 MB of input, {large >> 20} MiB for 48 MB"
    giant, totals = peak_bytes(with_giant_line(), tokenizer, tmp_path / "giant")
    assert totals["rejected_by_rule"] == {"line too long": 1, "nested too deeply": 1}
    assert 2 * totals["conversations"] == few["conversations"]
    assert giant < small + (96 << 20), f"{giant >> 20} MiB with a line of 1 GiB"


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(compression, "EXPANSION_FREE_BYTES", 8 << 20)
    return 8 << 20


def bomb(path: Path, codec: str, text: bytes, piece: bytes, num_bytes: int) -> Path:
    """`text`, then `piece` again and again until `num_bytes` are reached, compressed as tightly as it goes."""
    if codec == "gzip":
        packer = zlib.compressobj(9, wbits=31)
        parts = [
            packer.compress(text),
            *(packer.compress(piece) for _ in range(num_bytes // len(piece))),
            packer.flush(),
        ]
        path.write_bytes(b"".join(parts))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text)
            for _ in range(num_bytes // len(piece)):
                stream.write(piece)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("piece", [b"\n" * 4096, b"x" * 4096], ids=["blank lines", "one line"])
def test_row_27_compression_bombs(
    codec: str, piece: bytes, chats: Path, tokenizer: Tokenizer, tmp_path: Path, small_limit: int
) -> None:
    hidden = bomb(tmp_path / "bomb.jsonl", codec, chats.read_bytes(), piece, 1 << 28)
    assert hidden.stat().st_size < (1 << 20)
    started = time.monotonic()
    manifest = run([hidden, chats], tokenizer, tmp_path / "out")
    assert time.monotonic() - started < 20
    totals = manifest.totals
    assert totals.conversations == 600, "the good lines before and after it are kept"
    assert totals.rejected_by_rule["compression bomb"] == 1
    assert totals.lines == totals.conversations + totals.rejected
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert rejected[-1]["source"] == "bomb.jsonl" and "decompress it first" in rejected[-1]["reason"]
    assert rejected[-1]["byte_offset"] < 100 << 20
    assert manifest.inputs[0].size_bytes == hidden.stat().st_size
    findings = validate_files([str(hidden)])
    assert findings.rules["compression bomb"].count == 1 == findings.num_errors and findings.conversations == 300
    assert "decompress it first" in findings.rules["compression bomb"].examples[0].reason


def test_ordinary_compression_is_no_bomb(chats: Path, tokenizer: Tokenizer, tmp_path: Path, small_limit: int) -> None:
    path = tmp_path / "repeated.jsonl.gz"
    path.write_bytes(gzip.compress(chats.read_bytes() * 200, 9))
    (file,) = resolve_inputs([str(path)])
    blocks = list(file.blocks())
    assert sum(len(block.data) for block in blocks) == 200 * chats.stat().st_size > small_limit
    assert not any(block.is_bomb for block in blocks)


def run(files: list[Path], tokenizer: Tokenizer, out: Path) -> Manifest:
    return preprocess_files([str(file) for file in files], tokenizer.path, out, Settings(seq_length=64))
