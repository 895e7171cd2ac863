"""Change a shard folder and give it the digests of what it then holds, as one who lies would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lumina_ds.data.packing import PackingPlan
from lumina_ds.data.shards.packing_file import write_packing


def sealed(document: dict[str, Any]) -> str:
    """A manifest's text with the digest of its content."""
    content = {name: value for name, value in document.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"digest": digest}, indent=2) + "\n"


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Sizes and digests of the files as they are, then `change` of the manifest, then its digest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"] + manifest["files"]:
        if (folder / entry["file"]).is_file():
            content = (folder / entry["file"]).read_bytes()
            entry["size_bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    change(manifest)
    path.write_text(sealed(manifest))


def rewrite_shard(folder: Path, change: Callable[[dict[str, Any]], Any], **options: Any) -> None:
    """Write shard-00000.arrow again, after `change` of its columns ({name: list}); `options` are Arrow's for writing."""
    path = folder / "shard-00000.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    columns = table.to_pydict()
    change(columns)
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(pa.table(columns, schema=table.schema))


def write_plan(folder: Path, seq_length: int, rows: list[list[tuple[int, int, int]]], name: str = "") -> None:
    """A plan of rows of (document, start, length), with its own digest."""
    flat = np.array([segment for row in rows for segment in row], np.int64).reshape(-1, 3)
    offsets = np.cumsum([0, *map(len, rows)])
    plan = PackingPlan(seq_length, offsets, *flat.T, num_dropped=0, num_truncated=0)
    write_packing(plan, folder / (name or f"packing-{seq_length}.arrow"))
