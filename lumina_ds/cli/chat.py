"""`lumina chat`: a conversation on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.model_source import clean_text, load_run, sampling_options, sampling_settings, source_options

EXAMPLE = "Example: lumina chat runs/debug --temperature 0.7"


@click.command(epilog=EXAMPLE)
@source_options
@sampling_options
def command(
    run: Path,
    inference_precision: str | None,
    system: str | None,
    **sampling: Any,
) -> None:
    """Talk with the model of RUN: a run folder, a step folder or an exported folder. An empty line or Ctrl-D ends; /reset forgets the conversation."""
    from lumina_ds.data.chat_template import encode_prompt
    from lumina_ds.data.conversation import Turn
    from lumina_ds.generate.chat import stream_reply

    settings = sampling_settings(sampling)
    loaded, manifest = load_run(run, inference_precision)
    # Without a terminal only the replies are printed, one a line.
    prompts = sys.stdin.isatty()
    if prompts:
        at = "" if manifest["step"] is None else f", step {manifest['step']}"
        click.echo(f"{run}{at}. An empty line ends, /reset starts over.")
    opening = [Turn("system", system)] if system else []
    turns = list(opening)
    context = loaded.model.config.max_position_embeddings
    while True:
        if prompts:
            click.echo("you> ", nl=False)
        line = clean_text(sys.stdin.readline()).rstrip("\n")
        if not line:
            return
        if line == "/reset":
            turns = list(opening)
            continue
        turns.append(Turn("user", line))
        # The oldest exchange goes when half the context is spoken for, so that a reply always has room.
        while len(turns) > len(opening) + 1 and len(encode_prompt(turns, loaded.tokenizer)) > context // 2:
            del turns[len(opening) : len(opening) + 2]
        if len(encode_prompt(turns, loaded.tokenizer)) >= context:
            click.echo(f"that is longer than the model's context of {context} tokens; say it shorter")
            turns.pop()
            continue
        if prompts:
            click.echo("model> ", nl=False)
        reply = ""
        for piece in stream_reply(loaded, turns, settings):
            reply += piece
            click.echo(piece, nl=False)
        click.echo()
        turns.append(Turn("assistant", reply))
