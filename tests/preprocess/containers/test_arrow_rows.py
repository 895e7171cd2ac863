"""Parquet and Arrow: what each kind of column becomes, where rows stand, and damage."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet
from written import in_arrow, in_feather, in_parquet

from lumina_ds.data.conversation import Turn, parse_conversation
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.pipeline import preprocess_files
from preprocess.sources import resolve_inputs
from preprocess.train_tokenizer import train_tokenizer
from preprocess.validation.validate import validate_files

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROW: dict[str, Any] = {"messages": TURNS}


def lines(path: Path, block_bytes: int = 1 << 20) -> list[bytes]:
    (file,) = resolve_inputs([str(path)])
    return b"".join(block.data for block in file.blocks(block_bytes)).splitlines()


def rows(data: bytes | pa.Table, path: Path) -> list[Any]:
    if isinstance(data, pa.Table):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data)
    else:
        path.write_bytes(data)
    return [json.loads(line) for line in lines(path)]


def test_a_null_is_a_key_that_is_not_there(tmp_path: Path) -> None:
    """Arrow gives every struct the keys of all: a weight that no one wrote must not be one that is null."""
    written = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "weight": 0}]},
        {"messages": TURNS, "tools": None, "source": "x"},
        {"messages": None, "source": None},
    ]
    expected = [written[0], {"messages": TURNS, "source": "x"}, {}]
    assert rows(in_parquet(written), tmp_path / "p") == expected
    assert rows(in_arrow(written, batch_size=2), tmp_path / "a") == expected


def test_kinds_of_text_and_lists(tmp_path: Path) -> None:
    kind = pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string())])
    turns = pa.array([TURNS, None, []], pa.large_list(kind))
    fixed = pa.array([TURNS, TURNS, None], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]), 2))
    table = pa.table({"messages": turns, "conversations": fixed, "system": pa.array(["s", None, ""], pa.string_view())})
    expected = [
        {"messages": TURNS, "conversations": TURNS, "system": "s"},
        {"conversations": TURNS},
        {"messages": [], "system": ""},
    ]
    assert rows(table, tmp_path / "a") == expected


def test_maps_are_objects(tmp_path: Path) -> None:
    pairs = pa.array([[("b", 1), ("a", None)], None, [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    numbers = pa.array([[(1, "x")], None, None], pa.map_(pa.int32(), pa.string()))
    assert rows(pa.table({"x": pairs, "n": numbers}), tmp_path / "a") == [
        {"x": {"b": 1}, "n": [[1, "x"]]},
        {},
        {"x": [["k", 1], ["k", 2]]},  # as an object it would hold a key twice
    ]


ODD_COLUMNS: dict[str, pa.Array] = {
    "nanoseconds": pa.array([1, 2**62], pa.timestamp("ns")),
    "no such zone": pa.array([1, 2], pa.timestamp("s", "Mars/Olympus")),
    "beyond all years": pa.array([2**31 - 1, -(2**31)], pa.int32()).view(pa.date32()),
    "beyond all days": pa.array([2**62, 5], pa.int64()).view(pa.duration("us")),
    "time": pa.array([1, 2], pa.time64("ns")),
    "times in structs": pa.array([{"t": [1, None]}, {"t": None}], pa.struct([("t", pa.list_(pa.timestamp("ns")))])),
    "times in maps": pa.array([[("a", 2**62)], []], pa.map_(pa.string(), pa.timestamp("ns", "Mars/Olympus"))),
    "decimal": pa.array([decimal.Decimal("1.50"), None]),
    "bytes": pa.array([b"\xff\xd8", b"text"]),
    "half": pa.array([1.5, None], pa.float16()),
    "large": pa.array([2**64 - 1, 0], pa.uint64()),
    "month": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    "run ends": pa.RunEndEncodedArray.from_arrays([1, 2], ["a", "b"]),
    "union": pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]),
    "extension": pa.array([b"x" * 16, None], pa.binary(16)),
    "view of a list": pa.array([[1], None], pa.list_view(pa.int64())),
    "nothing": pa.nulls(2),
    "same name twice in a struct": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([1, 2])], ["a", "a"]),
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_an_odd_column_beside_the_turns_is_another_key(name: str, tmp_path: Path) -> None:
    table = pa.table({"messages": [TURNS, TURNS], "odd": ODD_COLUMNS[name]})
    path = tmp_path / "a"
    rows(table, path)
    found = [parse_conversation(line) for line in lines(path)]
    assert [conversation.turns for conversation in found] == [(Turn("user", "hi"), Turn("assistant", "hello"))] * 2
    num_odd = 2 - table["odd"].null_count
    assert sum(conversation.other_keys == ("odd",) for conversation in found) == num_odd


@pytest.mark.parametrize(
    "answer",
    [pa.array([datetime.date(2024, 1, 1)]), pa.array([b"good"]), pa.array([decimal.Decimal(1)]), pa.array([1])],
)
def test_what_is_no_text_is_none_in_a_row_either(answer: pa.Array, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A reader of tables that guesses dates would otherwise train on its guesses."""
    parquet.write_table(pa.table({"prompt": ["When?"], "completion": answer}), tmp_path / "p")
    with pytest.raises(DataError, match=r"every line of .* was rejected"):
        preprocess_files([str(tmp_path / "p")], tokenizer.path, tmp_path / "out", Settings(seq_length=64))


def test_a_number_that_is_none_is_refused_where_it_counts(tmp_path: Path) -> None:
    found = rows(pa.table({"weight": [float("nan"), 0.5, float("-inf")], "x": [1.0, None, 2.5]}), tmp_path / "a")
    assert found == [{"weight": "nan", "x": 1.0}, {"weight": 0.5}, {"weight": "-inf", "x": 2.5}]


def not_utf8(count: int) -> pa.Array:
    """Texts of which the second one is no UTF-8."""
    texts = [b"good", b"b\xe4d", *[b"good"] * (count - 2)]
    return pa.array(texts, pa.binary()).view(pa.string())


def test_a_text_that_is_no_utf8_costs_its_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array(["q"] * 40), "completion": not_utf8(40)})
    for name, data in (("p", table), ("a", table)):
        path = tmp_path / name
        if name == "p":
            parquet.write_table(data, path)
        else:
            rows_to_stream(data, path)
        totals = preprocess_files([str(path)], tokenizer.path, tmp_path / f"out {name}", Settings(seq_length=64)).totals
        assert (totals.lines, totals.conversations) == (40, 39)
        assert totals.first_rejected == {"unreadable row": f"{name} line 2: invalid UTF-8 at byte 1 of a text"}
        assert validate_files([str(path)]).rules["unreadable row"].examples[0].line == 2


def rows_to_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_rows_are_counted_through_groups_and_blocks(tmp_path: Path) -> None:
    """Row N is line N, wherever row groups, batches and blocks end."""
    written = [{"messages": TURNS, "id": number} for number in range(100)]
    for name, data in (("p", in_parquet(written)), ("a", in_arrow(written)), ("f", in_feather(written))):
        path = tmp_path / name
        path.write_bytes(data)
        for size in (50, 333, 1 << 20):
            (file,) = resolve_inputs([str(path)])
            for block in file.blocks(size):
                first = json.loads(block.data.splitlines()[0])
                assert first["id"] == block.first_line - 1, (name, size)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_parquet_of_every_codec(codec: str, tmp_path: Path) -> None:
    if codec != "none" and not pa.Codec.is_available(codec):
        pytest.skip(f"this pyarrow has no {codec}")
    assert rows(in_parquet([ROW] * 20, compression=codec), tmp_path / "p") == [ROW] * 20
    assert rows(in_parquet([ROW] * 20, compression=codec, data_page_version="2.0"), tmp_path / "p") == [ROW] * 20


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_feather(compression: str, tmp_path: Path) -> None:
    feather.write_feather(pa.Table.from_pylist([ROW] * 20), str(tmp_path / "f"), compression=compression)
    assert [json.loads(line) for line in lines(tmp_path / "f")] == [ROW] * 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_feather_version_1(tmp_path: Path) -> None:
    """pyarrow may lose it; then there is a line that says what to do."""
    try:
        feather.write_feather(pa.table({"prompt": ["q"], "completion": ["a"]}), str(tmp_path / "f"), version=1)
    except (TypeError, ValueError):
        pytest.skip("this pyarrow cannot write one")
    assert [json.loads(line) for line in lines(tmp_path / "f")] == [{"prompt": "q", "completion": "a"}]


def test_streams_follow_one_another(tmp_path: Path) -> None:
    """Of other columns too."""
    other = in_arrow([{"prompt": "q", "completion": "a"}])
    assert rows(in_arrow([ROW] * 7) + other, tmp_path / "a") == [*[ROW] * 7, {"prompt": "q", "completion": "a"}]


def test_no_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for write in (in_parquet, in_arrow, in_feather):
        (tmp_path / "empty").write_bytes(write([]))
        assert lines(tmp_path / "empty") == []
        with pytest.raises(DataError, match="empty holds no conversations: it is empty"):
            preprocess_files([str(tmp_path / "empty")], tokenizer.path, tmp_path / "out", Settings(seq_length=64))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def junk_after(data: bytes) -> bytes:
    return data + b"junk junk"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "tail": lambda data: data[:-20],
    "one byte": lambda data: data[:-1],
    "magic alone": lambda data: data[:9],
    "junk": junk_after,
    "first message": lambda data: flipped(data, 24),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "arrow file"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(kind: str, name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows lost at the end of a file are noticed, also where it ends between two batches."""
    writers: dict[str, Callable[..., bytes]] = {
        "parquet": in_parquet, "arrow": in_arrow, "feather": in_feather,
        "arrow file": lambda written: in_arrow(written, pa.ipc.new_file),
    }  # fmt: skip
    data = writers[kind]([ROW] * 50)
    if (kind, name) in {
        ("arrow", "magic alone"),
        *((kind, "first message") for kind in ("parquet", "feather", "arrow file")),
    }:
        pytest.skip("that leaves a file of another kind, or one that is whole")
    path = tmp_path / "data"
    path.write_bytes(DAMAGE[name](data))
    for read in (
        lambda: preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64)),
        lambda: validate_files([str(path)]),
        lambda: train_tokenizer([str(path)], 300, tmp_path / "tokenizer.model"),
    ):
        with pytest.raises(DataError, match=f"cannot read {path}: .") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_stream_cut_between_batches(tmp_path: Path) -> None:
    """pyarrow reads such a stream without a word."""
    sink = io.BytesIO()
    table = pa.Table.from_pylist([ROW] * 50)
    writer = pa.ipc.new_stream(sink, table.schema)
    writer.write_table(table, max_chunksize=10)
    (tmp_path / "a").write_bytes(sink.getvalue())  # without an end mark
    with pytest.raises(DataError, match="no end mark; it is cut off"):
        lines(tmp_path / "a")
    writer.close()
    (tmp_path / "a").write_bytes(sink.getvalue())
    assert len(lines(tmp_path / "a")) == 50


@pytest.mark.parametrize("offsets", [(0, 2**24, 1), (0, -5, 1), (3, 2, 1)])
def test_offsets_that_lead_outside(offsets: tuple[int, ...], tmp_path: Path) -> None:
    """A text that reaches beyond its buffer is found before it is read."""
    good = struct.pack("<3i", 0, 7, 14)
    data = in_arrow([{"prompt": "abcdefg"}, {"prompt": "hijklmn"}])
    assert data.count(good) == 1
    (tmp_path / "a").write_bytes(data.replace(good, struct.pack("<3i", *offsets)))
    with pytest.raises(DataError, match="the Arrow data is damaged"):
        lines(tmp_path / "a")


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_lists_that_reach_outside(kind: Callable[..., pa.DataType], tmp_path: Path) -> None:
    width = "<3i" if kind is pa.list_ else "<3q"
    table = pa.table({"x": pa.array([[1, 2, 3, 4, 5], [6, 7]], kind(pa.int64()))})
    rows_to_stream(table, tmp_path / "a")
    data, good = (tmp_path / "a").read_bytes(), struct.pack(width, 0, 5, 7)
    assert data.count(good) == 1
    for bad in ((0, 5, 2**24), (0, -5, 7), (6, 5, 7)):
        (tmp_path / "a").write_bytes(data.replace(good, struct.pack(width, *bad)))
        with pytest.raises(DataError, match="the Arrow data is damaged"):
            lines(tmp_path / "a")


def test_places_in_a_dictionary(tmp_path: Path) -> None:
    """Below a null one may lead nowhere, as pyarrow writes it; where it is used that is damage."""
    empty = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array([], pa.string()), safe=False)
    for mask, expected in ((True, [{}]), (False, None)):
        turns = pa.StructArray.from_arrays([empty], ["role"], mask=pa.array([mask]))
        rows_to_stream(pa.table({"x": turns}), tmp_path / "a")
        if expected is None:
            with pytest.raises(DataError, match="the Arrow data is damaged"):
                lines(tmp_path / "a")
        else:
            assert [json.loads(line) for line in lines(tmp_path / "a")] == expected


def test_a_dictionary_of_every_row_group(tmp_path: Path) -> None:
    """pyarrow cannot make one batch of two groups with dictionaries within a list."""
    kind = pa.list_(pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.string())]))
    parquet.write_table(pa.table({"messages": pa.array([TURNS] * 9, kind)}), tmp_path / "p", row_group_size=2)
    assert [json.loads(line) for line in lines(tmp_path / "p")] == [ROW] * 9


def test_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns are called 'prompt'; rename or drop one of them"):
        rows(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a")


def test_a_table_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet begins to be read at its end: from a pipe it is kept on the disk meanwhile."""
    for write in (in_parquet, in_arrow, in_feather):
        reading, writing = os.pipe()
        data = write([ROW] * 20)
        assert len(data) < 65_536
        os.write(writing, data)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe, monkeypatch.context() as patched:
            patched.setattr("sys.stdin", io.TextIOWrapper(pipe))
            (file,) = resolve_inputs(["-"])
            found = b"".join(block.data for block in file.blocks())
            assert [json.loads(line) for line in found.splitlines()] == [ROW] * 20
            assert file.entry().size_bytes == len(data)


def test_memory_is_that_of_a_part_of_the_table(tmp_path: Path) -> None:
    """Of one large row group, a batch at a time is made into lines."""
    text = "x" * 1000
    parquet.write_table(
        pa.table({"prompt": [text] * 30_000, "completion": [text] * 30_000}),
        tmp_path / "p",
        compression="none",
        use_dictionary=False,
    )
    (file,) = resolve_inputs([str(tmp_path / "p")])
    pa.default_memory_pool().release_unused()
    before, most, num_lines = pa.total_allocated_bytes(), 0, 0
    for block in file.blocks(1 << 20):
        most = max(most, pa.total_allocated_bytes() - before)
        num_lines += block.data.count(b"\n")
    assert num_lines == 30_000
    assert most < 16 << 20, f"{most >> 20} MiB of a table of 60 MB"
