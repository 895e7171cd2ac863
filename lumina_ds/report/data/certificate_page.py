"""A chat template's certificate as a page: what is proven, and conversations with their label tokens coloured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lumina_ds.data.templates.certificate import CONDITIONS, Certificate
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.report.data.certificate_text import Piece, counterexample_pieces, facts, pieces
from lumina_ds.report.data.mask_page import STYLE
from lumina_ds.report.page import escape, page, section, table

_LEGEND = (
    '<div class="legend" role="note" aria-label="Legend"><span class="y">label</span><span>not trained</span>'
    '<span class="m">&lt;|special|&gt;</span> special token</div>'
)


def certificate_page(found: Certificate, tokenizer: Tokenizer) -> str:
    """The whole document."""
    verdict = f"Certificate {found.digest}" if found.holds else "No certificate: something is not proven"
    return page(f"Chat template {found.template.name}", verdict, _sections(found, tokenizer), STYLE)


def _sections(found: Certificate, tokenizer: Tokenizer) -> Iterator[str]:
    rows = [
        (name, meaning, "proven" if found.failed(name) is None else "fails") for name, meaning in CONDITIONS.items()
    ]
    own = f" and {found.num_own:,} of your own" if found.num_own else ""
    tried = f"<p>Tried on {found.num_tried:,} generated conversations{own}.</p>"
    known = "".join(f"<p>{escape(fact)}.</p>" for fact in facts(found.template))
    yield section("Conditions", table(("condition", "meaning", "result"), rows, num_text_columns=3), tried, known)
    for example in found.counterexamples[:20]:
        whole, prompt = counterexample_pieces(found.template, tokenizer, example.messages, example.tools)
        yield section(
            f"Counterexample: {example.condition}",
            f'<p class="warning">{escape(example.reason)}</p>',
            f"<h3>Rendered</h3>{_tokens(whole)}<h3>The prompt of its last reply</h3>{_tokens(prompt)}",
        )
    if found.refused:
        counts = [(kind, reason, f"{count:,}") for (kind, reason), count in found.refused.most_common()]
        yield section("Conversations that it refuses", table(("kind", "reason", "count"), counts, num_text_columns=2))
    if found.examples:
        shown = (
            f"<h3>{escape(sample.kind or 'question and answer')}</h3>{_tokens(pieces(row.ids, row.mask, tokenizer))}"
            for sample, row in found.examples
        )
        yield section("Proven conversations", _LEGEND, *shown)


def _tokens(found: Sequence[Piece]) -> str:
    spans = []
    for piece in found:
        kinds = " ".join(filter(None, ("y" if piece.is_label else "", "m" if piece.is_special else "")))
        spans.append(f'<span class="{kinds}">{escape(piece.text)}</span>' if kinds else escape(piece.text))
    return f'<div class="tokens mono">{"".join(spans)}</div>'
