"""Names, files and documents that somebody else wrote."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from lumina_ds.foreign_files import (
    MAX_DEPTH,
    ForeignFileError,
    NotStrictJson,
    is_plain_name,
    open_plain,
    read_bounded,
    read_json,
    strict_json,
)


@pytest.mark.parametrize(
    ("name", "is_plain"),
    [
        ("shard-00000.arrow", True), (".hidden", True), ("a b", True), ("Größe", True), ("..a", True), ("a" * 255, True),
        ("", False), (".", False), ("..", False), ("../a", False), ("/etc/passwd", False), ("a/b", False),
        ("a\\b", False), ("a\0b", False), ("a\nb", False), ("\x7f", False), ("a" * 256, False), ("ö" * 128, False),
    ],
)  # fmt: skip
def test_names(name: str, is_plain: bool) -> None:
    assert is_plain_name(name) is is_plain


def test_only_regular_files_are_opened_and_none_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "to_fifo").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, kind in (("fifo", "a FIFO"), ("socket", "a socket"), ("to_fifo", "a FIFO"), (".", "a folder")):
        with pytest.raises(ForeignFileError, match=kind):
            open_plain(tmp_path / name)
    with pytest.raises(ForeignFileError, match="a device"):
        read_bounded("/dev/zero")
    with pytest.raises(ForeignFileError, match="a link"):
        open_plain(tmp_path / "link", follow_links=False)
    with pytest.raises(OSError, match="symbolic links"):
        open_plain(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "none")
    assert read_bounded(tmp_path / "link") == read_bounded(tmp_path / "real", follow_links=False) == b"content"


def test_no_more_bytes_than_are_expected(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    assert read_bounded(path, 1000) == b"x" * 1000
    with pytest.raises(ForeignFileError, match="larger than 999 bytes"):
        read_bounded(path, 999)
    os.truncate(path, 1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(ForeignFileError, match="larger"):
        read_bounded(path)
    # Files of the kernel say that they have no bytes.
    assert len(read_bounded("/proc/self/maps")) > 100
    with pytest.raises(ForeignFileError, match="larger than 100 bytes"):
        read_bounded("/proc/self/maps", 100)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        (b"[NaN]", "NaN"), (b"-Infinity", "Infinity"), (b"1e999", "out of range"), (b"9" * 4301, "4300 digits"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deeper"), (b"[" * 200_000, "deeper"),
        (b'{"a":' * 200_000, "deeper"), (b'"\\ud800"', "surrogate"), (b"\xff", "UTF-8"), (b"", "invalid JSON"),
        (b"{} {}", "invalid JSON"), (b"\xef\xbb\xbf{}", "invalid JSON"),
    ],
)  # fmt: skip
def test_what_is_no_strict_json(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotStrictJson, match=reason):
        strict_json(content)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ForeignFileError, match=reason):
        read_json(tmp_path / "file")


def test_strict_json_at_its_bounds() -> None:
    assert strict_json(b'{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"]}') == {"a": [1, -2500.0, True, None, "😀"]}
    assert strict_json(b"9" * 4300) == int("9" * 4300)
    deep = strict_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (deep,) = deep
    assert deep == []


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    """Counting each of 300,000 keys would take hours."""
    keys = ",".join(f'"k{n}":0' for n in range(300_000))
    done: list[str] = []

    def read() -> None:
        with pytest.raises(NotStrictJson) as found:
            strict_json(f'{{{keys},"k299999":0}}'.encode())
        done.append(str(found.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert done == ["the key 'k299999' stands twice"]
