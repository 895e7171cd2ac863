"""`lumina data formats|stats|verify|inspect|pack`: the kinds of lines that are read; look into a shard folder, or plan its rows anew."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.errors import DataError, MachineError
from lumina_ds.text import counted

if TYPE_CHECKING:
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.report.data.mask_row import MaskRow

INSPECT_EXAMPLES = """Examples:

\b
  lumina data inspect shards/train --row 0
  lumina data inspect shards/train --sample 3 --html masks.html
"""

_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
_HTML = click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def command() -> None:
    """Inspect, verify or summarise a shard folder, plan rows of another length, or list the formats that are read."""


@command.command(
    epilog="Example: lumina data formats", short_help="kinds of lines that are read, with an example of each"
)
@_JSON
def formats(as_json: bool) -> None:
    """List the kinds of lines that are read, and the containers of lines. The keys of a line tell its kind, and the first
    bytes of a file its container (of CSV and TSV, the names of the columns or of the file)."""
    from lumina_ds.data.formats import FORMATS
    from preprocess.containers.lines import CONTAINERS

    if as_json:
        found = {name: {"meaning": form.meaning, "example": form.example} for name, form in FORMATS.items()}
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for name, form in FORMATS.items():
        click.echo(f"{name}: {form.meaning}\n  {json.dumps(form.example, ensure_ascii=False)}")
    click.echo("\nContainers of such lines:")
    for name, meaning in CONTAINERS.items():
        click.echo(f"  {name}: {meaning}")


@command.command(epilog="Example: lumina data stats shards/train --html shards.html", short_help="count what is in it")
@_FOLDER
@click.option("--seq-length", type=click.IntRange(min=2), help="Row length to report on; the folder's own when unset.")
@_HTML
@_JSON
def stats(folder: Path, seq_length: int | None, html: Path | None, as_json: bool) -> None:
    """Count conversations, tokens, trained tokens and rows."""
    from lumina_ds.data.shards.folder import ShardFolder

    if html:
        from preprocess.validation.page import write_report

        write_report(folder, html, seq_length)
    summary = _summary(ShardFolder.open(folder), seq_length)
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))
        return
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{name:<22}{shown}")


@command.command(
    epilog="Example: lumina data verify shards/train", short_help="read every byte and name what is damaged"
)
@_FOLDER
@_JSON
def verify(folder: Path, as_json: bool) -> None:
    """Read every byte of DIR, and of DIR/eval, and name each damaged, missing or foreign file."""
    from lumina_ds.data.shards.verify import num_files, tree_faults

    faults = [f"{folder}/{fault}" for fault in tree_faults(folder)]
    if as_json:
        document = {"folder": str(folder), "files": num_files(folder), "intact": not faults, "faults": faults}
        click.echo(json.dumps(document, ensure_ascii=False))
    if faults:
        raise DataError(f"{folder} is damaged: " + "; ".join(faults))
    if not as_json:
        click.echo(f"{folder}: {counted(num_files(folder), 'file')} intact")


@command.command(epilog=INSPECT_EXAMPLES, short_help="show packed rows as the model sees them")
@_FOLDER
@click.option("--row", "row_id", type=click.IntRange(min=0), help="Packed row to show; the first when unset.")
@click.option("--sample", "num_rows", type=click.IntRange(min=1), help="Show so many rows, chosen at random.")
@click.option("--seed", default=0, show_default=True, help="Of --sample.")
@click.option("--seq-length", type=click.IntRange(min=2), help="Row length; the folder's own when unset.")
@_HTML
@_JSON
def inspect(
    folder: Path,
    row_id: int | None,
    num_rows: int | None,
    seed: int,
    seq_length: int | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show packed rows: trained tokens, the others, padding, and where each conversation begins."""
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.report.data.mask_row import read_row

    if row_id is not None and num_rows is not None:
        raise click.UsageError("--row and --sample exclude each other")
    shards = ShardFolder.open(folder)
    tokenizer = shards.tokenizer()
    plan = shards.packing(seq_length or shards.manifest.settings.seq_length)
    if row_id is not None and row_id >= plan.num_rows:
        raise click.BadParameter(f"{row_id} is beyond the last row, {plan.num_rows - 1}", param_hint="--row")
    chosen = _sample(plan.num_rows, num_rows, seed) if num_rows else [row_id or 0]
    _show_rows((read_row(shards, tokenizer, plan, number) for number in chosen), folder, html, as_json, bool(num_rows))


@command.command(
    epilog="Example: lumina data pack shards/train --seq-length 4096", short_help="plan rows of another length"
)
@_FOLDER
@click.option("--seq-length", required=True, type=click.IntRange(min=2), help="Tokens of a packed row.")
@_JSON
def pack(folder: Path, seq_length: int, as_json: bool) -> None:
    """Plan rows of another length for DIR and DIR/eval, from the lengths alone: nothing is tokenized again.

    The plan is kept beside the shards, as packing-N.arrow. Training makes one by itself where it needs one.
    """
    from lumina_ds.data.shards.folder import EVAL_FOLDER, ShardFolder
    from lumina_ds.data.shards.packing_file import packing_file

    plans = []
    for path in (folder, folder / EVAL_FOLDER):
        if path is not folder and not path.is_dir():
            continue
        shards = ShardFolder.open(path, force_streaming=True)
        plan = shards.packing(seq_length)
        file = path / packing_file(seq_length)
        if not file.is_file():
            raise MachineError(f"cannot write {file}; make {path} writable")
        plans.append({"file": str(file), "rows": plan.num_rows, "fullness": round(plan.fullness, 4)})
        if not as_json:
            losses = plan.describe_losses(shards.manifest.totals.tokens)
            click.echo(
                f"{file}: {counted(plan.num_rows, 'row')}, {plan.fullness:.1%} full" + (f"; {losses}" if losses else "")
            )
    if as_json:
        click.echo(json.dumps({"seq_length": seq_length, "plans": plans}))


def _sample(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below `total`, in order; the same for the same seed."""
    return sorted(random.Random(seed).sample(range(total), min(count, total)))


def _show_rows(rows: Iterable[MaskRow], folder: Path, html: Path | None, as_json: bool, is_sample: bool) -> None:
    """As JSON (one row, or `rows` of a sample), as a page, or on the terminal."""
    if html:
        from lumina_ds.report.data.mask_page import mask_page
        from lumina_ds.report.page import write_page

        rows = list(rows)
        write_page(mask_page(rows, str(folder)), html)
    if as_json:
        documents = [row.to_json() for row in rows]
        click.echo(json.dumps({"rows": documents} if is_sample else documents[0], ensure_ascii=False))
    elif html:
        click.echo(f"{html}: {folder} in a browser")
    else:
        from rich.console import Console

        from lumina_ds.report.data.mask_console import print_legend, print_row

        console = Console(highlight=False)
        print_legend(console)
        for row in rows:
            print_row(row, console)


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
