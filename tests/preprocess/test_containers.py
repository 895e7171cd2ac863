"""The same conversations give the same shards from every container; what is none is named with what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lumina_ds.data.shards.manifest import Settings, read_manifest
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess import containers
from preprocess.pipeline import preprocess_files
from preprocess.sources import resolve_inputs

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
        monkeypatch.setattr(containers, "_splitter", lambda: containers._split)
    splitter = containers._ArraySplitter()
    array = b'[ {"a": "x\\\\\\"],["},\n {"b": [1, {"c": "}"}]}\n]\n'
    found = b"".join(splitter.split(array[at : at + size]) for at in range(0, len(array), size))
    assert found == b' {"a": "x\\\\\\"],["}\n  {"b": [1, {"c": "}"}]} \n\n'


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


def test_a_broken_array_loses_nothing_without_a_count(text: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_bytes(array_per_line(text)[:-40])
    totals = preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64)).totals
    assert (totals.lines, totals.conversations, totals.rejected_by_rule) == (102, 101, {"invalid JSON": 1})


def archive(path: Path, kind: str) -> None:
    import pyarrow as pa
    from pyarrow import feather, parquet

    member = path.parent / "member.jsonl"
    member.write_text("{}")
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(member)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(member)
    elif kind == "parquet":
        parquet.write_table(pa.table({"a": [1]}), path)
    else:
        feather.write_feather(pa.table({"a": np.arange(3)}), str(path))


@pytest.mark.parametrize(
    ("kind", "says"),
    [("tar", "is a tar archive; unpack it"), ("zip", "is a zip archive; unzip it"), ("parquet", "is a Parquet file; write it as JSONL"), ("feather", "is an Arrow file; write it as JSONL")],
)  # fmt: skip
def test_archives_and_tables_are_named(kind: str, says: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    archive(tmp_path / "data", kind)
    with pytest.raises(DataError, match=says):
        preprocess_files([str(tmp_path / "data")], tokenizer.path, tmp_path / "out", Settings(seq_length=64))


def test_damaged_compression_is_one_line(text: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, packed in enumerate((bz2.compress(text), lzma.compress(text))):
        for cut in (packed[:-20], packed[:200] + b"damage" + packed[206:]):
            (tmp_path / "data").write_bytes(cut)
            with pytest.raises(DataError, match="cannot read"):
                preprocess_files(
                    [str(tmp_path / "data")], tokenizer.path, tmp_path / f"out{number}", Settings(seq_length=64)
                )
