"""`packing-SEQ.arrow`: a packing plan on disk, one Arrow row per packed row, with a digest of its own.

The digest stands in the file because a plan for another row length is added to a folder whose manifest
is sealed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from lumina_ds.data.packing import PackingPlan
from lumina_ds.data.shards.arrow_columns import list_column, numbers
from lumina_ds.data.shards.manifest import FileEntry
from lumina_ds.data.shards.writer import write_table
from lumina_ds.errors import DataError

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
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            if not reader.schema.equals(
                _SCHEMA
            ):  # damage may change a type, and the columns then lack what is read below
                raise ValueError("another schema")
            batch = next(iter(reader), None) or _empty_batch(reader.schema)
            batch.validate(full=True)  # a damaged length would otherwise be read beyond the file's end
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        documents, starts, lengths = (batch.column(name) for name in ("documents", "starts", "lengths"))
        plan = PackingPlan(
            int(metadata["seq_length"]),
            numbers(documents.offsets),
            numbers(documents.values),
            numbers(starts.values),
            numbers(lengths.values),
            num_dropped=int(metadata["num_dropped"]),
            num_truncated=int(metadata["num_truncated"]),
            num_without_labels=int(metadata.get("num_without_labels", "0")),
        )
        intact = metadata["digest"] == _digest(plan)
    except (pa.ArrowException, OSError, KeyError, ValueError):
        intact = False
    if not intact:
        raise DataError(f"{path} is damaged; delete it, and it is made again from the shards")
    return plan


def _empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)


def _digest(plan: PackingPlan) -> str:
    counts = [plan.seq_length, plan.num_dropped, plan.num_truncated]
    counts += [plan.num_without_labels] if plan.num_without_labels else []
    digest = hashlib.sha256(" ".join(map(str, counts)).encode())
    for column in (plan.row_offsets, plan.documents, plan.starts, plan.lengths):
        for begin in range(0, len(column), _DIGEST_BLOCK):  # a mapped column may be larger than the memory
            digest.update(np.ascontiguousarray(column[begin : begin + _DIGEST_BLOCK], "<i8").tobytes())
    return digest.hexdigest()
