"""Random tables in every container, against what was written, and damaged files, which may only be refused.

What a row should read as is said here by the code that writes it; nothing of the readers is used for that. More of it:

    PYTHONPATH=. python tests/preprocess/containers/test_container_fuzz.py 200000
"""

from __future__ import annotations

import bz2
import decimal
import gzip
import io
import json
import lzma
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from lumina_ds.data.strict_json import RejectedLine, parse_object
from lumina_ds.errors import DataError
from preprocess.sources import resolve_inputs

NAMES = ["messages", "conversations", "prompt", "completion", "weight", "system", "tools", "id", "é\u2028", 'a"b', ""]
PIECES = ["a", "Z", " ", ",", ";", "\t", '"', "'", "\\", "\n", "\r\n", "\r", "[", "]", "{", "}", ":", "null", "1", "-0", "é",
          "\u2028", "\u0085", "\ufeff", "\U0001f600", "\x01", "\x7f", "\u0300", "\uffff", "<|im_end|>"]  # fmt: skip
REFUSED = object()


def text(random: random.Random, most: int = 6) -> str:
    return "".join(random.choices(PIECES, k=random.randint(0, most)))


def read(data: bytes, path: Path, block_bytes: int) -> Iterator[Any]:
    """What stands in each line: an object, or REFUSED."""
    path.write_bytes(data)
    (file,) = resolve_inputs([str(path)])
    for line in b"".join(block.data for block in file.blocks(block_bytes)).split(b"\n"):
        if line.strip():
            try:
                yield parse_object(line)
            except RejectedLine:
                yield REFUSED


# Each kind of Arrow column: its type, a random value, and what the value should read as.
Kind = tuple[pa.DataType, Callable[[], Any], Callable[[Any], Any]]


def kind_of_column(random: random.Random, depth: int = 0) -> Kind:
    def same(value: Any) -> Any:
        return value

    simple: list[Kind] = [
        (pa.string(), lambda: text(random), same),
        (pa.large_string(), lambda: text(random, 40), same),
        (pa.dictionary(pa.int32(), pa.string()), lambda: random.choice(PIECES), same),
        (pa.int64(), lambda: random.choice([0, 1, -1, 2**63 - 1, -(2**63), random.getrandbits(50)]), same),
        (pa.uint64(), lambda: random.getrandbits(64), same),
        (pa.bool_(), lambda: random.random() < 0.5, same),
        (pa.float64(), lambda: random.choice([0.0, 1.0, -0.5, 1e300, 5e-324, math.nan, math.inf, random.random()]),
         lambda value: value if math.isfinite(value) else str(value)),
        (pa.timestamp("us"), lambda: random.choice([0, 1, -(2**62), 2**62]), same),
        (pa.binary(), lambda: random.randbytes(random.randint(0, 4)), lambda value: {"bytes": len(value)}),
        (pa.decimal128(10, 2), lambda: decimal.Decimal(random.randint(-999, 999)).scaleb(-2), lambda value: {"Decimal": str(value)}),
    ]  # fmt: skip
    choice = random.random()
    if depth > 2 or choice < 0.5:
        return random.choice(simple)
    inner = kind_of_column(random, depth + 1)
    if choice < 0.75:
        names = random.sample(["role", "content", "from", "value", "weight", "x", "é"], random.randint(1, 4))
        fields = {name: kind_of_column(random, depth + 1) for name in names}
        return (
            pa.struct([(name, field[0]) for name, field in fields.items()]),
            lambda: {name: field[1]() if random.random() < 0.8 else None for name, field in fields.items()},
            lambda value: {name: fields[name][2](each) for name, each in value.items() if each is not None},
        )
    if choice < 0.9:
        return (
            random.choice([pa.list_, pa.large_list])(inner[0]),
            lambda: [inner[1]() if random.random() < 0.9 else None for _ in range(random.randint(0, 3))],
            lambda value: [None if each is None else inner[2](each) for each in value],
        )
    return (
        pa.map_(pa.string(), inner[0]),
        lambda: [(name, inner[1]()) for name in random.sample(PIECES, random.randint(0, 3))],
        lambda value: {name: inner[2](each) for name, each in value},
    )


def arrow_table(random: random.Random, num_rows: int) -> tuple[pa.Table, list[Any]]:
    names = random.sample(NAMES, random.randint(1, 5))
    kinds = [kind_of_column(random) for _ in names]
    rows = [[kind[1]() if random.random() < 0.85 else None for kind in kinds] for _ in range(num_rows)]
    columns = [pa.array([row[at] for row in rows], kind[0]) for at, kind in enumerate(kinds)]
    expected = [
        {name: kind[2](value) for name, kind, value in zip(names, kinds, row, strict=True) if value is not None}
        for row in rows
    ]
    return pa.table(columns, names=names), expected


def written_table(table: pa.Table, random: random.Random) -> bytes:
    """The table in one of Arrow's containers, perhaps compressed."""
    sink = io.BytesIO()
    way = random.randrange(4)
    size = random.choice([1, 7, 64, 10_000])
    if way == 0:
        try:
            parquet.write_table(
                table, sink, row_group_size=size, data_page_version=random.choice(["1.0", "2.0"]),
                compression=random.choice(["none", "snappy", "zstd", "gzip"]), use_dictionary=random.random() < 0.5,
            )  # fmt: skip
        except (pa.ArrowNotImplementedError, pa.ArrowIndexError):  # dictionaries below maps and below nulls
            way, sink = 1, io.BytesIO()
    if way == 1:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=size)
    elif way == 2:
        options = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=size)
    elif way == 3:
        feather.write_feather(table, sink, compression=random.choice(["uncompressed", "lz4", "zstd"]))
    return random.choice([bytes, bytes, gzip.compress])(sink.getvalue())


def random_json(random: random.Random, depth: int = 0) -> Any:
    choice = random.random()
    if depth > 3 or choice < 0.6:
        return random.choice([None, True, False, 0, -1, 10**30, 1.5, 1e-7, text(random), text(random)])
    if choice < 0.8:
        return [random_json(random, depth + 1) for _ in range(random.randint(0, 3))]
    return {text(random): random_json(random, depth + 1) for _ in range(random.randint(0, 3))}


def json_array(random: random.Random, num_rows: int) -> tuple[bytes, list[Any]]:
    rows: list[Any] = [
        {text(random): random_json(random) for _ in range(random.randint(0, 3))} for _ in range(num_rows)
    ]
    written = json.dumps(
        rows, indent=random.choice([None, 0, 3]), ensure_ascii=random.random() < 0.5,
        separators=random.choice([None, (",", ":"), (" ,\r\n ", "\t:\n ")]),
    )  # fmt: skip
    return random.choice([bytes, bz2.compress, lzma.compress])(written.encode()), rows


def separated(random: random.Random, num_rows: int) -> tuple[bytes, list[Any]]:
    """A table of texts, with rows that are none among them."""
    separator = random.choice(",\t;")
    names = ["prompt", *random.sample([*NAMES[1:2], *NAMES[3:]], random.randint(1, 4))]
    end = random.choice(["\n", "\r\n"])
    lines, expected = [separator.join(quote(name, separator, random) for name in names)], []
    for _ in range(num_rows):
        cells = [cell(name, random) for name in names]
        row = separator.join(quote(written, separator, random) for written, _ in cells)
        values: Any = {name: value for name, (written, value) in zip(names, cells, strict=True) if written}
        if any(value is REFUSED for value in values.values()):
            values = REFUSED
        damage = random.random()
        if damage < 0.05:
            row, values = (
                random.choice(
                    [
                        row + separator + "x",
                        row.replace("\r", "").replace("\n", "") + "\0",
                        row + "\udce9",
                        f'"a"b{separator}c',
                    ]
                ),
                REFUSED,
            )
            if "\n" in row or "\r" in row:
                continue  # a broken row of several lines breaks those too
        if row.strip("\r\n") == "" or (len(names) == 1 and not row):
            continue
        lines += [row, *[""] * (random.random() < 0.05)]
        expected.append(values)
    written = end.join([*lines, ""]).encode("utf-8", "surrogateescape")
    return random.choice([b"", b"\xef\xbb\xbf"]) + written, expected


def cell(name: str, random: random.Random) -> tuple[str, Any]:
    """(how it is written, what it should read as)."""
    if name in ("conversations", "tools"):
        value = [random_json(random) for _ in range(random.randint(0, 3))]
        written = json.dumps(value, indent=random.choice([None, 2]), ensure_ascii=random.random() < 0.5)
        if random.random() < 0.1:
            return written[:-1], REFUSED
        return ("", None) if random.random() < 0.1 else (written, value)
    if name == "weight":
        return random.choice([("0", 0), ("1", 1), ("true", True), ("False", False), ("2", "2"), ("", None), ("x", "x")])
    if name in ("prompt", "completion") and random.random() < 0.2:
        messages = [{"role": "user", "content": text(random)} for _ in range(random.randint(1, 3))]
        return json.dumps(messages, ensure_ascii=False), messages
    value = text(random)
    return value, value


def quote(written: str, separator: str, random: random.Random) -> str:
    needs = any(each in written for each in (separator, '"', "\r", "\n")) or random.random() < 0.2
    return '"' + written.replace('"', '""') + '"' if needs else written


def fuzz(num_rows: int, seed: int, folder: Path) -> int:
    """Rows that were compared, `num_rows` or more. Raises AssertionError."""
    count, step = 0, 0
    while count < num_rows:
        generator = random.Random(f"{seed} {step}")
        size = generator.choice([1, 20, 300])
        way, block_bytes = step % 4, generator.choice([64, 1000, 1 << 20])
        if way < 2:
            table, expected = arrow_table(generator, size)
            data = written_table(table, generator)
        else:
            data, expected = (json_array if way == 2 else separated)(generator, size)
        found = list(read(data, folder / "data.csv", block_bytes))
        assert found == expected, f"seed {seed}, step {step}"
        count, step = count + size, step + 1
    return count


def damage(data: bytes, random: random.Random) -> bytes:
    """Bytes changed, left out, doubled or cut off."""
    for _ in range(random.choice([1, 1, 3])):
        at, size = random.randrange(len(data) + 1), random.choice([1, 1, 4, 30])
        new = random.choice([random.randbytes(size), b"\xff" * size, b"\0" * size, b"", data[at : at + 2 * size]])
        data = random.choice([data[:at] + new + data[at + size :], data[:at]])
    return data


def fuzz_damage(num_files: int, seed: int, folder: Path) -> tuple[int, int]:
    """(refused, read) files of so many damaged ones. Anything but a DataError of one line is let through."""
    refused = whole = 0
    for step in range(num_files):
        generator = random.Random(f"damage {seed} {step}")
        if step % 4 < 3:
            data = written_table(arrow_table(generator, 20)[0], generator)
        else:
            data = generator.choice([json_array, separated])(generator, 20)[0]
        try:
            for _ in read(damage(data, generator), folder / "data.csv", 1000):
                pass
            whole += 1
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, (step, str(error))
            refused += 1
    return refused, whole


@pytest.mark.parametrize("seed", range(2))
def test_rows_read_as_they_were_written(seed: int, tmp_path: Path) -> None:
    assert fuzz(8_000, seed, tmp_path) >= 8_000


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    refused, whole = fuzz_damage(400, 0, tmp_path)
    assert refused > 100 and whole > 20


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        number = int(sys.argv[1])
        first = int(sys.argv[2]) if len(sys.argv) > 2 else 100
        print(f"{fuzz(number, first, Path(work)):,} rows as they were written")
        refused, read_on = fuzz_damage(number // 20, first, Path(work))
        print(f"{refused:,} of the damaged files refused, {read_on:,} read")
