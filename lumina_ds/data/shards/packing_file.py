"""`packing-SEQ.arrow`: a packing plan on disk, one Arrow row per packed row, with a digest of its own.

The digest stands in the file because a plan for another row length is added to a folder whose manifest
is sealed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from lumina_ds.data.packing import PackingPlan
from lumina_ds.data.shards.arrow_columns import list_column, numbers
from lumina_ds.data.shards.arrow_stream import file_buffer, record_batches
from lumina_ds.data.shards.manifest import FileEntry
from lumina_ds.data.shards.writer import write_table
from lumina_ds.errors import DataError
from lumina_ds.foreign_files import shown

_SCHEMA = pa.schema(
    [("documents", pa.list_(pa.int64())), ("starts", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32()))]
)
_DIGEST_BLOCK = 1 << 20


def packing_file(seq_length: int) -> str:
    return f"packing-{seq_length}.arrow"


def write_packing(plan: PackingPlan, path: Path) -> FileEntry:
    """Write the plan: columns documents, starts and lengths, each a list per packed row."""
    columns = [
        list_column(plan.row_offsets, values, field.type.value_type)
        for values, field in zip((plan.documents, plan.starts, plan.lengths), _SCHEMA, strict=True)
    ]
    metadata = {
        "seq_length": str(plan.seq_length),
        "num_dropped": str(plan.num_dropped),
        "num_truncated": str(plan.num_truncated),
        "digest": _digest(plan),
    }
    if plan.num_without_labels:
        metadata["num_without_labels"] = str(plan.num_without_labels)
    return write_table(pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata(metadata)), path)


def read_packing(path: Path) -> PackingPlan:
    """Map a plan: its columns are views of the file. Raises DataError that names it when it is damaged."""
    try:
        schema, batches = record_batches(file_buffer(path), _SCHEMA)
        if len(batches) > 1:
            raise ValueError("it has more than one batch")
        batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=schema)
        batch.validate(full=True)  # a damaged length would otherwise be read beyond the file's end
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        lists = [batch.column(name) for name in _SCHEMA.names]
        row_offsets, *others = (numbers(column.offsets) for column in lists)
        documents, starts, lengths = (numbers(column.values) for column in lists)
        is_even = all(np.array_equal(row_offsets, each) for each in others)
        if not is_even or not len(documents) == len(starts) == len(lengths) == (row_offsets[-1] if len(batch) else 0):
            raise ValueError("its columns disagree")
        counts = {name: _count(metadata, name) for name in ("seq_length", "num_dropped", "num_truncated")}
        without_labels = _count(metadata, "num_without_labels") if "num_without_labels" in metadata else 0
        plan = PackingPlan(
            row_offsets=row_offsets, documents=documents, starts=starts, lengths=lengths, **counts,
            num_without_labels=without_labels,
        )  # fmt: skip
        if metadata["digest"] != _digest(plan):
            raise ValueError("its digest differs")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = shown(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged ({reason}); delete it, and it is made again from the shards") from error
    return plan


def _count(metadata: Mapping[str, str], name: str) -> int:
    text = metadata[name]
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"its {name} is no number")
    return int(text)


def _digest(plan: PackingPlan) -> str:
    counts = [plan.seq_length, plan.num_dropped, plan.num_truncated]
    counts += [plan.num_without_labels] if plan.num_without_labels else []
    digest = hashlib.sha256(" ".join(map(str, counts)).encode())
    for column in (plan.row_offsets, plan.documents, plan.starts, plan.lengths):
        for begin in range(0, len(column), _DIGEST_BLOCK):  # a mapped column may be larger than the memory
            digest.update(np.ascontiguousarray(column[begin : begin + _DIGEST_BLOCK], "<i8").tobytes())
    return digest.hexdigest()
