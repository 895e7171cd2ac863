"""The mask microscope as a page: every token of packed rows, with id, position and label when pointed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lumina_ds.report.data.mask_row import MaskRow, MaskSegment, Token
from lumina_ds.report.page import details, escape, page, section, table
from lumina_ds.text import counted

STYLE = """
:root { --trained: #b7e4c0; --edge: #1a7f37; --hatch: #f3c6c2; --marker: #7a3fb0; }
@media (prefers-color-scheme: dark) { :root { --trained: #1d4d2b; --edge: #56d364; --hatch: #5b2623; --marker: #d2a8ff; } }
.tokens { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .8rem;
  line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.tokens span { box-shadow: inset 0 0 0 1px var(--line); border-radius: .15rem; padding: .12em 0; unicode-bidi: isolate; }
.tokens .y, .legend .y { background: var(--trained); box-shadow: inset 1px 0 0 var(--panel), inset 0 -2px 0 var(--edge); }
.tokens .m, .legend .m { color: var(--marker); font-weight: 700; }
.tokens .b, .legend .b { font-style: italic; letter-spacing: .05em; color: var(--muted); }
.tokens .y.b { color: inherit; }
.pad, .legend .p { background: repeating-linear-gradient(135deg, var(--hatch) 0 5px, transparent 5px 10px);
  border: 1px solid var(--line); border-radius: .4rem; }
.pad { padding: .45rem .8rem; margin-top: .5rem; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--page); padding: .5rem 0; border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; font-size: .9rem; }
.legend span { border-radius: .15rem; padding: 0 .3rem; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; font-weight: 600; } h3 .muted { font-weight: 400; }
.tokens span:hover { outline: 2px solid var(--accent); }
.tokens span:hover::after { content: attr(data-t); position: fixed; left: 0; right: 0; bottom: 0; z-index: 2;
  padding: .55rem 1.25rem; background: var(--text); color: var(--page); font: 15px/1.4 ui-monospace, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-style: normal; letter-spacing: 0; white-space: normal; }
@media print { .legend { position: static; } .tokens span, .pad, .legend span { print-color-adjust: exact;
  -webkit-print-color-adjust: exact; } }
"""
_LEGEND = (
    '<div class="legend" role="note" aria-label="Legend"><span class="y">trained</span><span>not trained</span>'
    '<span class="m">&lt;|role|&gt;</span> marker<span class="b">E4</span> byte<span class="p">padding</span></div>'
    '<p class="muted">Point at a token to see its id, its position and its label. A token is trained where the model is '
    "taught to predict it from what stands before it in the same conversation.</p>"
)


def mask_page(rows: Iterable[MaskRow], folder: str) -> str:
    """The whole document; `folder` names the shards in the subtitle."""
    return page("Mask microscope", f"Packed rows of {folder}", _sections(rows), STYLE)


def _sections(rows: Iterable[MaskRow]) -> Iterator[str]:
    yield _LEGEND
    for row in rows:
        tokens = row.seq_length - row.padding
        summary = (
            f"{tokens:,} of {row.seq_length:,} positions ({tokens / row.seq_length:.1%}), {row.num_trained:,} trained "
            f"({row.num_trained / max(1, tokens):.1%}), {counted(len(row.segments), 'conversation or piece of one', 'conversations or pieces of them')}"
        )
        parts = [f'<p class="muted">{summary}</p>', *map(_segment, row.segments)]
        if row.padding:
            parts.append(f'<div class="pad">padding: {row.padding:,} positions</div>')
        parts.append(details("Tokens as a table", _token_table(row)))
        yield section(f"Row {row.row:,}", *parts)


def _segment(segment: MaskSegment) -> str:
    first, last = segment.tokens[0].position, segment.tokens[-1].position
    cut = f", {segment.cut}" if segment.cut else ""
    title = (
        f"<h3>{escape(segment.source)} line {segment.line:,}{escape(cut)} "
        f'<span class="muted">positions {first:,} to {last:,}, {segment.num_trained:,} trained</span></h3>'
    )
    return f'{title}<div class="tokens mono">{"".join(map(_token, segment.tokens))}</div>'


def _token(token: Token) -> str:
    kinds = ("y" if token.is_trained else "", {"marker": "m", "byte": "b", "text": ""}[token.kind])
    style = f' class="{" ".join(filter(None, kinds))}"' if any(kinds) else ""
    facts = f"id {token.id} | position {token.position} in the row, {token.document_position} in the conversation | {token.label}"
    end = "\n" if token.ends_line else ""
    return f'<span{style} data-t="{escape(facts)}">{escape(token.shown)}</span>{end}'


def _token_table(row: MaskRow) -> str:
    rows = (
        (token.shown, token.label, f"{segment.source} line {segment.line:,}", token.id, token.position)
        for segment in row.segments
        for token in segment.tokens
    )
    return table(("token", "label", "conversation", "id", "position"), rows, f"Tokens of row {row.row:,}", 3)
