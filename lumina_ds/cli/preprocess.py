"""`lumina preprocess`: JSONL conversations to packed Arrow shards."""

from __future__ import annotations

import gc
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from lumina_ds.logs import configure_logging

if TYPE_CHECKING:
    from lumina_ds.data.shards.manifest import Manifest
    from preprocess.workers import Workers


EXAMPLES = """Examples:

\b
  lumina preprocess chats.jsonl --tokenizer tokenizer.model --seq-length 4096 --out shards/train
  zcat chats/*.gz | lumina preprocess - --tokenizer tokenizer.model --seq-length 4096 --out shards/train
"""


@click.command(epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True)
@click.option("--tokenizer", "tokenizer_path", required=True, metavar="FILE", help="SentencePiece or tokenizer.json.")
@click.option("--seq-length", required=True, type=click.IntRange(min=2), help="Tokens of a packed row.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Shard folder to write.")
@click.option("--workers", "--num-workers", "num_workers", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--mpi", is_flag=True, help="Encode on the other ranks of this MPI job: mpirun -n K ... --mpi.")
@click.option("--shard-size-mb", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--disable-sharding", is_flag=True, help="Write one shard file whatever its size.")
@click.option("--max-conversations", type=click.IntRange(min=1), help="Stop after this many.")
@click.option(
    "--eval-fraction",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share held out into OUT/eval, chosen by a hash of the content.",
)
@click.option("--packing", default="best_fit", show_default=True, type=click.Choice(["best_fit", "concat", "none"]))
@click.option(
    "--overlong",
    default="truncate",
    show_default=True,
    type=click.Choice(["truncate", "split", "drop"]),
    help="What happens to conversations longer than a row; --packing concat cuts them at row ends.",
)
@click.option("--max-rejected", type=click.IntRange(min=0), help="Fail above this many refused lines (exit code 3).")
@click.option("--overwrite", is_flag=True, help="Replace a shard folder made with other settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as one JSON document.")
@click.pass_context
def command(
    ctx: click.Context,
    files: tuple[str, ...],
    tokenizer_path: str,
    out: Path,
    num_workers: int,
    mpi: bool,
    as_json: bool,
    max_rejected: int | None,
    overwrite: bool,
    **settings: object,
) -> None:
    """Tokenize, mask and pack the conversations of FILES (JSONL, globs, .gz, .zst, or - for standard input).

    A run that was killed leaves OUT.partial; the same command goes on from there.
    """
    from lumina_ds.data.shards.manifest import Settings
    from preprocess.pipeline import preprocess_files

    if mpi and num_workers != 1:
        raise click.UsageError("--mpi makes the ranks the workers; leave --workers out, or --mpi")
    is_set = ctx.get_parameter_source("overlong") is not ParameterSource.DEFAULT
    if is_set and settings["packing"] == "concat" and settings["overlong"] != "split":
        raise click.UsageError(
            f"--packing concat cuts conversations at row ends, which --overlong {settings['overlong']} contradicts; "
            "leave it out, or use --packing best_fit"
        )
    configure_logging()
    # Imports and loading compiled code make many objects and no garbage; looking for it takes a tenth of a short run.
    gc.set_threshold(100_000)
    with _mpi_workers() if mpi else nullcontext() as workers:
        if mpi and workers is None:  # a rank that only encodes
            return
        manifest = preprocess_files(
            files,
            tokenizer_path,
            out,
            Settings.model_validate(settings),
            num_workers=num_workers,
            workers=workers,
            max_rejected=max_rejected,
            overwrite=overwrite,
        )
    if as_json:
        click.echo(json.dumps(manifest.model_dump(), ensure_ascii=False))
    else:
        _print_summary(manifest, out)


def _mpi_workers() -> AbstractContextManager[Workers | None]:
    from preprocess.mpi import mpi_workers

    return mpi_workers()


def _print_summary(manifest: Manifest, out: Path) -> None:
    from lumina_ds.data.shards.packing_file import packing_file, read_packing

    totals = manifest.totals
    plan = read_packing(out / packing_file(manifest.settings.seq_length))  # opening the folder would read its shards
    held_out = f", {totals.held_out:,} held out in {out}/eval" if totals.held_out else ""
    click.echo(
        f"{out}: {totals.conversations:,} conversations{held_out}, {totals.rejected:,} of {totals.lines:,} lines rejected"
    )
    for rule, count in totals.rejected_by_rule.items():
        click.echo(f"  rejected {count:,}: {rule}")
    losses = plan.describe_losses(totals.tokens)
    trained = totals.trained_tokens / totals.tokens
    click.echo(
        f"{totals.tokens:,} tokens, {trained:.1%} trained; {plan.num_rows:,} rows of {plan.seq_length}, {plan.fullness:.1%} full"
    )
    if losses:
        click.echo(f"  {losses}")
