"""`lumina generate`: one reply to a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from lumina_ds.cli.model_source import clean_text, load_run, sampling_options, source_options

EXAMPLE = 'Example: lumina generate runs/debug --prompt "How are you?" --temperature 0.7'


@click.command(epilog=EXAMPLE)
@source_options
@click.option("--prompt", required=True, help="the user's turn; - reads standard input")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="one JSON document: prompt, reply, step")
def command(
    run: Path,
    inference_precision: str | None,
    prompt: str,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    seed: int | None,
    system: str | None,
    as_json: bool,
) -> None:
    """Answer PROMPT with the model of RUN (a run folder or one of its step folders)."""
    from lumina_ds.data.conversation import Turn
    from lumina_ds.generate.chat import stream_reply
    from lumina_ds.generate.sampling import SamplingSettings

    settings = SamplingSettings(temperature, top_p, top_k, max_new_tokens, seed)
    settings.check()
    if prompt == "-":
        prompt = sys.stdin.read()
    prompt = clean_text(prompt)
    if not prompt:
        raise click.UsageError("--prompt is empty; give the user's turn")
    loaded, manifest = load_run(run, inference_precision)
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
