"""Files written so that a crash leaves the old content or the new, digests of files, and the index of weight files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Which safetensors file holds which tensor, in the form that Hugging Face's libraries write and read.
WEIGHTS_INDEX = "model.safetensors.index.json"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` so that a reader, or a crash, sees the old file or the new one, never a part.

    Text is written as UTF-8. The temporary name is this process's own, so two writers do not mix.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_weights_index(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of the safetensors index in `folder`.

    Raises OSError when it cannot be read, ValueError when it is no index or names a file outside the folder.
    """
    try:
        places = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if name in ("", ".", "..") or Path(name).name != name]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{WEIGHTS_INDEX} is no index of weight files") from error
    if outside:
        raise ValueError(f"{WEIGHTS_INDEX} names {outside[0]!r}, which is outside the folder")
    return places


def weights_index(places: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
    """The content of the index file that read_weights_index reads."""
    return json.dumps({"metadata": dict(metadata), "weight_map": dict(places)}, indent=1)
