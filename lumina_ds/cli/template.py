"""`lumina template check`: is a chat template's mask right for a tokenizer, and where is it not?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lumina_ds.errors import ConfigError, DataError
from lumina_ds.text import counted

EXAMPLES = """Examples:

\b
  lumina template check chatml --tokenizer model/tokenizer.json
  lumina template check auto --tokenizer model/tokenizer.json --data chats.jsonl --html certificate.html
"""


@click.group()
def command() -> None:
    """Prove the masks of a chat template."""


@command.command(epilog=EXAMPLES, short_help="prove a template's masks for a tokenizer, or show where they fail")
@click.argument("template", metavar="NAME|FILE.jinja|auto")
@click.option("--tokenizer", "tokenizer_path", required=True, metavar="FILE", help="SentencePiece or tokenizer.json.")
@click.option("--data", "files", multiple=True, metavar="FILE", help="Prove it on these conversations too.")
@click.option(
    "--max-conversations", default=1000, show_default=True, type=click.IntRange(min=1), help="Of --data, so many."
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def check(
    template: str,
    tokenizer_path: str,
    files: tuple[str, ...],
    max_conversations: int,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print the certificate of a chat template for a tokenizer.

    The template is tried on conversations made for it and on those of --data. Exit code 3 where something is not
    proven; then a conversation shows it.
    """
    from lumina_ds.data.templates.certificate import certify, to_json
    from lumina_ds.data.templates.find import find_template, tokenizer_for
    from lumina_ds.data.templates.jinja_template import JinjaTemplate
    from lumina_ds.data.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_path)
    found = find_template(template, tokenizer)
    if not isinstance(found.template, JinjaTemplate):
        return _check_entry(found, tokenizer, _own(files, max_conversations), html, as_json)
    tokenizer = tokenizer_for(tokenizer, found.template)
    certificate = certify(found.template, tokenizer, _own(files, max_conversations))
    if html:
        from lumina_ds.report.data.certificate_page import certificate_page
        from lumina_ds.report.page import write_page

        write_page(certificate_page(certificate, tokenizer), html)
    if as_json:
        click.echo(json.dumps(to_json(certificate), ensure_ascii=False))
    else:
        from lumina_ds.report.data.certificate_text import certificate_lines

        for line in certificate_lines(certificate, tokenizer, tokenizer_path):
            click.echo(line)
    if not certificate.holds:
        first = certificate.counterexamples[0]
        raise DataError(f"{found.name} has no certificate for {tokenizer_path}: {first.condition}: {first.reason}")


def _check_entry(found: Any, tokenizer: Any, own: Iterator[Any], html: Path | None, as_json: bool) -> None:
    """A template of the table is made of ids, which the same conditions are tried on; it needs no certificate."""
    from lumina_ds.data.templates.certificate import CONDITIONS
    from lumina_ds.data.templates.own_check import try_entry

    name, digest = found.name, found.digest
    if html:
        raise ConfigError(f"{name} is made of ids around each content and renders no text to show; leave --html out")
    plain = [messages for messages, _, _ in own if all(message.keys() == {"role", "content"} for message in messages)]
    num_tried, faults = try_entry(found.template, tokenizer, plain)
    failed = {fault.condition for fault in faults}
    if as_json:
        conditions = [
            {"condition": each, "meaning": meaning, "holds": each not in failed} for each, meaning in CONDITIONS.items()
        ]
        document = {"template": name, "template_digest": digest, "tokenizer_digest": tokenizer.digest}
        click.echo(json.dumps({**document, "certified": not faults, "conditions": conditions, "tried": num_tried}))
    else:
        click.echo(
            f"chat template  {name}, digest {digest[:12]}\ntried on       {counted(num_tried, 'conversation')}, {len(plain)} of yours without tools and reasoning\n"
        )
        for each, meaning in CONDITIONS.items():
            click.echo(f"  {'FAILS ' if each in failed else 'proven'}  {each:<8}  {meaning}")
    if faults:
        raise DataError(f"{name}: {faults[0].condition}: {faults[0].reason}")


def _own(files: tuple[str, ...], most: int) -> Iterator[tuple[Any, Any, Any]]:
    """Messages, labels and tools of the first conversations of `files`; lines that are none are passed over."""
    from lumina_ds.data.conversation import is_blank, parse_conversation, split_lines
    from lumina_ds.data.strict_json import RejectedLine
    from lumina_ds.data.turns import to_messages
    from preprocess.sources import BLOCK_BYTES, resolve_inputs

    num_left, num_refused = most, 0
    for file in resolve_inputs(files) if files else ():
        for block in file.blocks(BLOCK_BYTES):
            for _, line in split_lines(block.data):
                if is_blank(line) or not num_left:
                    continue
                try:
                    conversation = parse_conversation(line)
                except RejectedLine:
                    num_refused += 1
                    continue
                num_left -= 1
                messages, tools = to_messages(conversation)
                yield messages, conversation.trained, tools
            if not num_left:
                break
    if num_refused:
        click.echo(
            f"{counted(num_refused, 'line is', 'lines are')} no conversation; lumina validate says why", err=True
        )
