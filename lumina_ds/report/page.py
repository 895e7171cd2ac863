"""The frame of every HTML report: one file, no network, no scripts, light and dark, printable.

A page is a list of sections of already escaped HTML; everything that comes from data passes escape().
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from lumina_ds import __version__
from lumina_ds.errors import MachineError
from lumina_ds.files import write_atomically

# Nothing may be loaded or run, whatever a conversation holds; images are part of the page itself.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2128; --muted: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --shade: #8c959f99; --accent: #2563c9; --tail: #8ca9dd; --error: #b3261e; --warning: #8a5a00; --good: #1a7f37; --mark: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --text: #e4e9ef; --muted: #9aa6b2; --line: #343c46;
  --panel: #1b2129; --shade: #000000cc; --accent: #6aa3ff; --tail: #3d5c91; --error: #ff8a80; --warning: #e3b341; --good: #56d364;
  --mark: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.1rem 0 .3rem; }
p { margin: .4rem 0; } a { color: var(--accent); } .muted { color: var(--muted); }
code, .mono { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono", "DejaVu Sans Mono", monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile dt { color: var(--muted); font-size: .85rem; } .tile dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
.tile dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
.error { color: var(--error); } .warning { color: var(--warning); } .good { color: var(--good); }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--page) 40%, transparent) left / 2.5rem 100%,
  linear-gradient(to left, var(--page) 40%, transparent) right / 2.5rem 100%,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100%,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
table + table, .scroll + .scroll { margin-top: 1.2rem; }
caption { text-align: left; color: var(--muted); padding: .2rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .number { text-align: right; } td.number { white-space: nowrap; }
td.text { overflow-wrap: anywhere; } td.text:first-child { overflow-wrap: break-word; }
.level { white-space: nowrap; font-weight: 600; }
figure { margin: 1rem 0; } figcaption { color: var(--muted); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; max-width: 46rem; overflow: visible; }
svg text { fill: var(--muted); font-size: 12px; } svg .bar { fill: var(--accent); } svg .tail { fill: var(--tail); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .mark { stroke: var(--mark); stroke-width: 2;
  stroke-dasharray: 5 3; } svg text.mark-label { fill: var(--mark); stroke: none; }
.narrow { display: none; }
@media (max-width: 36rem) { .wide { display: none; } .narrow { display: block; } svg text { font-size: 14px; } }
details { margin: .3rem 0; } summary { cursor: pointer; color: var(--accent); }
details.rule > summary { color: inherit; padding: .15rem 0; }
details ul { margin: .3rem 0 .6rem; padding-left: 1.2rem; } .excerpt { overflow-wrap: anywhere; unicode-bidi: isolate; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, .tile, tr { break-inside: avoid; }
  .scroll { background: none; overflow: visible; }
  h2, h3 { break-after: avoid; } details.rule::details-content { content-visibility: visible; block-size: auto; } }
"""


def escape(text: object) -> str:
    """Text for any place in a page, attributes included."""
    return html.escape(str(text), quote=True)


def page(title: str, subtitle: str, sections: Iterable[str], style: str = "") -> str:
    """A whole document. `sections` are HTML; title and subtitle are text."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>{_STYLE}{style}</style>\n</head>\n'
        f'<body>\n<header>\n<h1>{escape(title)}</h1>\n<p class="muted">{escape(subtitle)}</p>\n</header>\n<main>\n'
        + "\n".join(sections)
        + f"\n</main>\n<footer>Lumina DS {escape(__version__)}</footer>\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def tiles(entries: Sequence[tuple[str, str, str, str]]) -> str:
    """Large figures: (name, value, what else there is to say, class) each."""
    cells = [
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="{style}">{escape(value)}'
        f"{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more, style in entries
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", num_text_columns: int = 1
) -> str:
    """A table of text; the columns after the first `num_text_columns` are numbers and stand right.

    Where the screen is too narrow for it, it scrolls, and a shadow at the border says that there is more.
    """

    def cells(tag: str, row: Sequence[object]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = ("text" if number < num_text_columns else "number" for number in range(len(row)))
        return "".join(
            f'<{tag}{scope} class="{kind}">{escape(value)}</{tag}>' for kind, value in zip(kinds, row, strict=True)
        )

    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    shown = f"<caption>{escape(caption)}</caption>" if caption else ""
    return scrolling(f"<table>{shown}{head}<tbody>{body}</tbody></table>")


def scrolling(content: str) -> str:
    """HTML that may be wider than the screen, reached by the keyboard too."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def details(summary: str, content: str, style: str = "", is_open: bool = False) -> str:
    """A part that opens on a click; `summary` and `content` are HTML."""
    return f'<details class="{style}"{" open" if is_open else ""}><summary>{summary}</summary>{content}</details>'


def write_page(document: str, path: Path) -> None:
    """Write a page, whole or not at all. Raises MachineError where it cannot be written."""
    try:
        write_atomically(path, document)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}; name a file in a folder that exists") from error
