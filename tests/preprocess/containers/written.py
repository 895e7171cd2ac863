"""The same rows written in every container that is read, and in every format that can say them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import feather, parquet

Row = dict[str, Any]


def jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def array(rows: list[Row]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def _table(rows: list[Row]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def zstd(data: bytes) -> bytes:
    """One frame, as a stream writes it."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def in_parquet(rows: list[Row], **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(_table(rows), sink, **{"row_group_size": 7, **options})
    return sink.getvalue()


def in_arrow(rows: list[Row], open_writer: Callable[..., Any] = pa.ipc.new_stream, batch_size: int = 5) -> bytes:
    table = _table(rows)
    sink = io.BytesIO()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_size)
    return sink.getvalue()


def in_feather(rows: list[Row]) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(_table(rows), sink, compression="zstd")
    return sink.getvalue()


def separated(rows: list[Row], separator: str = ",") -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=separator)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow(["" if each is None else each if isinstance(each, str) else json.dumps(each) for each in cells])
    return sink.getvalue().encode()


def save_to_disk(rows: list[Row], folder: Path, num_files: int = 2) -> None:
    """As datasets 2 to 5 write a Dataset."""
    folder.mkdir()
    step = -(-len(rows) // num_files)
    names = [f"data-{number:05}-of-{num_files:05}.arrow" for number in range(num_files)]
    table = _table(rows)  # one schema for all files
    for number, name in enumerate(names):
        part = table.slice(number * step, step)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=4)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


FILES: dict[str, Callable[[list[Row]], bytes]] = {
    "jsonl": jsonl,
    "byte order mark": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "array": array,
    "gzip": lambda rows: gzip.compress(jsonl(rows)),
    "zstd": lambda rows: zstd(jsonl(rows)),
    "bzip2": lambda rows: bz2.compress(jsonl(rows)),
    "xz": lambda rows: lzma.compress(jsonl(rows)),
    "parquet": in_parquet,
    "parquet.gz": lambda rows: gzip.compress(in_parquet(rows)),
    "arrow file": lambda rows: in_arrow(rows, pa.ipc.new_file),
    "arrow stream": in_arrow,
    "arrow.zst": lambda rows: zstd(in_arrow(rows)),
    "feather": in_feather,
    "csv": separated,
    "csv.xz": lambda rows: lzma.compress(separated(rows)),
    "tsv": lambda rows: separated(rows, "\t"),
}
CONTAINERS = (*FILES, "save_to_disk")


def write(rows: list[Row], container: str, path: Path) -> None:
    """Write `rows` at `path`, a file or a folder."""
    if container == "save_to_disk":
        save_to_disk(rows, path)
    else:
        path.write_bytes(FILES[container](rows))


# One question and its answer in every format that can say them.
FORMATS: dict[str, Callable[[str, str], Row]] = {
    "messages": lambda asked, said: {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    },
    "sharegpt": lambda asked, said: {
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    },
    "alpaca": lambda asked, said: {"instruction": asked, "output": said},
    "prompt-completion": lambda asked, said: {"prompt": asked, "completion": said},
    "instruction-response": lambda asked, said: {"instruction": asked, "response": said},
    "oasst": lambda asked, said: {
        "prompt": {"role": "prompter", "text": asked, "replies": [{"role": "assistant", "text": said, "rank": 0}]}
    },
    "preference": lambda asked, said: {"prompt": asked, "chosen": said, "rejected": "no"},
    # A document has no turns, so its shards are others; they are the same from every container.
    "text": lambda asked, said: {"text": asked + said},
}
