"""`lumina validate`: check JSONL conversations without preprocessing them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lumina_ds.cli.data_options import chat_template_option, format_option, train_reasoning_option, train_turns_option
from lumina_ds.config.chat_templates import ALIASES, TEMPLATES
from lumina_ds.errors import DataError
from lumina_ds.text import counted

if TYPE_CHECKING:
    from lumina_ds.data.turns import TrainReasoning, TrainTurns

EXAMPLES = """Examples:

\b
  lumina validate chats.jsonl
  lumina validate chats.jsonl --tokenizer tokenizer.model --seq-length 4096 --strict --report report.html
"""


@click.command(epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True)
@click.option("--tokenizer", "tokenizer_path", metavar="FILE", help="Count tokens with this model, else characters.")
@chat_template_option
@click.option("--seq-length", type=click.IntRange(min=2), help="Report what rows of so many tokens would cut.")
@train_turns_option
@train_reasoning_option
@format_option
@click.option("--allow-unknown", is_flag=True, help="Let trained ids for characters that the tokenizer lacks pass.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained HTML page.")
@click.option("--examples", "num_examples", default=3, show_default=True, type=click.IntRange(0, 100), help="Per rule.")
@click.option("--strict", is_flag=True, help="Let warnings fail too (exit code 3).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    files: tuple[str, ...],
    tokenizer_path: str | None,
    chat_template: str,
    seq_length: int | None,
    train_turns: TrainTurns,
    train_reasoning: TrainReasoning,
    format: str | None,
    allow_unknown: bool,
    report: Path | None,
    num_examples: int,
    strict: bool,
    as_json: bool,
) -> None:
    """Check the conversations of FILES.

    FILES are names, globs, saved datasets, or - for standard input: JSONL, JSON arrays, Parquet, Arrow, CSV or TSV, plain
    or packed by gzip, zstd, bzip2 or xz.
    Errors are lines that `lumina preprocess` refuses; with one or more the exit code is 3. Warnings are lines
    that it takes but that are rarely meant so.
    """
    from preprocess.text_check import check_unknown
    from preprocess.validation.findings import to_json
    from preprocess.validation.page import write_report
    from preprocess.validation.validate import validate_files

    if seq_length is not None and tokenizer_path is None:
        raise click.UsageError("--seq-length counts tokens, so it needs --tokenizer")
    if chat_template not in (*TEMPLATES, *ALIASES) and tokenizer_path is None:
        raise click.UsageError(f"--chat-template {chat_template} is proven for a tokenizer, so it needs --tokenizer")
    with _progress() as on_progress:
        findings = validate_files(
            files,
            tokenizer_path,
            seq_length,
            num_examples=num_examples,
            train_turns=train_turns,
            train_reasoning=train_reasoning,
            format_name=format,
            chat_template=chat_template,
            on_progress=on_progress,
        )
    if report:
        write_report(findings, report)
    if as_json:
        click.echo(json.dumps(to_json(findings), ensure_ascii=False))
    else:
        from rich.console import Console

        from preprocess.validation.console import print_findings

        print_findings(findings, Console(highlight=False))
    if findings.num_errors:
        rules = ", ".join(entry.rule for entry in findings.sorted_rules() if entry.level == "error")
        raise DataError(f"{findings.num_errors:,} of {counted(findings.lines, 'line')} cannot be used: {rules}")
    if findings.text_check is not None:
        check_unknown(findings.text_check.loss(), allow_unknown, findings.lines, str(tokenizer_path))
    if strict and findings.num_warnings:
        raise DataError(f"{counted(findings.num_warnings, 'warning')}, and --strict allows none")


@contextmanager
def _progress() -> Iterator[Callable[[int], None] | None]:
    """Megabytes read so far, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("validate"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("validate", total=None)
        yield lambda num_bytes: display.update(task, completed=num_bytes)
