"""Findings of validation on a terminal: tables and histograms that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lumina_ds.data.remedies import remedy
from lumina_ds.report.data.distribution import Bin, Distribution
from lumina_ds.text import counted
from preprocess.other_keys import describe_other_keys
from preprocess.validation.findings import Findings, RuleCount, loss_lines

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"error": "bold red", "warning": "yellow"}
_MAX_INPUTS = 10
_WIDEST = 100
_TERMINAL_BINS = 14
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_PERCENTILES = (50, 95, 99)


def print_findings(findings: Findings, console: Console) -> None:
    """Print everything: totals, rules with examples, lengths, rows, repeats."""
    width = min(console.width, _WIDEST)
    _print_totals(findings, console)
    if len(findings.inputs) > 1:
        console.print(_inputs_table(findings))
    _print_rules(findings, console)
    for title, distribution in _distributions(findings):
        _print_distribution(title, distribution, console, width)
    if findings.tokens:
        console.print(_rows_table(findings))
    if findings.repeats:
        console.print(_repeats_table(findings))


def _print_totals(findings: Findings, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in _totals(findings):
        grid.add_row(name, value)
    console.print(grid)


def _totals(findings: Findings) -> Iterator[tuple[str, str]]:
    refused = findings.num_errors
    yield "conversations", f"{findings.conversations:,} of {counted(findings.lines, 'line')}; {refused:,} refused"
    yield "turns", ", ".join(f"{count:,} {role}" for role, count in findings.turns_by_role.most_common())
    yield "characters", f"{findings.characters.sum:,}; {findings.assistant_share:.1%} by assistants"
    if findings.other_keys:
        yield "other keys", describe_other_keys(findings.other_keys)
    for note, count in sorted(findings.notes.items()):
        yield "note", f"{count:,} {note}"
    if findings.tokens:
        yield "tokens", f"{findings.tokens.sum:,}; {findings.trained_share:.1%} trained"
    for line in loss_lines(findings):
        yield "tokenizer", line
    if loss := findings.row_loss:
        assert findings.tokens is not None
        lost = loss.tokens / max(1, findings.tokens.sum)
        yield (
            "overlong",
            f"{loss.conversations:,} above {loss.seq_length:,} tokens; truncation loses {lost:.1%} of the tokens",
        )


def _table(title: str, *columns: str) -> Table:
    """A plain table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _inputs_table(findings: Findings) -> Table:
    table = _table("\nInputs", "input", "lines", "refused", *(["tokens"] if findings.tokens else []))
    for entry in findings.inputs[:_MAX_INPUTS]:
        tokens = [f"{entry.tokens:,}"] if findings.tokens else []
        table.add_row(Text(entry.name), f"{entry.lines:,}", f"{entry.refused:,}", *tokens)
    if len(findings.inputs) > _MAX_INPUTS:
        table.add_row(f"and {len(findings.inputs) - _MAX_INPUTS:,} more")
    return table


def _print_rules(findings: Findings, console: Console) -> None:
    if not findings.rules:
        console.print("\nNo rule is broken.", style="green")
        return
    table = _table("\nRules broken", "rule", "lines", "share")
    table.add_column("level")
    for entry in findings.sorted_rules():
        share = f"{entry.count / findings.lines:.2%}"
        table.add_row(entry.rule, f"{entry.count:,}", share, Text(entry.level, _STYLES[entry.level]))
    console.print(table)
    console.print("Examples", style="bold")
    for entry in findings.sorted_rules():
        _print_examples(entry, console)


def _print_examples(entry: RuleCount, console: Console) -> None:
    console.print(Text(entry.rule, _STYLES[entry.level]))
    if how := remedy(entry.rule):
        console.print(Padding(Text(f"remedy: {how}"), (0, 0, 0, 2)))
    for example in entry.examples:
        place = Text(f"{example.source} line {example.line}: ", "cyan").append(example.reason, "default")
        console.print(Padding(place, (0, 0, 0, 2)))
        if example.excerpt:
            console.print(Padding(Text(example.excerpt, "dim", overflow="ellipsis", no_wrap=True), (0, 0, 0, 4)))


def _distributions(findings: Findings) -> Iterator[tuple[str, Distribution]]:
    if not findings.conversations:
        return
    if findings.tokens and findings.trained_percent:
        yield "Tokens per conversation", findings.tokens
        yield "Trained tokens per conversation, in percent", findings.trained_percent
    else:
        yield "Characters per conversation", findings.characters
    yield "Turns per conversation", findings.turns


def _print_distribution(title: str, distribution: Distribution, console: Console, width: int) -> None:
    console.print(f"\n{title}", style="bold")
    shown = [("mean", f"{distribution.mean:,.1f}"), ("min", f"{distribution.minimum:,}")]
    shown += [(f"p{percent}", f"{distribution.percentile(percent):,}") for percent in _PERCENTILES]
    shown.append(("max", f"{distribution.maximum:,}"))
    console.print(Text("  ".join(f"{name} {value}" for name, value in shown), "dim"))
    for line in histogram_lines(distribution.bins(_TERMINAL_BINS), width, console.options.ascii_only):
        console.print(Text(line), no_wrap=True)


def _rows_table(findings: Findings) -> Table:
    assert findings.tokens is not None
    table = _table("\nWhat truncation loses", "row length", "conversations cut", "share", "tokens lost", "share")
    for row in findings.row_losses():
        cut, lost = row.conversations / max(1, findings.conversations), row.tokens / max(1, findings.tokens.sum)
        table.add_row(f"{row.seq_length:,}", f"{row.conversations:,}", f"{cut:.1%}", f"{row.tokens:,}", f"{lost:.1%}")
    return table


def _repeats_table(findings: Findings) -> Table:
    table = Table(
        title="\nMost repeated", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("times", justify="right")
    table.add_column("first at", overflow="fold")
    table.add_column("conversation", overflow="ellipsis", no_wrap=True)
    for repeat in findings.repeats:
        table.add_row(f"{repeat.times:,}", Text(findings.place(repeat.places[0])), Text(repeat.excerpt))
    return table


def bar(share: float, width: int, ascii_only: bool = False) -> str:
    """A bar of `share` (0 to 1) of `width` cells; something above nothing is always seen."""
    if ascii_only:
        return "#" * max(round(share * width), int(share > 0))
    eighths = max(round(share * width * 8), int(share > 0))
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[part] if part else "")


def histogram_lines(bins: Sequence[Bin], width: int, ascii_only: bool = False) -> Iterator[str]:
    """Lines of at most `width` cells: the bin, its bar, its count and share."""
    total = sum(b.count for b in bins)
    highest = max((b.count for b in bins), default=0)
    labels = max((len(b.label) for b in bins), default=0)
    counts = len(f"{highest:,}")
    room = max(4, width - labels - counts - len("    100.0 %"))
    for b in bins:
        shown = bar(b.count / highest if highest else 0.0, room, ascii_only)
        yield f"{b.label:>{labels}}  {shown:<{room}} {b.count:>{counts},} {b.count / max(1, total):>7.1%}"
