"""The HTML reports: the page of `lumina validate --report`, and the one door to it and to that of a shard folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lumina_ds.report.data.shard_page import shard_page
from lumina_ds.report.data.svg import figure
from lumina_ds.report.page import details, escape, page, section, table, tiles, write_page
from lumina_ds.text import counted
from preprocess.validation.findings import Findings, RuleCount, loss_lines
from preprocess.validation.rules import WARNINGS


def write_report(folder_or_findings: str | Path | Findings, path: str | Path, seq_length: int | None = None) -> None:
    """Write a self-contained HTML page about a shard folder, or about what validate_files() found.

    The page depends on the content alone, so the same folder gives the same bytes. `seq_length`: the rows of a
    folder's page, the folder's own when None. Raises DataError when the folder is damaged, MachineError when the page
    cannot be written.
    """
    if isinstance(folder_or_findings, Findings):
        document = validation_page(folder_or_findings)
    else:
        document = shard_page(Path(folder_or_findings), seq_length)
    write_page(document, Path(path))


def validation_page(findings: Findings) -> str:
    """The whole document; the same findings give the same bytes."""
    names = [entry.name for entry in findings.inputs]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    measured = f"tokens of {findings.tokenizer}" if findings.tokenizer else "characters; --tokenizer counts tokens"
    return page("Validation of conversations", f"{shown}. Lengths in {measured}.", _sections(findings))


def _sections(findings: Findings) -> Iterator[str]:
    yield tiles(_tiles(findings))
    yield section("Rules", _rules(findings))
    if lines := loss_lines(findings):
        yield section("Tokenizer", "\n".join(f"<p>{escape(line)}</p>" for line in lines))
    if findings.conversations:
        yield section("Lengths", *_lengths(findings))
    if findings.tokens:
        yield section("Rows", _rows(findings))
    if findings.repeats:
        rows = [(findings.place(r.places[0]), r.excerpt, f"{r.times:,}") for r in findings.repeats]
        yield section("Most repeated", table(("first at", "conversation", "times"), rows, num_text_columns=2))
    yield section("Contents", _roles(findings), _inputs(findings))


def _tiles(findings: Findings) -> list[tuple[str, str, str, str]]:
    errors, warnings = findings.num_errors, findings.num_warnings
    entries = [
        ("Conversations", f"{findings.conversations:,}", f"of {counted(findings.lines, 'line')}", ""),
        ("Errors", f"{errors:,}", "lines that preprocess refuses", "error" if errors else "good"),
        ("Warnings", f"{warnings:,}", "rules broken by usable lines", "warning" if warnings else "good"),
    ]
    if findings.tokens:
        entries.append(("Tokens", f"{findings.tokens.sum:,}", f"{findings.tokens.mean:,.0f} per conversation", ""))
        entries.append(("Trained", f"{findings.trained_share:.1%}", "of the tokens", ""))
    else:
        entries.append(
            ("Characters", f"{findings.characters.sum:,}", f"{findings.characters.mean:,.0f} per conversation", "")
        )
        entries.append(("By assistants", f"{findings.assistant_share:.1%}", "of the characters", ""))
    if loss := findings.row_loss:
        assert findings.tokens is not None
        lost = loss.tokens / max(1, findings.tokens.sum)
        entries.append(("Lost by truncation", f"{lost:.1%}", f"of the tokens, in rows of {loss.seq_length:,}", ""))
    return entries


def _rules(findings: Findings) -> str:
    if not findings.rules:
        return '<p class="good">No rule is broken.</p>'
    return '<p class="muted">Open a rule to see its first lines.</p>\n' + "\n".join(
        _rule(entry, findings.lines) for entry in findings.sorted_rules()
    )


def _rule(entry: RuleCount, lines: int) -> str:
    meaning = WARNINGS.get(entry.rule, "lumina preprocess refuses the line")
    summary = (
        f'<span class="level {entry.level}">{entry.level}</span> {escape(entry.rule)}: '
        f"<strong>{entry.count:,}</strong> of {counted(lines, 'line')} ({entry.count / lines:.2%})"
        f' <span class="muted">{escape(meaning)}</span>'
    )
    items = "".join(
        f'<li>{escape(e.source)} line {e.line:,}: {escape(e.reason)}<br><code class="excerpt">{escape(e.excerpt)}</code></li>'
        for e in entry.examples
    )
    return details(summary, f"<ul>{items}</ul>", "rule", is_open=entry.level == "error")


def _lengths(findings: Findings) -> Iterator[str]:
    if findings.tokens and findings.trained_percent:
        mark = (findings.seq_length, f"row of {findings.seq_length:,}") if findings.seq_length else None
        yield figure("Tokens per conversation", findings.tokens, "tokens", mark)
        yield figure("Trained share of a conversation's tokens", findings.trained_percent, "percent")
    else:
        yield figure("Characters per conversation", findings.characters, "characters")
    yield figure("Turns per conversation", findings.turns, "turns")


def _rows(findings: Findings) -> str:
    assert findings.tokens is not None
    total = max(1, findings.tokens.sum)
    rows = [
        (
            f"{row.seq_length:,}",
            f"{row.conversations:,}",
            f"{row.conversations / max(1, findings.conversations):.1%}",
            f"{row.tokens:,}",
            f"{row.tokens / total:.1%}",
        )
        for row in findings.row_losses()
    ]
    headings = ("row length", "conversations cut", "share", "tokens lost", "share")
    return table(headings, rows, "What --overlong truncate would lose at other row lengths")


def _roles(findings: Findings) -> str:
    total = max(1, findings.characters.sum)
    rows = [
        (
            role,
            f"{count:,}",
            f"{findings.characters_by_role[role]:,}",
            f"{findings.characters_by_role[role] / total:.1%}",
        )
        for role, count in findings.turns_by_role.most_common()
    ]
    return table(("role", "turns", "characters", "share"), rows)


def _inputs(findings: Findings) -> str:
    rows = [
        (entry.name, f"{entry.lines:,}", f"{entry.conversations:,}", f"{entry.refused:,}", f"{entry.tokens:,}")
        for entry in findings.inputs
    ]
    headings = ("input", "lines", "conversations", "refused", "tokens")
    keep = 5 if findings.tokens else 4
    return table(headings[:keep], [row[:keep] for row in rows])
