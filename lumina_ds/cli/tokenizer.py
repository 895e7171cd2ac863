"""`lumina tokenizer train|inspect`: train SentencePiece models for the chat template, look into any tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.data_options import format_option
from lumina_ds.logs import configure_logging
from lumina_ds.text import counted


@click.group()
def command() -> None:
    """Train a SentencePiece tokenizer, or inspect one or a tokenizer.json."""


@command.command(
    epilog="Example: lumina tokenizer train chats.jsonl --vocab-size 32000 --out tokenizer.model",
    short_help="train one on conversations",
)
@click.argument("files", nargs=-1, required=True)
@click.option("--vocab-size", required=True, type=click.IntRange(min=1), help="Ids of the vocabulary.")
@click.option("--model-type", default="bpe", show_default=True, type=click.Choice(["bpe", "unigram"]))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Model file to write.")
@click.option("--max-conversations", type=click.IntRange(min=1), help="Train on this many at most.")
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def train(
    files: tuple[str, ...],
    vocab_size: int,
    model_type: str,
    out: Path,
    max_conversations: int | None,
    format: str | None,
    as_json: bool,
) -> None:
    """Train a tokenizer on the conversations of FILES, with the template's markers as control symbols."""
    from preprocess.train_tokenizer import train_tokenizer

    configure_logging()
    tokenizer = train_tokenizer(
        files,
        vocab_size,
        out,
        model_type,  # type: ignore[arg-type]
        max_conversations,
        format_name=format,
    )
    if as_json:
        click.echo(json.dumps({"tokenizer": str(out), "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}))
    else:
        click.echo(f"{out}: {tokenizer.vocab_size:,} ids, digest {tokenizer.digest[:12]}")


@command.command(
    epilog='Example: lumina tokenizer inspect tokenizer.model "Hello there"',
    short_help="ids, markers, and how texts are cut",
)
@click.argument("model")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(model: str, texts: tuple[str, ...], as_json: bool) -> None:
    """Show a tokenizer's ids and markers, and how each TEXT is cut."""
    from lumina_ds.data.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model)
    encoded: list[dict[str, Any]] = [
        {
            "text": text,
            "ids": ids,
            "pieces": [tokenizer.piece(i) for i in ids],
            "bytes_per_token": round(len(text.encode()) / max(1, len(ids)), 3),
            "round_trip": tokenizer.decode(ids) == text,
        }
        for text, ids in zip(texts, tokenizer.encode_batch(list(texts)), strict=True)
    ]
    facts = {
        "tokenizer": model,
        "kind": tokenizer.file_name,
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "end_id": tokenizer.end_id,
        "role_ids": tokenizer.role_ids,
    }
    if as_json:
        click.echo(json.dumps(facts | {"texts": encoded}, ensure_ascii=False))
        return
    for name, value in facts.items():
        click.echo(f"{name:<12}{value}")
    for entry in encoded:
        click.echo(f"\n{entry['text']!r}: {counted(len(entry['ids']), 'token')}, {entry['bytes_per_token']} bytes each")
        click.echo("  " + " ".join(f"{piece}({i})" for piece, i in zip(entry["pieces"], entry["ids"], strict=True)))
        if not entry["round_trip"]:
            click.echo("  decodes to a different text")
