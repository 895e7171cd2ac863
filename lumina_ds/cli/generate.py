"""`lumina generate`: a reply to a prompt, or to every prompt of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from lumina_ds.cli.model_source import clean_text, load_run, sampling_options, sampling_settings, source_options
from lumina_ds.errors import MachineError
from lumina_ds.text import counted

EXAMPLES = """Examples:

\b
  lumina generate runs/debug --prompt "How are you?" --temperature 0.7
  lumina generate exported --prompts questions.jsonl --out replies.jsonl
"""


@click.command(epilog=EXAMPLES)
@source_options
@click.option("--prompt", help="the user's turn; - reads standard input")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help='JSONL, a {"prompt": ...} or {"messages": [...]} a line: replies as JSONL',
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="with --prompts: file for the replies, else standard output"
)
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="one JSON document: prompt, reply, step")
def command(
    run: Path,
    inference_precision: str | None,
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    system: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer with the model of RUN: a run folder, one of its step folders, or an exported folder.

    The same seed gives the same reply, whatever else is in the file.
    """
    settings = sampling_settings(sampling)
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give one of --prompt and --prompts")
    if prompts is not None:
        if as_json:
            raise click.UsageError("--prompts writes JSONL, a document a line; leave --json out")
        return _answer_file(run, inference_precision, prompts, out, system, settings)
    if out is not None:
        raise click.UsageError("--out goes with --prompts; redirect standard output for one reply")
    _answer(run, inference_precision, prompt or "", system, settings, as_json)


def _answer(run: Path, precision: str | None, prompt: str, system: str | None, settings: Any, as_json: bool) -> None:
    from lumina_ds.data.conversation import Turn
    from lumina_ds.generate.chat import stream_reply

    prompt = clean_text(sys.stdin.read() if prompt == "-" else prompt)
    if not prompt:
        raise click.UsageError("--prompt is empty; give the user's turn")
    loaded, manifest = load_run(run, precision)
    turns = [Turn("system", system)] if system else []
    pieces = []
    for piece in stream_reply(loaded, [*turns, Turn("user", prompt)], settings):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        click.echo(json.dumps({"prompt": prompt, "reply": "".join(pieces), "step": manifest["step"]}))
    else:
        click.echo()


def _answer_file(
    run: Path, precision: str | None, prompts: Path, out: Path | None, system: str | None, settings: Any
) -> None:
    from lumina_ds.generate.batch import read_prompts, replies

    asked = read_prompts(prompts, system)
    if out is None:
        for record in replies(load_run(run, precision)[0], asked, settings):
            click.echo(json.dumps(record, ensure_ascii=False))
        return
    with _opened(out) as stream:
        records = replies(load_run(run, precision)[0], asked, settings)
        for record in _shown(records, len(asked)):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            # What is answered stays when the rest is interrupted.
            stream.flush()
    click.echo(f"{counted(len(asked), 'reply', 'replies')} in {out}", err=True)


def _opened(out: Path) -> IO[str]:
    """`out` for writing, asked for before a model is loaded; MachineError where there can be no such file."""
    try:
        return click.open_file(str(out), "w", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def _shown(records: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(records, "replies", total, console=console, disable=not console.is_terminal)
