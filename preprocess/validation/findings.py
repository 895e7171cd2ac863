"""What validation found, as plain values: counts per rule with examples, distributions, losses of rows, duplicates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lumina_ds.data.remedies import remedy
from lumina_ds.data.shards.text_loss import describe_loss
from lumina_ds.report.data.distribution import Distribution
from preprocess.text_check import TextCheck
from preprocess.validation.duplicates import Repeat
from preprocess.validation.rules import WARNINGS, Level, level_of

ROW_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


class Example(NamedTuple):
    """One breach of a rule: where, one phrase about it, and the text it stands in, made visible."""

    source: str
    line: int
    reason: str
    excerpt: str


@dataclass
class RuleCount:
    """Lines that break one rule, each counted once, and the first few of them."""

    rule: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)

    @property
    def level(self) -> Level:
        return level_of(self.rule)


@dataclass
class InputCount:
    """Lines of one input, blank ones not counted: conversations are those that preprocess would take."""

    name: str
    lines: int = 0
    conversations: int = 0
    tokens: int = 0

    @property
    def refused(self) -> int:
        return self.lines - self.conversations


@dataclass
class RowLoss:
    """What rows of `seq_length` tokens lose when longer conversations are cut."""

    seq_length: int
    conversations: int  # longer than that
    tokens: int  # beyond it


@dataclass
class Findings:
    """All that validation found. Token figures are None without a tokenizer."""

    tokenizer: str | None
    seq_length: int | None
    inputs: list[InputCount] = field(default_factory=list)
    rules: dict[str, RuleCount] = field(default_factory=dict)
    turns_by_role: Counter[str] = field(default_factory=Counter)
    characters_by_role: Counter[str] = field(default_factory=Counter)
    characters: Distribution = field(default_factory=Distribution)  # of a conversation's contents
    turns: Distribution = field(default_factory=Distribution)  # of a conversation
    tokens: Distribution | None = None  # of a conversation, with markers
    trained_percent: Distribution | None = None  # of a conversation's tokens
    trained_tokens: int = 0
    row_loss: RowLoss | None = None  # at seq_length
    text_check: TextCheck | None = None
    repeats: list[Repeat] = field(default_factory=list)
    other_keys: Counter[str] = field(default_factory=Counter)  # places of keys that mean nothing here
    notes: Counter[str] = field(default_factory=Counter)  # what is to be said of conversations, and how often

    @property
    def lines(self) -> int:
        return sum(entry.lines for entry in self.inputs)

    @property
    def conversations(self) -> int:
        return sum(entry.conversations for entry in self.inputs)

    @property
    def num_errors(self) -> int:
        """Lines that preprocess would refuse."""
        return self.lines - self.conversations

    @property
    def num_warnings(self) -> int:
        """Breaches of warning rules; a line may have several."""
        return sum(entry.count for entry in self.rules.values() if entry.level == "warning")

    @property
    def trained_share(self) -> float | None:
        return self.trained_tokens / max(1, self.tokens.sum) if self.tokens else None

    @property
    def assistant_share(self) -> float:
        """Share of the characters that assistants wrote: the trained share's stand-in without a tokenizer."""
        return self.characters_by_role["assistant"] / max(1, self.characters.sum)

    def sorted_rules(self) -> list[RuleCount]:
        """Errors first, the frequent ones before the others."""
        return sorted(self.rules.values(), key=lambda entry: (entry.level != "error", -entry.count, entry.rule))

    def row_losses(self) -> list[RowLoss]:
        """Losses at the usual row lengths, up to the first without any."""
        losses: list[RowLoss] = []
        for seq_length in ROW_LENGTHS if self.tokens else ():
            assert self.tokens is not None
            losses.append(RowLoss(seq_length, *self.tokens.above(seq_length)))
            if not losses[-1].conversations:
                break
        return losses

    def place(self, place: tuple[int, int]) -> str:
        return f"{self.inputs[place[0]].name} line {place[1]}"


def loss_lines(findings: Findings) -> list[str]:
    """What the tokenizer loses of the texts, in words; nothing without one."""
    if findings.text_check is None or findings.tokens is None:
        return []
    loss = findings.text_check.loss()
    return list(describe_loss(loss, findings.tokens.sum, findings.trained_tokens))


def to_json(findings: Findings) -> dict[str, Any]:
    """The findings as one JSON document."""
    loss = findings.row_loss
    text_loss = findings.text_check.loss().model_dump() if findings.text_check else None
    return {
        "lines": findings.lines,
        "conversations": findings.conversations,
        "errors": findings.num_errors,
        "warnings": findings.num_warnings,
        "inputs": [vars(entry) | {"refused": entry.refused} for entry in findings.inputs],
        "rules": [
            {
                "rule": entry.rule,
                "level": entry.level,
                "count": entry.count,
                "meaning": WARNINGS.get(entry.rule),
                "remedy": remedy(entry.rule),
                "examples": [example._asdict() for example in entry.examples],
            }
            for entry in findings.sorted_rules()
        ],
        "repeats": [
            {"count": repeat.times, "places": [findings.place(place) for place in repeat.places]}
            for repeat in findings.repeats
        ],
        "other_keys": dict(findings.other_keys.most_common()),
        "notes": dict(sorted(findings.notes.items())),
        "turns_by_role": dict(findings.turns_by_role),
        "characters_by_role": dict(findings.characters_by_role),
        "characters": findings.characters.summary(),
        "turns": findings.turns.summary(),
        "tokenizer": findings.tokenizer,
        "tokens": findings.tokens and findings.tokens.summary(),
        "trained_percent": findings.trained_percent and findings.trained_percent.summary(),
        "trained_tokens": findings.trained_tokens if findings.tokens else None,
        "trained_share": findings.trained_share,
        "assistant_character_share": findings.assistant_share,
        "text_loss": text_loss,
        "seq_length": findings.seq_length,
        "overlong": loss and {"conversations": loss.conversations, "tokens_lost": loss.tokens},
        "truncation": [
            {"seq_length": row.seq_length, "conversations": row.conversations, "tokens_lost": row.tokens}
            for row in findings.row_losses()
        ],
    }
