"""`lumina validate`: everything there is to say about JSONL conversations before they are preprocessed.

    inputs -> blocks -> parse_conversation -> rules, distributions, duplicates -> Findings -> console, JSON, report

One pass, in the memory of one block whatever the size of the input. With a tokenizer the conversations are
encoded by the chat template, so lengths and trained shares are those that training will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import (
    LINE_TOO_LONG,
    MAX_LINE_BYTES,
    Conversation,
    RejectedLine,
    is_blank,
    parse_conversation,
    split_lines,
)
from lumina_ds.data.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.report.distribution import Distribution
from preprocess.report.visible import excerpt
from preprocess.sources import BLOCK_BYTES, Block, resolve_inputs
from preprocess.validate_duplicates import DuplicateFinder
from preprocess.validate_findings import Example, Findings, InputCount, RowLoss, RuleCount
from preprocess.validate_rules import (
    DUPLICATE,
    NO_TRAINED_END,
    NOTHING_TRAINED,
    OVERLONG,
    conversation_faults,
    describe,
)

NUM_EXAMPLES = 3
_NUM_REPEATS = 5
# Conversations tokenized in one call.
_BATCH = 256
_EXCERPT_BYTES = 300


Progress = Callable[[int], None]


def validate_files(
    patterns: Sequence[str],
    tokenizer_path: str | Path | None = None,
    seq_length: int | None = None,
    *,
    num_examples: int = NUM_EXAMPLES,
    on_progress: Progress | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Findings:
    """Check JSONL files, globs or `-`. `seq_length` needs a tokenizer; `on_progress` gets the bytes read so far.

    Raises DataError: input missing or damaged, no line in it, or a tokenizer that cannot be read.
    """
    assert seq_length is None or tokenizer_path is not None
    files = resolve_inputs(patterns)
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path is not None else None
    with DuplicateFinder() as duplicates:
        run = _Validation(tokenizer, seq_length, num_examples, duplicates)
        for file in files:
            run.begin(file.name)
            for block in file.blocks(block_bytes):
                run.check(block)
                if on_progress:
                    on_progress(sum(each.bytes_read for each in files))
        run.finish()
    if not run.findings.lines:
        raise DataError(f"{', '.join(str(file.path or 'standard input') for file in files)} holds no line to validate")
    return run.findings


class _Validation:
    """The pass over the inputs: what was found so far."""

    def __init__(
        self, tokenizer: Tokenizer | None, seq_length: int | None, num_examples: int, duplicates: DuplicateFinder
    ) -> None:
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._num_examples = num_examples
        self._duplicates = duplicates
        self.findings = Findings(str(tokenizer.path) if tokenizer else None, seq_length)
        if tokenizer:
            self.findings.tokens, self.findings.trained_percent = Distribution(), Distribution()
        if seq_length:
            self.findings.row_loss = RowLoss(seq_length, 0, 0)

    def begin(self, name: str) -> None:
        """The blocks that follow are those of the input `name`."""
        self.findings.inputs.append(InputCount(name))

    def check(self, block: Block) -> None:
        accepted = self._conversations(block)
        while batch := list(islice(accepted, _BATCH)):
            self._measure_text([conversation for _, conversation in batch])
            if self._tokenizer:
                self._measure_tokens(batch, self._tokenizer)

    def finish(self) -> None:
        """Look for duplicates, which takes all conversations."""
        num_duplicates, self.findings.repeats = self._duplicates.repeats(max(_NUM_REPEATS, self._num_examples))
        if num_duplicates:
            self.findings.rules[DUPLICATE] = RuleCount(DUPLICATE, num_duplicates)
        for repeat in self.findings.repeats[: self._num_examples]:
            first, second = repeat.places[:2]
            example = Example(
                self.findings.inputs[second[0]].name,
                second[1],
                f"same as {self.findings.place(first)}; stands {repeat.times} times",
                repeat.excerpt,
            )
            self.findings.rules[DUPLICATE].examples.append(example)

    def _conversations(self, block: Block) -> Iterator[tuple[int, Conversation]]:
        """(line, conversation) of every line that can be used; breaches of all of them are counted on the way."""
        count = self.findings.inputs[-1]
        if block.is_oversized:
            count.lines += 1
            self._count(LINE_TOO_LONG, block.first_line, f"longer than {MAX_LINE_BYTES} bytes", "")
        for line, (_, text) in enumerate(split_lines(block.data), block.first_line):
            if is_blank(text):
                continue
            count.lines += 1
            try:
                conversation = parse_conversation(text)
            except RejectedLine as fault:
                self._count(fault.rule, line, fault.reason, _line_excerpt(text))
                continue
            count.conversations += 1
            for fault_found in conversation_faults(conversation.turns):
                self._count(fault_found.rule, line, fault_found.reason, fault_found.excerpt)
            beginning = describe(conversation.turns)
            self._duplicates.add(conversation.turns, len(self.findings.inputs) - 1, line, beginning)
            yield line, conversation

    def _measure_text(self, conversations: list[Conversation]) -> None:
        findings = self.findings
        for conversation in conversations:
            for turn in conversation.turns:
                findings.turns_by_role[turn.role] += 1
                findings.characters_by_role[turn.role] += len(turn.content)
        findings.turns.add([len(conversation.turns) for conversation in conversations])
        findings.characters.add([sum(len(turn.content) for turn in c.turns) for c in conversations])

    def _measure_tokens(self, batch: list[tuple[int, Conversation]], tokenizer: Tokenizer) -> None:
        findings = self.findings
        assert findings.tokens is not None and findings.trained_percent is not None
        encoded = encode_conversations([conversation for _, conversation in batch], tokenizer)
        lengths = np.array([len(ids) for ids, _ in encoded], np.int64)
        trained = np.array([sum(mask) for _, mask in encoded], np.int64)
        findings.tokens.add(lengths)
        findings.trained_percent.add(trained * 100 // lengths)
        findings.trained_tokens += int(trained.sum())
        findings.inputs[-1].tokens += int(lengths.sum())
        for (line, conversation), (ids, mask) in zip(batch, encoded, strict=True):
            for rule, reason in _row_faults(ids, mask, tokenizer.end_id, self._seq_length):
                self._count(rule, line, reason, describe(conversation.turns))
        if findings.row_loss:
            excess = np.maximum(0, lengths - findings.row_loss.seq_length)
            findings.row_loss.conversations += int((excess > 0).sum())
            findings.row_loss.tokens += int(excess.sum())

    def _count(self, rule: str, line: int, reason: str, shown: str) -> None:
        entry = self.findings.rules.setdefault(rule, RuleCount(rule))
        entry.count += 1
        if len(entry.examples) < self._num_examples:
            entry.examples.append(Example(self.findings.inputs[-1].name, line, reason, shown))


def _row_faults(
    ids: Sequence[int], mask: Sequence[int], end_id: int, seq_length: int | None
) -> Iterator[tuple[str, str]]:
    """(rule, reason) for what a row of `seq_length` tokens (None: of any length) does to one conversation."""
    kept = len(ids) if seq_length is None else min(seq_length, len(ids))
    if kept < len(ids):
        yield OVERLONG, f"{len(ids):,} tokens, {len(ids) - kept:,} beyond {seq_length}"
    if mask[kept - 1] and ids[kept - 1] == end_id:
        return  # the usual case: it ends as it should
    if not any(mask[:kept]):
        yield NOTHING_TRAINED, f"the first trained token is number {list(mask).index(1) + 1:,}"
    elif not any(trained and token == end_id for token, trained in zip(ids[:kept], mask[:kept], strict=True)):
        yield NO_TRAINED_END, f"no assistant turn ends within the first {kept:,} tokens"


def _line_excerpt(line: bytes) -> str:
    return excerpt(line[:_EXCERPT_BYTES].decode("utf-8", "backslashreplace"))
