"""`lumina preprocess`: JSONL conversations to packed Arrow shards."""

from __future__ import annotations

import gc
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from lumina_ds.cli.data_options import chat_template_option, format_option, train_reasoning_option, train_turns_option
from lumina_ds.logs import configure_logging
from lumina_ds.text import as_max_rejected

if TYPE_CHECKING:
    from preprocess.workers import Workers


EXAMPLES = """Examples:

\b
  lumina preprocess chats.jsonl --tokenizer tokenizer.model --seq-length 4096 --out shards/train
  zcat chats/*.gz | lumina preprocess - --tokenizer tokenizer.model --seq-length 4096 --out shards/train
"""


def _max_rejected(ctx: click.Context, parameter: click.Parameter, value: str) -> int | float:
    try:
        return as_max_rejected(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number of lines nor a share such as 0.05 or 5%") from None


@click.command(epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True)
@click.option("--tokenizer", "tokenizer_path", required=True, metavar="FILE", help="SentencePiece or tokenizer.json.")
@chat_template_option
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
@train_turns_option
@train_reasoning_option
@format_option
@click.option(
    "--max-rejected",
    default="5%",
    show_default=True,
    metavar="NUMBER|SHARE",
    callback=_max_rejected,
    help="Fail above this many refused lines, or this share of all lines, such as 0.05 or 5% (exit code 3).",
)
@click.option(
    "--allow-unknown",
    is_flag=True,
    help="Train on ids for characters that the tokenizer cannot spell (else exit code 3).",
)
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
    max_rejected: int | float,
    allow_unknown: bool,
    overwrite: bool,
    chat_template: str,
    **settings: object,
) -> None:
    """Tokenize, mask and pack the conversations of FILES.

    FILES are names, globs, saved datasets, or - for standard input: JSONL, JSON arrays, Parquet, Arrow, CSV or TSV, plain
    or packed by gzip, zstd, bzip2 or xz.
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
    _load_numba()
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
            allow_unknown=allow_unknown,
            overwrite=overwrite,
            chat_template=chat_template,
        )
    if as_json:
        click.echo(json.dumps(manifest.model_dump(), ensure_ascii=False))
    else:
        from preprocess.summary import summary_lines

        for line in summary_lines(out, manifest):
            click.echo(line)


def _load_numba() -> None:
    """Import numba without SciPy's linear algebra, which no compiled code here uses: a quarter of a second.

    numba takes it at its import where SciPy is installed, and asks for it again where code needs it. Only in a process of
    this verb's own: others may compile what it is for.
    """
    blas = "scipy.linalg.cython_blas"
    if blas in sys.modules:
        return
    sys.modules[blas] = None  # type: ignore[assignment]  # how Python marks a module that is not to be had
    try:
        import_module("numba.np.arraymath")
    except ImportError:  # without numba all is done uncompiled, and said where it is
        pass
    finally:
        del sys.modules[blas]


def _mpi_workers() -> AbstractContextManager[Workers | None]:
    from preprocess.mpi import mpi_workers

    return mpi_workers()
