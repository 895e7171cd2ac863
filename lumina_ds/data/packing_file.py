"""`packing-SEQ.arrow`: a packing plan on disk, one Arrow row per packed row, with a digest of its own.

The digest stands in the file because a plan for another row length is added to a folder whose manifest
is sealed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from lumina_ds.data.manifest import FileEntry
from lumina_ds.data.packing import PackingPlan
from lumina_ds.data.shard_writer import write_table
from lumina_ds.errors import DataError


def packing_file(seq_length: int) -> str:
    return f"packing-{seq_length}.arrow"


def write_packing(plan: PackingPlan, path: Path) -> FileEntry:
    """Write the plan: columns documents, starts and lengths, each a list per packed row."""
    offsets = pa.array(plan.row_offsets, pa.int32() if plan.row_offsets[-1] < 2**31 else pa.int64())
    make = pa.ListArray if offsets.type == pa.int32() else pa.LargeListArray
    columns = {
        "documents": make.from_arrays(offsets, pa.array(plan.documents, pa.int64())),
        "starts": make.from_arrays(offsets, pa.array(plan.starts, pa.int32())),
        "lengths": make.from_arrays(offsets, pa.array(plan.lengths, pa.int32())),
    }
    metadata = {
        "seq_length": str(plan.seq_length),
        "num_dropped": str(plan.num_dropped),
        "num_truncated": str(plan.num_truncated),
        "digest": _digest(plan),
    }
    return write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def read_packing(path: Path) -> PackingPlan:
    """Read a plan. Raises DataError that names the file when it is damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            batch = next(iter(reader), None) or _empty_batch(reader.schema)
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        documents, starts, lengths = (batch.column(name) for name in ("documents", "starts", "lengths"))
        plan = PackingPlan(
            int(metadata["seq_length"]),
            _int64(documents.offsets),
            _int64(documents.values),
            _int64(starts.values),
            _int64(lengths.values),
            num_dropped=int(metadata["num_dropped"]),
            num_truncated=int(metadata["num_truncated"]),
        )
        intact = metadata["digest"] == _digest(plan)
    except (pa.ArrowException, OSError, KeyError, ValueError):
        intact = False
    if not intact:
        raise DataError(f"{path} is damaged; delete it, and it is made again from the shards")
    return plan


def _empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)


def _int64(array: pa.Array) -> np.ndarray:
    return array.to_numpy().astype(np.int64)


def _digest(plan: PackingPlan) -> str:
    digest = hashlib.sha256(f"{plan.seq_length} {plan.num_dropped} {plan.num_truncated}".encode())
    for column in (plan.row_offsets, plan.documents, plan.starts, plan.lengths):
        digest.update(np.ascontiguousarray(column, "<i8").tobytes())
    return digest.hexdigest()
