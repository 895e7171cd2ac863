"""A shard folder together with its held-out part: what is damaged, missing or foreign, down to the single bit.

A digest tells damage. Whoever computes it again after a change is found by the content: ids that the tokenizer does not
have, other masks than 0 and 1, lengths that disagree, plans that do not fit the conversations.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lumina_ds.data.shards.folder import EVAL_FOLDER, REPORT_FILE, ShardFolder
from lumina_ds.data.shards.manifest import (
    MANIFEST_FILE,
    MAX_SEQ_LENGTH,
    FileEntry,
    Manifest,
    read_manifest,
)
from lumina_ds.data.shards.packing_file import packing_file, read_packing, write_packing
from lumina_ds.data.shards.plan_check import fault_of_rows, fault_of_segments
from lumina_ds.data.shards.shard import REMEDY, Shard
from lumina_ds.data.shards.writer import shard_schema
from lumina_ds.data.tokenizer.tokenizer import TOKENIZER_FILES
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from lumina_ds.foreign_files import file_fault, shown
from lumina_ds.text import counted

_MOST_SHOWN = 20
_PLAN = re.compile(r"packing-([1-9][0-9]{0,7})\.arrow")


def verify_folder(path: Path) -> None:
    """Read every byte; raises DataError that names each damaged, missing or foreign file."""
    if faults := folder_faults(path):
        raise DataError(f"{path} is damaged: {listed_faults(faults)}; {REMEDY}")


def listed_faults(faults: Sequence[str]) -> str:
    """Faults for one line."""
    more = f"; and {len(faults) - _MOST_SHOWN:,} more" if len(faults) > _MOST_SHOWN else ""
    return "; ".join(faults[:_MOST_SHOWN]) + more


def tree_faults(path: Path) -> list[str]:
    """Read every byte of the folder and of the held-out folder in it; one line per fault, beginning with the file.

    An intact folder gives none. Raises DataError only where no sound manifest says what ought to be there.
    """
    manifest = read_manifest(path)
    faults = folder_faults(path)
    held_out = path / EVAL_FOLDER
    if not manifest.totals.held_out:
        return faults + ([f"{EVAL_FOLDER}: not part of this folder"] if held_out.exists() else [])
    if held_out.is_symlink():
        return [*faults, f"{EVAL_FOLDER}: is a link, which leads out of the folder"]
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


def folder_faults(path: Path) -> list[str]:
    """Read every byte of a shard folder and return one line per fault, each beginning with its file's name.

    An intact folder gives none. Raises DataError only where no manifest says what ought to be there.
    """
    manifest = read_manifest(path)
    entries: list[FileEntry] = [*manifest.shards, *manifest.files]
    found = ((entry.file, file_fault(path / entry.file, entry.size_bytes, entry.sha256)) for entry in entries)
    faults = [f"{file}: {fault}" for file, fault in found if fault is not None]
    if not faults:
        faults += _content_faults(path, manifest)
    is_sound = not faults
    known = {entry.file for entry in entries} | {MANIFEST_FILE, EVAL_FOLDER, REPORT_FILE}
    for file in sorted(path.iterdir()):
        if file.name in known or file.name.startswith("."):
            continue
        if not _seq_length_of(file.name):
            faults.append(f"{shown(file.name)}: not part of this folder")
        elif not (_is_own_packing(path, file) if is_sound else _plan_fault(file) is None):
            faults.append(f"{file.name}: damaged, or made from other shards")
    return faults


def _content_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """What no digest tells, of files that have the digests of the manifest."""
    vocab_size = manifest.tokenizer.vocab_size
    schema = shard_schema(vocab_size)
    listed = {entry.file: entry for entry in manifest.files}
    if not any(listed[name].sha256 == manifest.tokenizer.digest for name in TOKENIZER_FILES if name in listed):
        yield f"{MANIFEST_FILE}: the folder holds another tokenizer than the one that it names"
    is_sound = True
    for entry in manifest.shards:
        if fault := Shard(path / entry.file, entry, schema, in_memory=False).content_fault(vocab_size):
            is_sound = False
            yield f"{entry.file}: {fault}"
    folder = ShardFolder.open(path, force_streaming=True) if is_sound else None
    for name in filter(_seq_length_of, listed):
        if fault := _plan_fault(path / name, folder):
            yield f"{name}: {fault}"


def _seq_length_of(name: str) -> int:
    """The row length that a plan's name tells; 0 for another name."""
    found = _PLAN.fullmatch(name)
    return int(found[1]) if found and int(found[1]) <= MAX_SEQ_LENGTH else 0


def _plan_fault(path: Path, folder: ShardFolder | None = None) -> str | None:
    """What is wrong with a plan, by itself, and beside the sound shards of `folder`."""
    try:
        plan = read_packing(path)
    except DataError:
        return "damaged, or made from other shards"
    if folder is None:
        return None
    rows = fault_of_rows(plan, _seq_length_of(path.name), folder.num_documents)
    return rows or fault_of_segments(plan, folder.lengths)


def _is_own_packing(path: Path, plan: Path) -> bool:
    """A plan added later is in no manifest, but the shards tell every byte that it must hold."""
    folder = ShardFolder.open(path, force_streaming=True)
    if _plan_fault(plan, folder):
        return False
    seq_length = _seq_length_of(plan.name)
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / packing_file(seq_length)
        write_packing(folder.compute_packing(seq_length), expected)
        return file_digest(plan) == file_digest(expected)
