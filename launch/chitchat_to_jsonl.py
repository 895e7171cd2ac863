"""Turn the chats of the PyPI package chitchat-dataset into train.jsonl and eval.jsonl (messages format).

First step of launch/quickstart.sh. Who speaks first becomes the user, the other the assistant; what one of them
sends in a row becomes one turn; a chat in which nobody answered is dropped.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.main import run_command
from lumina_ds.errors import DataError, MachineError
from lumina_ds.text import counted, with_article

PACKAGE = "chitchat_dataset"
INSTALL = "pip install chitchat-dataset==0.9.0"
EVALUATION_INTERVAL = 50

Turn = dict[str, str]


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder of both files")
@click.option(
    "--source", type=click.Path(path_type=Path), help="dataset.json; that of the installed package when unset"
)
def command(out: Path, source: Path | None) -> None:
    """Write train.jsonl and eval.jsonl: every 50th conversation is held out for evaluation."""
    chats = read_chats(source or installed_dataset())
    conversations = list(to_conversations(chats))
    if len(conversations) < EVALUATION_INTERVAL:
        raise DataError(f"{len(conversations)} conversations with both sides are too few to hold any out; give more")
    held_out = conversations[EVALUATION_INTERVAL - 1 :: EVALUATION_INTERVAL]
    del conversations[EVALUATION_INTERVAL - 1 :: EVALUATION_INTERVAL]
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train.jsonl", conversations), ("eval.jsonl", held_out)):
        write_jsonl(out / name, part)
        click.echo(f"{out / name}: {counted(len(part), 'conversation')}, {counted(sum(map(len, part)), 'turn')}")
    click.echo(f"dropped: {len(chats) - len(conversations) - len(held_out):,} chats without an answer")


def installed_dataset() -> Path:
    """The package's data file, found without importing it; MachineError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MachineError(f"the package {PACKAGE} is not installed; {INSTALL}, or give --source")
    return Path(spec.origin).parent / "dataset.json"


def read_chats(path: Path) -> list[Any]:
    """The file's chats in their order: {id: {"messages": [[{"text", "sender", ...}, ...], ...]}}."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as JSON ({error}); {INSTALL} again, or give another --source") from error
    if not isinstance(loaded, dict):
        raise DataError(
            f"{path} holds {with_article(type(loaded).__name__)}, not chats by id; give chitchat-dataset's dataset.json"
        )
    return list(loaded.values())


def to_conversations(chats: Iterable[Mapping[str, Any]]) -> Iterator[list[Turn]]:
    """Turns in the roles user and assistant, by turns, beginning with the user; chats of one sender are left out."""
    for chat in chats:
        messages = [message for burst in chat["messages"] for message in burst if message["text"].strip()]
        runs = groupby(messages, key=lambda message: message["sender"])
        turns = [(sender, " ".join(message["text"].strip() for message in run)) for sender, run in runs]
        if len(turns) >= 2:
            first = turns[0][0]
            yield [
                {"role": "user" if sender == first else "assistant", "content": content} for sender, content in turns
            ]


def write_jsonl(path: Path, conversations: Iterable[list[Turn]]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for turns in conversations:
            stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(command, prog_name="chitchat_to_jsonl.py"))
