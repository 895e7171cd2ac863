"""What preprocessing did to the data, in a few lines and as a record: nothing is lost without standing here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina_ds.data.remedies import remedy
from lumina_ds.data.shards.folder import EVAL_FOLDER
from lumina_ds.data.shards.manifest import Manifest, read_manifest
from lumina_ds.data.shards.packing_file import packing_file, read_packing
from lumina_ds.data.shards.text_loss import describe_loss
from lumina_ds.text import counted
from preprocess.other_keys import describe_other_keys


def summary_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    """For a terminal: conversations, refused lines by rule with the first of each, tokens, rows, what is lost."""
    totals = manifest.totals
    held_out = f", {totals.held_out:,} held out in {folder / EVAL_FOLDER}" if totals.held_out else ""
    yield (
        f"{folder}: {counted(totals.conversations, 'conversation')}{held_out}, "
        f"{totals.rejected:,} of {counted(totals.lines, 'line')} rejected"
    )
    for rule, count in totals.rejected_by_rule.items():
        first = totals.first_rejected.get(rule)
        yield f"  rejected {count:,}: {rule}" + (f" (first: {first})" if first else "")
        if how := remedy(rule):
            yield f"    remedy: {how}"
    if totals.other_keys:
        yield f"  keys without a meaning here: {describe_other_keys(totals.other_keys)}"
    for note, count in totals.notes.items():
        yield f"  {count:,} {note}"
    # Opening the folder would read its shards.
    plan = read_packing(folder / packing_file(manifest.settings.seq_length))
    yield (
        f"{counted(totals.tokens, 'token')}, {totals.trained_tokens / totals.tokens:.1%} trained; "
        f"{counted(plan.num_rows, 'row')} of {plan.seq_length}, {plan.fullness:.1%} full"
    )
    for line in describe_loss(totals.text_loss, totals.tokens, totals.trained_tokens):
        yield f"  {line}"
    losses = plan.describe_losses(totals.tokens)
    if losses:
        yield f"  {losses}"


def summary_record(folder: Path) -> dict[str, Any]:
    """The same as one JSON document, with those lines as `summary`."""
    manifest = read_manifest(folder)
    plan = read_packing(folder / packing_file(manifest.settings.seq_length))
    return {
        "shards": str(folder),
        "summary": list(summary_lines(folder, manifest)),
        "inputs": [entry.model_dump() for entry in manifest.inputs],
        "settings": manifest.settings.model_dump(),
        **manifest.totals.model_dump(),
        "rows": plan.num_rows,
        "cut_conversations": plan.num_truncated,
        "dropped_conversations": plan.num_dropped,
        "pieces_without_label_tokens": plan.num_without_labels,
        "lost_tokens": max(0, manifest.totals.tokens - int(plan.lengths.sum())),
    }
