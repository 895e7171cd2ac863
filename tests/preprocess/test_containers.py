"""The same conversations give the same shards from every container; what is none is named with what to do."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.data.shards.manifest import Settings, read_manifest
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.containers import json_array
from preprocess.pipeline import preprocess_files
from preprocess.sources import resolve_inputs
from preprocess.train_tokenizer import train_tokenizer
from preprocess.validation.validate import validate_files

MARK = b"\xef\xbb\xbf"


def objects(text: bytes) -> list[object]:
    return [json.loads(line) for line in text.splitlines()]


def array_per_line(text: bytes) -> bytes:
    return b"[\n" + b",\n".join(text.splitlines()) + b"\n]\n"


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "byte order mark": lambda text: MARK + text,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "array, one object a line": array_per_line,
    "array, one line": lambda text: json.dumps(objects(text)).encode(),
    "array, pretty": lambda text: json.dumps(objects(text), indent=4, ensure_ascii=False).encode(),
    "array, CRLF and mark": lambda text: MARK + array_per_line(text).replace(b"\n", b"\r\n"),
    "array, xz": lambda text: lzma.compress(array_per_line(text)),
}


def shards(path: Path, tokenizer: Tokenizer, out: Path, block_bytes: int = 5000) -> dict[str, bytes]:
    settings = Settings(seq_length=64, eval_fraction=0.1)
    preprocess_files([str(path)], tokenizer.path, out, settings, block_bytes=block_bytes)
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.arrow"))}


@pytest.fixture(scope="module")
def text(make_lines: Callable[..., list[str]]) -> bytes:
    """Brackets, braces, quotes and commas in texts must be taken for text."""
    hard = {"messages": [{"role": "user", "content": '],}{["\\",\n'}, {"role": "assistant", "content": "[\u2028é\\"}]}
    lines = make_lines(100)
    return (
        "\n".join([*lines[:50], json.dumps(hard), *lines[50:], json.dumps(hard, ensure_ascii=False)]).encode() + b"\n"
    )


@pytest.mark.parametrize("name", CONTAINERS)
def test_equal_conversations_give_equal_shards(name: str, text: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for folder, content in (("plain", text), ("packed", CONTAINERS[name](text))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "chats").write_bytes(content)
    # The name of the input stands in the shards, so it is the same.
    expected = shards(tmp_path / "plain/chats", tokenizer, tmp_path / "a")
    assert set(expected) == {"shard-00000.arrow", "packing-64.arrow", "eval/shard-00000.arrow", "eval/packing-64.arrow"}
    found = shards(tmp_path / "packed/chats", tokenizer, tmp_path / "b")
    assert all(found[file] == expected[file] for file in expected if "packing" in file)
    rows = [
        pq_rows(tmp_path / side / file) for side in "ab" for file in ("shard-00000.arrow", "eval/shard-00000.arrow")
    ]
    assert rows[:2] == rows[2:]
    assert read_manifest(tmp_path / "b").totals == read_manifest(tmp_path / "a").totals
    # Where blocks of lines are cut alike, the files are the same byte for byte.
    assert shards(tmp_path / "packed/chats", tokenizer, tmp_path / "c", 1 << 20) == shards(
        tmp_path / "plain/chats", tokenizer, tmp_path / "d", 1 << 20
    )


def pq_rows(path: Path) -> list[dict[str, object]]:
    import pyarrow as pa

    rows: list[dict[str, object]] = pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()
    return rows


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 1 << 16])
def test_an_array_is_cut_alike_in_pieces_of_any_size(
    size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(json_array, "_splitter", lambda: json_array._split)
    splitter = json_array.ArraySplitter()
    array = b'[ {"a": "x\\\\\\"],["},\n {"b": [1, {"c": "}"}]}\n]\n'
    found = b"".join(splitter.split(array[at : at + size]) for at in range(0, len(array), size))
    # Every byte keeps its place, and the line end after the array ends no line of its own.
    assert found == b'  {"a": "x\\\\\\"],["}\n  {"b": [1, {"c": "}"}]} \n ' and len(found) == len(array)


def test_a_large_array_is_read_in_bounded_memory(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "large.json"
    element = text.splitlines()[0]
    with path.open("wb") as file:
        file.write(b"[" + element)
        for _ in range(40):
            file.write((b",\n" + element) * 1000)
        file.write(b"]")
    (opened,) = resolve_inputs([str(path)])
    blocks = [(len(block.data), block.data.count(b"\n")) for block in opened.blocks(100_000)]
    assert max(size for size, _ in blocks) < 102_000 and sum(lines for _, lines in blocks) == 40_001


def conversation(i: int, answer: str = "good") -> bytes:
    messages = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}).encode()


def array(elements: list[bytes], between: bytes = b",\n") -> bytes:
    return b"[" + between.join(elements) + b"]"


def with_damage(old: bytes, new: bytes, after: list[bytes] | None = None) -> bytes:
    """An array of 300 conversations, the 31st of which is damaged."""
    elements = [conversation(i) for i in range(300)]
    assert elements[30].count(old)
    elements[30] = elements[30].replace(old, new, 1)
    return array(elements + (after or []))


UNBALANCED = "the JSON array does not end, or its brackets do not match"
WHOLE = array([conversation(i) for i in range(300)])
BROKEN = {
    "bracket missing": (with_damage(b"]", b""), UNBALANCED),
    "bracket too much": (with_damage(b"]", b"]]"), UNBALANCED),
    "brace missing": (with_damage(b"{", b""), UNBALANCED),
    "brace too much": (with_damage(b"]}", b"]}}"), UNBALANCED),
    "array ended early": (with_damage(b"]}", b"]}]"), UNBALANCED),
    "ended twice": (WHOLE + b"]", UNBALANCED),
    "quote missing": (with_damage(b'"good', b"good"), UNBALANCED),
    # The quotes of the last element look like the one that is missing, and all ends as if it were whole.
    "quote missing, another too much": (with_damage(b'"good', b"good", [conversation(1, 'a "word')]), UNBALANCED),
    "cut within an element": (WHOLE[: len(WHOLE) // 2], UNBALANCED),
    "cut between elements": (WHOLE[: WHOLE.index(b",\n", len(WHOLE) // 2) + 2], UNBALANCED),
    "cut before its end": (WHOLE[:-1], UNBALANCED),
    "no commas": (array([conversation(i) for i in range(300)], b"\n"), "a comma is missing between two elements"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_array_is_an_error(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As a broken line it would count as one, however many conversations it holds."""
    content, says = BROKEN[name]
    for file, data in (("plain", content), ("packed", bz2.compress(content))):
        path = tmp_path / file
        path.write_bytes(data)
        for read in (
            lambda path=path: preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64)),
            lambda path=path: validate_files([str(path)]),
            lambda path=path: train_tokenizer([str(path)], 300, tmp_path / "tokenizer.model"),
        ):
            with pytest.raises(DataError, match=f"cannot read {path}: {says}"):
                read()
    assert not (tmp_path / "out").exists() and not (tmp_path / "tokenizer.model").exists()


def test_the_whole_array_is_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "whole"
    path.write_bytes(WHOLE)
    totals = preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64)).totals
    assert (totals.lines, totals.conversations) == (300, 300)
    findings = validate_files([str(path)])
    assert (findings.lines, findings.conversations) == (300, 300)


def test_a_broken_element_whose_brackets_match_is_one_refused_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats"
    path.write_bytes(with_damage(b":", b";"))
    totals = preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64)).totals
    assert (totals.lines, totals.conversations, totals.rejected_by_rule) == (300, 299, {"invalid JSON": 1})
    assert totals.first_rejected["invalid JSON"].startswith("chats line 31:")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("first", [b'[{"note":1}]', array([conversation(1)]), b' [{"note":"[{"}, {"b": [2]}] '])
def test_lines_may_follow_an_array(first: bytes, end: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A JSONL file whose first line is a list keeps its other lines, where they stand, broken ones too."""
    lines = [conversation(i) for i in range(100)] + [b'{"messages": [{', b'{"a": "no end', b"}]", conversation(7)]
    path = tmp_path / "chats"
    path.write_bytes(end.join([first, *lines, array([conversation(i) for i in (8, 9)])]))
    preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64), block_bytes=1000)
    totals = read_manifest(tmp_path / "out").totals
    is_good = b"messages" in first
    num_elements = 2 if b'"b"' in first else 1
    assert totals.conversations == 100 + 1 + 2 + is_good
    assert totals.rejected_by_rule == {"invalid JSON": 3} | ({} if is_good else {"missing key": num_elements})
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejected if entry["rule"] == "invalid JSON"] == [
        num_elements + number for number in (101, 102, 103)
    ]
    offset = path.read_bytes().index(b'{"a": "no end')
    assert rejected[-2]["byte_offset"] in (offset, offset - 1)


@pytest.mark.parametrize("space", [b" " * 600, b"\n" * 200_000])
def test_white_space_before_the_first_element(space: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for where, content in enumerate((b"[" + space + WHOLE[1:], space + WHOLE)):
        path = tmp_path / "chats"
        path.write_bytes(content)
        out = tmp_path / f"out{where}"
        assert preprocess_files([str(path)], tokenizer.path, out, Settings(seq_length=64)).totals.conversations == 300


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_pipe_that_gives_its_bytes_one_by_one(
    compress: Callable[[bytes], bytes], text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is seen in its first bytes, however few of them come first."""
    packed = compress(text)

    class Slow(io.RawIOBase):
        position = 0

        def readable(self) -> bool:
            return True

        def readinto(self, into: Any) -> int:
            size = min(len(into), 1 if self.position < 1000 else 1 << 16, len(packed) - self.position)
            into[:size] = packed[self.position : self.position + size]
            self.position += size
            return size

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Slow())))
    (opened,) = resolve_inputs(["-"])
    assert b"".join(block.data for block in opened.blocks(5000)) == text
    entry = opened.entry()
    assert (entry.size_bytes, entry.sha256) == (len(packed), hashlib.sha256(packed).hexdigest())


def archive(path: Path, kind: str) -> None:
    member = path.parent / "member.jsonl"
    member.write_text("{}")
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(member)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(member)


@pytest.mark.parametrize(
    ("kind", "says"), [("tar", "is a tar archive; unpack it"), ("zip", "is a zip archive; unzip it")]
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_archives_are_named(
    kind: str, says: str, compress: Callable[[bytes], bytes], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    archive(tmp_path / "data", kind)
    (tmp_path / "data").write_bytes(compress((tmp_path / "data").read_bytes()))
    with pytest.raises(DataError, match=says):
        preprocess_files([str(tmp_path / "data")], tokenizer.path, tmp_path / "out", Settings(seq_length=64))


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"), (b"Rar!\x1a\x07", "a rar archive; unpack it"),
        (b"\x04\x22\x4d\x18", "compressed by lz4; decompress it first"), (b"PARE", "an encrypted Parquet file"),
        (b"ORC\n", "an ORC file"), (b"Obj\x01", "an Avro file"), (b"SQLite format 3\0", "an SQLite database"),
        (b"\x89HDF\r\n", "an HDF5 file"), (b"PK\x05\x06", "a zip archive"), ("{}\n".encode("utf-16"), "UTF-16: it starts with"),
    ],
)  # fmt: skip
def test_other_files_are_named(head: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(head + bytes(600))
    with pytest.raises(DataError, match=f"{tmp_path}/data is {says}"):
        read_all(tmp_path / "data")


def read_all(path: Path) -> bytes:
    return b"".join(block.data for block in resolve_inputs([str(path)])[0].blocks(5000))


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_streams_follow_one_another(compress: Callable[[bytes], bytes], text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    for between in (b"", bytes(4), bytes(200_000)):
        path.write_bytes(compress(text) + between + compress(b"") + compress(text) + between)
        assert read_all(path) == text + text, len(between)


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_damage_of_compression_is_one_line(
    compress: Callable[[bytes], bytes], text: bytes, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Above all where the first stream is whole and what follows it is not."""
    packed = compress(text)
    cases = {
        "cut": packed[:-20],
        "damaged": packed[:200] + b"damage" + packed[206:],
        "second cut": packed + packed[:-20],
        "second header cut": packed + packed[:5],
        "second header damaged": packed + b"X" + packed[1:],
        "second header damaged after zeros": packed + bytes(1 << 17) + packed[:2] + b"XX" + packed[4:],
        "junk": packed + b"junk junk",
        "little junk": packed + b"j",
    }
    if compress is lzma.compress:
        cases["zeros that are no multiple of 4"] = packed + bytes(6)
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (
            lambda path=path: preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64)),
            lambda path=path: validate_files([str(path)]),
            lambda path=path: train_tokenizer([str(path)], 300, tmp_path / "tokenizer.model"),
        ):
            with pytest.raises(DataError, match=f"cannot read {path}: ."):
                read()
