"""`lumina data stats|verify|inspect`: look into a shard folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.errors import DataError

if TYPE_CHECKING:
    from lumina_ds.data.shards import ShardFolder
    from lumina_ds.data.tokenizer import Tokenizer

_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def command() -> None:
    """Inspect, verify or summarise a shard folder."""


@command.command()
@_FOLDER
@click.option("--seq-length", type=click.IntRange(min=2), help="Row length to report on; the folder's own when unset.")
@_JSON
def stats(folder: Path, seq_length: int | None, as_json: bool) -> None:
    """Count conversations, tokens, trained tokens and rows."""
    from lumina_ds.data.shards import ShardFolder

    summary = _summary(ShardFolder.open(folder), seq_length)
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{name:<22}{shown}")


@command.command()
@_FOLDER
@_JSON
def verify(folder: Path, as_json: bool) -> None:
    """Read every byte of DIR, and of DIR/eval, and name each damaged, missing or foreign file."""
    from lumina_ds.data.manifest import read_manifest
    from lumina_ds.data.shards import EVAL_FOLDER, folder_faults

    folders = [folder] + ([folder / EVAL_FOLDER] if (folder / EVAL_FOLDER).is_dir() else [])
    faults = [f"{path}/{fault}" for path in folders for fault in folder_faults(path)]
    num_files = sum(len(manifest.shards) + len(manifest.files) for manifest in map(read_manifest, folders))
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "files": num_files, "intact": not faults, "faults": faults}))
    if faults:
        raise DataError(f"{folder} is damaged: " + "; ".join(faults))
    if not as_json:
        click.echo(f"{folder}: {num_files} files intact")


@command.command()
@_FOLDER
@click.option("--row", "row_id", default=0, show_default=True, type=click.IntRange(min=0), help="Packed row to show.")
@click.option("--seq-length", type=click.IntRange(min=2), help="Row length; the folder's own when unset.")
@_JSON
def inspect(folder: Path, row_id: int, seq_length: int | None, as_json: bool) -> None:
    """Show one packed row: trained tokens, the others, padding, and where each conversation begins."""
    from lumina_ds.data.shards import ShardFolder
    from lumina_ds.data.tokenizer import Tokenizer

    shards = ShardFolder.open(folder)
    row = _row(shards, Tokenizer.load(shards.tokenizer_path), row_id, seq_length)
    if as_json:
        click.echo(json.dumps(row, ensure_ascii=False))
    else:
        _print_row(row)


def _summary(folder: ShardFolder, seq_length: int | None) -> dict[str, Any]:
    manifest = folder.manifest
    plan = folder.packing(seq_length or manifest.settings.seq_length)
    totals = manifest.totals
    return {
        "folder": str(folder.path),
        "split": manifest.split,
        "lines": totals.lines,
        "conversations": totals.conversations,
        "held_out": totals.held_out,
        "rejected": totals.rejected,
        "rejected_by_rule": totals.rejected_by_rule,
        "tokens": totals.tokens,
        "trained_tokens": totals.trained_tokens,
        "trained_share": round(totals.trained_tokens / totals.tokens, 4),
        "shortest_tokens": int(folder.lengths.min()),
        "longest_tokens": int(folder.lengths.max()),
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.size_bytes for shard in manifest.shards),
        "seq_length": plan.seq_length,
        "packing": manifest.settings.packing,
        "overlong": manifest.settings.overlong,
        "rows": plan.num_rows,
        "row_fullness": round(plan.fullness, 4),
        "dropped_overlong": plan.num_dropped,
        "truncated_overlong": plan.num_truncated,
        "vocab_size": manifest.tokenizer.vocab_size,
        "tokenizer_digest": manifest.tokenizer.digest,
        "template": manifest.template.version,
    }


def _row(folder: ShardFolder, tokenizer: Tokenizer, row_id: int, seq_length: int | None) -> dict[str, Any]:
    """One packed row as training sees it: a token is trained where it is the target of its predecessor."""
    plan = folder.packing(seq_length or folder.manifest.settings.seq_length)
    if row_id >= plan.num_rows:
        raise click.BadParameter(f"{row_id} is beyond the last row, {plan.num_rows - 1}", param_hint="--row")
    segments = []
    for segment in plan.row(row_id):
        ids, mask = (
            column[segment.start : segment.start + segment.length] for column in folder.document(segment.document)
        )
        trained = mask.tolist()
        trained[0] = 0
        segments.append(
            {
                **segment._asdict(),
                **folder.origin(segment.document)._asdict(),
                "ids": ids.tolist(),
                "pieces": [tokenizer.piece(i) for i in ids.tolist()],
                "trained": trained,
            }
        )
    num_tokens = sum(segment["length"] for segment in segments)
    return {"row": row_id, "seq_length": plan.seq_length, "padding": plan.seq_length - num_tokens, "segments": segments}


def _print_row(row: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    legend = Text("trained", style="bold green") + Text("  not trained", style="dim") + Text("  padding", style="red")
    console.print(Text(f"row {row['row']} of {row['seq_length']} tokens   ") + legend)
    for segment in row["segments"]:
        first, last = segment["start"], segment["start"] + segment["length"] - 1
        title = f"\n-- {segment['source']} line {segment['line']}, tokens {first} to {last}, {sum(segment['trained'])} trained"
        console.print(Text(title, style="cyan"))
        line = Text()
        for piece, trained in zip(segment["pieces"], segment["trained"], strict=True):
            line.append(_readable(piece), style="bold green" if trained else "dim")
        console.print(line)
    if row["padding"]:
        console.print(Text(f"\n-- padding: {row['padding']} positions", style="red"))


def _readable(piece: str) -> str:
    """Spaces as spaces, a marker or byte set off by its brackets."""
    return "\n" if piece == "<0x0A>" else piece.replace("\u2581", " ")
