"""A chat template's certificate as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.certificate import CONDITIONS, Certificate
from lumina_ds.data.templates.jinja_template import JinjaTemplate
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.report.data.visible import visible
from lumina_ds.text import counted

_SHOWN_EXAMPLES = 2
_SHOWN_CHARACTERS = 600


def certificate_lines(found: Certificate, tokenizer: Tokenizer, tokenizer_name: str) -> Iterator[str]:
    """The certificate, a proven example with its labels in [[ ]], and the counterexamples."""
    template = found.template
    yield f"chat template  {template.name}, digest {template.digest[:12]}"
    yield f"tokenizer      {tokenizer_name}, digest {found.tokenizer_digest[:12]}"
    own = f", {found.num_own:,} of yours" if found.num_own else ""
    yield f"tried on       {found.num_tried:,} generated conversations{own}"
    yield ""
    for name, meaning in CONDITIONS.items():
        yield f"  {'proven' if found.failed(name) is None else 'FAILS '}  {name:<8}  {meaning}"
    yield ""
    yield from facts(template)
    for (kind, reason), count in found.refused.most_common():
        yield f"refused: {kind}, {counted(count, 'conversation', 'conversations')}: {reason}"
    for sample, row in found.examples[:_SHOWN_EXAMPLES]:
        yield f"\nproven{f', {sample.kind}' if sample.kind else ''}; label tokens in [[ ]]:"
        yield "  " + _marked(pieces(row.ids, row.mask, tokenizer))
    shown = set()
    for example in found.counterexamples:
        if example.condition in shown:
            continue
        shown.add(example.condition)
        yield f"\ncounterexample, {example.condition}: {example.reason}"
        whole, prompt = counterexample_pieces(template, tokenizer, example.messages, example.tools)
        yield f"  rendered:    {_marked(whole)}"
        yield f"  the prompt:  {_marked(prompt)}"
    yield ""
    yield f"certificate {found.digest}" if found.holds else "no certificate"


def facts(template: JinjaTemplate) -> Iterator[str]:
    """What is known of the template beside its conditions."""
    if template.stops:
        yield f"a reply ends with {' or '.join(template.stops)}"
    if template.ends_with_next and template.stops:
        yield f"the next turn's first token ends a reply, so {template.stops[0]} is added after the last one, as a label"
    if template.rewrites:
        yield "it rewrites earlier replies when later turns are added, so only the last reply is trained"
    if template.day:
        yield f"it writes the date: {template.day}"


class Piece(NamedTuple):
    """Tokens of one kind that stand together, as text."""

    text: str
    is_label: bool
    is_special: bool


def pieces(ids: Sequence[int], mask: Sequence[int], tokenizer: Tokenizer) -> list[Piece]:
    """A row as visible text, cut where labels begin or end and around special tokens."""
    special = set(tokenizer.special_tokens.values())
    kinds = [(bool(is_label), i if i in special else -1) for i, is_label in zip(ids, mask, strict=True)]
    found = []
    for (is_label, special_id), group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        run = [i for _, i in group]
        text = tokenizer.piece(special_id) * len(run) if special_id >= 0 else tokenizer.decode(run)
        found.append(Piece(visible(text), is_label, special_id >= 0))
    return found


def counterexample_pieces(
    template: JinjaTemplate, tokenizer: Tokenizer, messages: Sequence[Any], tools: Any
) -> tuple[list[Piece], list[Piece]]:
    """What the template makes of a conversation without a proof, and of the prompt before its last reply; nothing of
    what it refuses."""
    writer = template.with_tokenizer(tokenizer)
    shown = []
    for part, is_prompt in ((messages, False), (messages[:-1], True)):
        try:
            ids = writer.encoder.encode(writer.text(part, tools, is_prompt)).ids
        except (RejectedLine, ValueError):
            ids = []
        shown.append(pieces(ids, [0] * len(ids), tokenizer))
    return shown[0], shown[1]


def _marked(found: Sequence[Piece]) -> str:
    """One line, labels in [[ ]]."""
    text = "".join(
        f"[[{joined}]]" if is_label else joined
        for is_label, group in groupby(found, key=lambda piece: piece.is_label)
        if (joined := "".join(piece.text for piece in group))
    )
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
