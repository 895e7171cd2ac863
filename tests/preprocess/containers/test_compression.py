"""Compressed streams: several, padded, damaged, and windows that are too large."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from written import zstd

from lumina_ds.errors import DataError
from preprocess.sources import resolve_inputs

TEXT = b"one\ntwo \xc3\xa9\n" * 30_000


def read(path: Path) -> bytes:
    (file,) = resolve_inputs([str(path)])
    return b"".join(block.data for block in file.blocks(5000))


def test_gzip_members_and_zeros(tmp_path: Path) -> None:
    """cat joins members; tapes and disks fill the last block with zeros."""
    path = tmp_path / "a.gz"
    for between in (b"", bytes(1), bytes(512), bytes(200_000)):
        path.write_bytes(gzip.compress(TEXT) + gzip.compress(b"") + between + gzip.compress(TEXT) + between)
        assert read(path) == TEXT + TEXT, len(between)


def test_zstd_frames(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(zstd(TEXT) + zstd(b"") + zstd(TEXT))
    assert read(tmp_path / "a") == TEXT + TEXT


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda packed: packed[:-10],
    "half": lambda packed: packed[: len(packed) // 2],
    "checksum": lambda packed: packed[:-8] + b"\x01\x02\x03\x04" + packed[-4:],
    "length": lambda packed: packed[:-4] + b"\x01\x02\x03\x04",
    "data": lambda packed: packed[:200] + b"damage" + packed[206:],
    "second cut": lambda packed: packed + packed[:-10],
    "second header cut": lambda packed: packed + packed[:5],
    "junk": lambda packed: packed + b"junk junk",
    "junk after zeros": lambda packed: packed + bytes(70_000) + b"junk junk",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_gzip_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DAMAGE[name](gzip.compress(os.urandom(3000) + TEXT)))
    with pytest.raises(DataError, match=f"cannot read {path}: .") as caught:
        read(path)
    assert "\n" not in str(caught.value)


# A frame of one block of 5 bytes whose header asks for a window of 2^28 bytes (RFC 8878, 3.1.1.1.2).
LARGE_WINDOW = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(28 - 10) << 3]) + bytes([5 << 3 | 1, 0, 0]) + b"line\n"


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_a_window_that_is_too_large_has_a_remedy(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(LARGE_WINDOW)
    says = r"its zstd window is above 128 MiB.*`zstd -dc --long=31 FILE \| lumina \.\.\. -`"
    if way == "file":
        with pytest.raises(DataError, match=says):
            read(path)
        return
    with path.open() as file, monkeypatch.context() as patched:
        patched.setattr("sys.stdin", file)
        with pytest.raises(DataError, match=f"cannot read standard input: {says}"):
            list(resolve_inputs(["-"])[0].blocks())


def test_the_remedy_works(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("no zstd here")
    path = tmp_path / "a.zst"
    path.write_bytes(LARGE_WINDOW)
    command = ["zstd", "-dc", "--long=31", str(path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"line\n"
