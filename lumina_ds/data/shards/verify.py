"""A shard folder together with its held-out part: what is damaged, missing or foreign, down to the single bit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lumina_ds.data.shards.folder import EVAL_FOLDER, folder_faults
from lumina_ds.data.shards.manifest import MANIFEST_FILE, Manifest, read_manifest
from lumina_ds.errors import DataError
from lumina_ds.text import counted


def tree_faults(path: Path) -> list[str]:
    """Read every byte of the folder and of the held-out folder in it; one line per fault, beginning with the file.

    An intact folder gives none. Raises DataError only where no sound manifest says what ought to be there.
    """
    manifest = read_manifest(path)
    faults = folder_faults(path)
    held_out = path / EVAL_FOLDER
    if not manifest.totals.held_out:
        return faults + ([f"{EVAL_FOLDER}: not part of this folder"] if held_out.exists() else [])
    if not held_out.is_dir():
        return [*faults, f"{EVAL_FOLDER}: missing, with {manifest.totals.held_out:,} held-out conversations"]
    try:
        inner = tree_faults(held_out)
        reason = _foreign_part(manifest, read_manifest(held_out))
    except DataError as error:
        return [*faults, f"{EVAL_FOLDER}/{MANIFEST_FILE}: {error}"]
    if reason:
        faults.append(f"{EVAL_FOLDER}: {reason}, so it was held out of other data")
    return faults + [f"{EVAL_FOLDER}/{fault}" for fault in inner]


def num_files(path: Path) -> int:
    """Files that the manifests of the folder and, where it can be read, of its held-out part list."""
    manifests = [read_manifest(path)]
    with suppress(DataError):
        manifests.append(read_manifest(path / EVAL_FOLDER))
    return sum(len(manifest.shards) + len(manifest.files) for manifest in manifests)


def _foreign_part(manifest: Manifest, held_out: Manifest) -> str | None:
    """Why `held_out` cannot be what was held out of `manifest`; None when it can."""
    if held_out.split != "eval":
        return f"it holds the split {held_out.split!r}"
    if held_out.totals.conversations != manifest.totals.held_out:
        return f"it holds {counted(held_out.totals.conversations, 'conversation')}, not {manifest.totals.held_out:,}"
    for name in ("inputs", "tokenizer", "template", "settings"):
        if getattr(held_out, name) != getattr(manifest, name):
            return f"its manifest names other {name}"
    return None
