"""Inputs: paths, globs, standard input, compression; and blocks that depend on the input alone."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from lumina_ds.errors import DataError
from preprocess import sources
from preprocess.sources import Block, read_blocks, resolve_inputs


class Trickle(io.BytesIO):
    """A stream that returns a byte or two at a time, as a pipe may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 1, 2))


@pytest.mark.parametrize("stream", [io.BytesIO, Trickle])
def test_blocks_by_hand(stream: type[io.BytesIO]) -> None:
    blocks = list(read_blocks(stream(b"ab\ncd\nefghij\nk"), "s", block_bytes=5))
    assert blocks == [
        Block("s", 1, 0, b"ab\n"),
        Block("s", 2, 3, b"cd\n"),
        Block("s", 3, 6, b"efghij\n"),
        Block("s", 4, 13, b"k"),
    ]


def test_nothing_is_lost_at_any_block_size() -> None:
    text = b"".join(b"x" * (number % 7) + b"\n" for number in range(50)) + b"tail"
    for size in range(1, 60):
        blocks = list(read_blocks(io.BytesIO(text), "s", size))
        assert b"".join(block.data for block in blocks) == text
        assert [block.byte_offset for block in blocks] == [text.find(block.data, block.byte_offset) for block in blocks]
        assert [block.first_line for block in blocks] == [
            1 + text[: block.byte_offset].count(b"\n") for block in blocks
        ]


def test_an_oversized_line_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10)
    text = b"a\n" + b"x" * 37 + b"\nb\nc\n" + b"y" * 30
    for size in (4, 5, 7):
        blocks = list(read_blocks(io.BytesIO(text), "s", size))
        oversized = [(block.first_line, block.byte_offset) for block in blocks if block.is_oversized]
        assert oversized == [(2, 2), (5, 44)]
        assert b"".join(block.data for block in blocks) == b"a\nb\nc\n"
        lines = {block.first_line: block.data for block in blocks if not block.is_oversized}
        assert lines[1] == b"a\n" and lines[3].startswith(b"b\n")


def test_an_oversized_line_is_never_held() -> None:
    class Endless:
        """A line of 1 GiB without an end, 1 MiB at a time."""

        left = 1 << 30

        def read(self, size: int) -> bytes:
            size = min(size, 1 << 20, self.left)
            self.left -= size
            return b"x" * size

    import tracemalloc

    tracemalloc.start()
    assert [block.is_oversized for block in read_blocks(Endless(), "s")] == [True]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


@pytest.mark.parametrize("name", ["c.jsonl.gz", "misnamed.jsonl", "c.jsonl.zst"])
def test_compression_is_told_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b"one\ntwo\n" * 1000
    if name.endswith("zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content[:4000]) + gzip.compress(content[4000:]))  # two members, as cat makes
    (file,) = resolve_inputs([str(path)])
    assert b"".join(block.data for block in file.blocks(100)) == content
    assert file.bytes_read == file.size_bytes == path.stat().st_size


def test_zstd_frames(tmp_path: Path) -> None:
    """Several, as cat makes them, after a skippable one, as pzstd writes it."""
    frame = pa.Codec("zstd").compress(b"one\ntwo\n" * 1000, asbytes=True)
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame * 3)
    blocks = resolve_inputs([str(path)])[0].blocks(100)
    assert b"".join(block.data for block in blocks) == b"one\ntwo\n" * 3000


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_damaged_compression_names_the_file(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "c.jsonl"
    with pa.CompressedOutputStream(str(path), codec) as stream:
        stream.write(os.urandom(5000))
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=r"cannot read .*c.jsonl: Truncated compressed stream"):
        list(resolve_inputs([str(path)])[0].blocks())


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    content = gzip.compress(b"line\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    (file,) = resolve_inputs(["-"])
    assert [block.data for block in file.blocks()] == [b"line\n"]
    entry = file.entry()
    assert (entry.name, entry.size_bytes, entry.sha256) == ("-", len(content), hashlib.sha256(content).hexdigest())


def test_globs_and_names(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/x.jsonl", "a/y.jsonl", "a/[z].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in resolve_inputs([f"{tmp_path}/a/?.jsonl"])] == ["x.jsonl", "y.jsonl"]
    # as many parts as tell them apart, and no more: the same names wherever the tree lies
    assert [file.name for file in resolve_inputs([f"{tmp_path}/*/x.jsonl"])] == ["a/x.jsonl", "b/x.jsonl"]
    assert [file.name for file in resolve_inputs([f"{tmp_path}/a/[z].jsonl"])] == ["[z].jsonl"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*none.jsonl"):
        resolve_inputs([f"{tmp_path}/none.jsonl"])
    with pytest.raises(DataError, match=r"is a folder; name its files"):
        resolve_inputs([str(tmp_path)])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe is no ordinary file; write `- < .*pipe` to read it as standard input"):
        resolve_inputs([f"{tmp_path}/pipe"])
    with pytest.raises(DataError, match="named twice"):
        resolve_inputs(["-", "-"])
