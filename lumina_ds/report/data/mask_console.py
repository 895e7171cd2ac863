"""A packed row on a terminal: tokens coloured by what training does with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from lumina_ds.report.data.mask_row import MaskRow, MaskSegment, Token

if TYPE_CHECKING:
    from rich.console import Console

TRAINED = "bold black on green3"
NOT_TRAINED = "default"
MARKER = "bold magenta"
BYTE = "italic"
PADDING = "red"
_PADDING_CELLS = 60
# Where there are no colours, as in a file, brackets stand around what is trained.
_OPENING, _CLOSING = "⟦", "⟧"


def print_row(row: MaskRow, console: Console) -> None:
    """Print one row: its conversations, each with source and line, then the padding."""
    tokens = row.seq_length - row.padding
    console.print(
        Text(f"row {row.row:,}: {tokens:,} of {row.seq_length:,} positions, {row.num_trained:,} trained", "bold")
    )
    for segment in row.segments:
        _print_segment(segment, console)
    if row.padding:
        cells = "·" * min(row.padding, _PADDING_CELLS) + ("…" if row.padding > _PADDING_CELLS else "")
        console.rule(Text(f"padding, {row.padding:,} positions", PADDING), align="left", style=PADDING)
        console.print(Text(cells, PADDING))
    console.print()


def print_legend(console: Console) -> None:
    """Print what the colours, or without colours the brackets, mean."""
    is_plain = console.color_system is None
    console.print(
        Text.assemble(
            (f"{_OPENING}trained{_CLOSING}" if is_plain else "trained", TRAINED),
            "  ",
            ("not trained", NOT_TRAINED),
            "  ",
            ("<|role|>", MARKER),
            (" marker  ", "dim"),
            ("E4", BYTE),
            (" byte  ", "dim"),
            ("····", PADDING),
            (" padding", "dim"),
        )
    )


def _print_segment(segment: MaskSegment, console: Console) -> None:
    title = f"{segment.source} line {segment.line:,}" + (f", {segment.cut}" if segment.cut else "")
    first, last = segment.tokens[0].position, segment.tokens[-1].position
    shown = Text(f"{title}  [{first:,} to {last:,}, {segment.num_trained:,} trained]", "cyan")
    console.rule(shown, align="left", style="cyan")
    line = Text()
    is_plain = console.color_system is None
    was_trained = False
    for token in segment.tokens:
        if is_plain and token.is_trained != was_trained:
            line.append(_OPENING if token.is_trained else _CLOSING)
        was_trained = token.is_trained
        line.append(token.shown, style=_style(token))
        if token.ends_line:
            line.append("\n")
    if is_plain and was_trained:
        line.append(_CLOSING)
    console.print(line)


def _style(token: Token) -> str:
    base = TRAINED if token.is_trained else NOT_TRAINED
    if token.kind == "marker":
        return f"{base} underline" if token.is_trained else MARKER
    return f"{base} {BYTE}" if token.kind == "byte" else base
