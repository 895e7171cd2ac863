"""The page of `lumina data stats --html`: what a finished shard folder holds and how well its rows are filled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lumina_ds.data.packing import PackingPlan
from lumina_ds.data.shards.folder import EVAL_FOLDER, REJECTED_FILE, ShardFolder
from lumina_ds.data.shards.text_loss import describe_loss
from lumina_ds.errors import DataError
from lumina_ds.report.data.distribution import Distribution
from lumina_ds.report.data.svg import figure
from lumina_ds.report.data.visible import excerpt
from lumina_ds.report.page import details, escape, page, section, table, tiles
from lumina_ds.text import counted

_EXAMPLES_PER_RULE = 3


def shard_page(path: Path, seq_length: int | None = None) -> str:
    """The whole document for the folder `path`, in rows of `seq_length` (None: its own). Raises DataError."""
    folder = ShardFolder.open(path)
    settings = folder.manifest.settings
    plan = folder.packing(seq_length or settings.seq_length)
    inputs = folder.manifest.inputs
    names = ", ".join(entry.name for entry in inputs[:3]) + (f" and {len(inputs) - 3} more" if len(inputs) > 3 else "")
    title = "Shards for training" if folder.manifest.split == "train" else "Shards for evaluation"
    return page(title, f"Made from {names or 'unnamed inputs'}.", _sections(folder, plan))


def _sections(folder: ShardFolder, plan: PackingPlan) -> Iterator[str]:
    yield tiles(_tiles(folder, plan))
    trained = np.array([int(folder.document(number)[1].sum()) for number in range(folder.num_documents)], np.int64)
    mark = (plan.seq_length, f"row of {plan.seq_length:,}")
    yield section(
        "Conversations",
        figure("Tokens per conversation", Distribution(folder.lengths), "tokens", mark),
        figure("Trained share of a conversation's tokens", Distribution(trained * 100 // folder.lengths), "percent"),
    )
    yield section("Packing", *_packing(folder, plan))
    yield section("Refused lines", _rejected(folder))
    if folder.manifest.split == "train":
        yield section("Tokenizer", _text_loss(folder))
    yield section("How it was made", _facts(folder))


def _tiles(folder: ShardFolder, plan: PackingPlan) -> list[tuple[str, str, str, str]]:
    totals = folder.manifest.totals
    held_out = f"; {totals.held_out:,} held out in {EVAL_FOLDER}/" if totals.held_out else ""
    return [
        ("Conversations", f"{totals.conversations:,}", f"of {counted(totals.lines, 'line')}{held_out}", ""),
        ("Refused", f"{totals.rejected:,}", "lines", "error" if totals.rejected else "good"),
        ("Tokens", f"{totals.tokens:,}", f"{totals.tokens / max(1, totals.conversations):,.0f} per conversation", ""),
        ("Trained", f"{totals.trained_tokens / max(1, totals.tokens):.1%}", "of the tokens", ""),
        ("Rows", f"{plan.num_rows:,}", f"of {plan.seq_length:,} tokens", ""),
        ("Fullness", f"{plan.fullness:.2%}", "of the rows' positions", ""),
    ]


def _packing(folder: ShardFolder, plan: PackingPlan) -> Iterator[str]:
    settings = folder.manifest.settings
    yield f"<p>Mode {escape(settings.packing)}; conversations longer than a row: {escape(settings.overlong)}.</p>"
    losses = plan.describe_losses(folder.manifest.totals.tokens)
    if losses:
        yield f'<p class="warning">{escape(losses)}.</p>'
    if not plan.num_rows:
        return
    tokens = np.add.reduceat(plan.lengths, plan.row_offsets[:-1])
    yield figure("Fullness of a row", Distribution(tokens * 100 // plan.seq_length), "percent")
    yield figure("Pieces of conversations in a row", Distribution(np.diff(plan.row_offsets)), "pieces")


def _text_loss(folder: ShardFolder) -> str:
    totals = folder.manifest.totals
    level = "good" if totals.text_loss and not totals.text_loss.is_any else "warning"
    lines = describe_loss(totals.text_loss, totals.tokens, totals.trained_tokens)
    return "\n".join(f'<p class="{level}">{escape(line)}.</p>' for line in lines)


def _rejected(folder: ShardFolder) -> str:
    by_rule = folder.manifest.totals.rejected_by_rule
    if not by_rule:
        return '<p class="good">None.</p>'
    examples = _rejected_examples(folder.path / REJECTED_FILE, len(by_rule))
    parts = []
    for rule, count in sorted(by_rule.items(), key=lambda item: (-item[1], item[0])):
        items = "".join(f"<li>{escape(excerpt(example, length=200))}</li>" for example in examples.get(rule, []))
        parts.append(details(f"{escape(rule)}: <strong>{count:,}</strong>", f"<ul>{items}</ul>", "rule", is_open=True))
    return "\n".join(parts)


def _rejected_examples(path: Path, num_rules: int) -> dict[str, list[str]]:
    """The first lines of each rule; read until every rule has its examples, at most the whole file."""
    examples: dict[str, list[str]] = {}
    if not path.is_file():
        return examples
    try:
        with path.open(encoding="utf-8") as stream:
            for entry in map(json.loads, stream):
                shown = examples.setdefault(entry["rule"], [])
                if len(shown) < _EXAMPLES_PER_RULE:
                    shown.append(f"{entry['source']} line {entry['line']:,}: {entry['reason']}")
                    if sum(map(len, examples.values())) == num_rules * _EXAMPLES_PER_RULE:
                        break
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; lumina data verify names every damaged file of its folder") from None
    return examples


def _facts(folder: ShardFolder) -> str:
    manifest = folder.manifest
    facts = [
        (name.replace("_", " "), "all" if value is None else str(value))
        for name, value in manifest.settings.model_dump().items()
    ]
    facts += [
        ("vocabulary", f"{manifest.tokenizer.vocab_size:,} ids"),
        ("tokenizer digest", manifest.tokenizer.digest),
        ("template", manifest.template.version),
        ("shard files", f"{len(manifest.shards):,}"),
        ("bytes in them", f"{sum(shard.size_bytes for shard in manifest.shards):,}"),
    ]
    inputs = [(entry.name, entry.sha256, f"{entry.size_bytes:,}") for entry in manifest.inputs]
    return table(("setting", "value"), facts, num_text_columns=2) + table(
        ("input", "SHA-256", "bytes"), inputs, num_text_columns=2
    )
