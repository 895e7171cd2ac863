"""`lumina chat`: a conversation on the terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.cli.model_source import clean_text, load_run, sampling_options, sampling_settings, source_options
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.text import counted

if TYPE_CHECKING:
    from lumina_ds.generate.history import History

COMMANDS = {
    "/help": "lists the commands",
    "/reset": "forgets the conversation and keeps --system",
    "/exit": "ends the chat",
    "/quit": "ends the chat",
}
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
    """Talk with the model of RUN: a run folder, a step folder or an exported folder. /help lists the commands; an empty
    line or Ctrl-D ends."""
    from lumina_ds.generate.chat import stream_reply
    from lumina_ds.generate.history import History

    settings = sampling_settings(sampling)
    loaded, manifest = load_run(run, inference_precision)
    history = History(
        loaded.tokenizer, loaded.model.config.max_position_embeddings, system, loaded.template, loaded.train_reasoning
    )
    # Without a terminal only the replies are printed, one a line; what else there is to say goes to stderr.
    prompts = sys.stdin.isatty()
    if prompts:
        at = "" if manifest["step"] is None else f", step {manifest['step']}"
        click.echo(f"{run}{at}. An empty line ends, /reset starts over, /help lists the commands.")
    while True:
        if prompts:
            click.echo("you> ", nl=False)
        line = clean_text(sys.stdin.readline()).rstrip("\n")
        if not line or _ends(line):
            return
        if _is_command(line):
            _obey(line.strip(), history)
            continue
        try:
            _say_dropped(history.ask(line))
        except (ConfigError, DataError) as error:
            click.echo(str(error), err=True)
            continue
        if prompts:
            click.echo("model> ", nl=False)
        reply = ""
        for piece in stream_reply(loaded, history.prompt, settings):
            reply += piece
            click.echo(piece, nl=False)
        click.echo()
        history.answer(reply)


def _ends(line: str) -> bool:
    word = line.strip().lower()
    if word in ("exit", "quit"):
        click.echo(f'"{word}" ends the chat, as /{word} does; the model did not get it', err=True)
    return word.removeprefix("/") in ("exit", "quit")


def _is_command(line: str) -> bool:
    """One word after a slash; a message may begin with one, as a path does."""
    return re.fullmatch(r"/\w+\s*", line) is not None


def _obey(word: str, history: History) -> None:
    if word == "/reset":
        history.reset()
        click.echo("the conversation is forgotten", err=True)
    elif word == "/help":
        click.echo("\n".join(f"{name:<7} {meaning}" for name, meaning in COMMANDS.items()), err=True)
    else:
        click.echo(f"there is no command {word}; {', '.join(COMMANDS)}", err=True)


def _say_dropped(num_exchanges: int) -> None:
    if num_exchanges:
        what = counted(num_exchanges, "old exchange is", "old exchanges are")
        click.echo(f"{what} forgotten: this message needs the room in the model's context", err=True)
