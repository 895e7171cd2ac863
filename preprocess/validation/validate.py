"""`lumina validate`: everything there is to say about JSONL conversations before they are preprocessed.

    inputs -> blocks -> conversations -> rules, distributions, duplicates -> Findings -> console, JSON, report

One pass, in the memory of one block whatever the size of the input. With a tokenizer the conversations are
encoded by the chat template, so lengths and trained shares are those that training will see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.data.chat_template import Template, stop_ids
from lumina_ds.data.conversation import parse_conversation, split_lines
from lumina_ds.data.formats import check_format
from lumina_ds.data.rendering import is_plain, render
from lumina_ds.data.templates.find import certified_template, tokenizer_for
from lumina_ds.data.templates.jinja_template import JinjaTemplate
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import Conversation, TrainReasoning, TrainTurns, Turn
from lumina_ds.errors import DataError
from lumina_ds.report.data.distribution import Distribution
from lumina_ds.report.data.visible import excerpt
from lumina_ds.text import counted
from preprocess.layout import lay_out
from preprocess.other_keys import add_other_keys, describe_other_keys
from preprocess.rendered import render_rows
from preprocess.scan import Conversations, Rejection, read_conversations
from preprocess.sources import BLOCK_BYTES, Block, resolve_inputs
from preprocess.text_check import BlockTextCheck, EncodedTexts, TextCheck, check_texts
from preprocess.validation.duplicates import DuplicateFinder
from preprocess.validation.findings import Example, Findings, InputCount, RowLoss, RuleCount
from preprocess.validation.rules import (
    CHANGED_TEXT,
    DUPLICATE,
    NO_TRAINED_END,
    NOTHING_TRAINED,
    OTHER_KEYS,
    OVERLONG,
    UNKNOWN_IDS,
    conversation_faults,
    describe,
)
from preprocess.validation.tool_rules import tool_faults

NUM_EXAMPLES = 3
_NUM_REPEATS = 5
_EXCERPT_BYTES = 300


Progress = Callable[[int], None]


def validate_files(
    patterns: Sequence[str],
    tokenizer_path: str | Path | None = None,
    seq_length: int | None = None,
    *,
    num_examples: int = NUM_EXAMPLES,
    train_turns: TrainTurns = "all",
    train_reasoning: TrainReasoning = "yes",
    format_name: str | None = None,
    chat_template: str = DEFAULT_TEMPLATE,
    on_progress: Progress | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Findings:
    """Check JSONL files, globs or `-`. `seq_length` needs a tokenizer; `on_progress` gets the bytes read so far.

    Raises DataError: input missing or damaged, no line in it, or a tokenizer that cannot be read.
    """
    assert seq_length is None or tokenizer_path is not None
    check_format(format_name)
    files = resolve_inputs(patterns)
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path is not None else None
    template: Template = TEMPLATES[DEFAULT_TEMPLATE]
    if tokenizer is not None:
        template = certified_template(chat_template, tokenizer).template
        tokenizer = tokenizer_for(tokenizer, template)
    with DuplicateFinder() as duplicates:
        run = _Validation(tokenizer, seq_length, num_examples, duplicates, template)
        run.read_as(train_turns, train_reasoning, format_name)
        for file in files:
            run.begin(file.name)
            for block in file.blocks(block_bytes):
                run.check(block)
                if on_progress:
                    on_progress(sum(each.bytes_read for each in files))
        run.finish()
    if not run.findings.lines:
        raise DataError(f"{', '.join(file.shown for file in files)} holds no line to validate")
    return run.findings


class _Validation:
    """The pass over the inputs: what was found so far."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        seq_length: int | None,
        num_examples: int,
        duplicates: DuplicateFinder,
        template: Template,
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._num_examples = num_examples
        self._duplicates = duplicates
        self.findings = Findings(str(tokenizer.path) if tokenizer else None, seq_length)
        if tokenizer:
            self.findings.tokens, self.findings.trained_percent = Distribution(), Distribution()
            self.findings.text_check = TextCheck()
        if seq_length:
            self.findings.row_loss = RowLoss(seq_length, 0, 0)

    def read_as(self, train_turns: TrainTurns, train_reasoning: TrainReasoning, format_name: str | None) -> None:
        """Read lines as preprocessing with these settings does."""
        self._reading = (train_turns, train_reasoning, format_name)

    def begin(self, name: str) -> None:
        """The blocks that follow are those of the input `name`."""
        self.findings.inputs.append(InputCount(name))

    def check(self, block: Block) -> None:
        """Count the breaches of every line, and measure those that can be used."""
        count = self.findings.inputs[-1]
        rejections: list[Rejection] = []
        conversations = read_conversations(block, rejections, None, *self._reading)
        count.lines += conversations.num_conversations + len(rejections)
        count.conversations += conversations.num_conversations
        self._count_other_keys(block, conversations)
        for rejection in rejections:
            shown = _line_excerpt(block.data, rejection.byte_offset - block.byte_offset)
            self._count(rejection.rule, rejection.line, rejection.reason, shown)
        self.findings.notes.update(conversations.notes)
        usable = list(zip(conversations.lines.tolist(), conversations.whole(), strict=True))
        for line, conversation in usable:
            for breach in chain(conversation_faults(conversation.turns), tool_faults(conversation)):
                self._count(breach.rule, line, breach.reason, breach.excerpt)
            self._duplicates.add(_as_rendered(conversation), len(self.findings.inputs) - 1, line)
        self._measure_text([conversation.turns for _, conversation in usable])
        if self._tokenizer and usable:
            usable, encoded = self._laid_out(block, usable, conversations, self._tokenizer)
            if usable:
                self._measure_tokens(usable, encoded, self._tokenizer)

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

    def _count_other_keys(self, block: Block, conversations: Conversations) -> None:
        if not conversations.num_with_other_keys:
            return
        add_other_keys(self.findings.other_keys, conversations.other_keys)
        entry = self.findings.rules.setdefault(OTHER_KEYS, RuleCount(OTHER_KEYS))
        entry.count += conversations.num_with_other_keys
        usable = set(conversations.lines.tolist())
        for number, (begin, line) in enumerate(split_lines(block.data), block.first_line):
            if len(entry.examples) >= self._num_examples:
                break
            if number in usable and (names := parse_conversation(line, *self._reading).other_keys):
                shown = describe_other_keys(Counter(names))
                entry.examples.append(Example(block.source, number, shown, _line_excerpt(block.data, begin)))

    def _measure_text(self, conversations: Sequence[Sequence[Turn]]) -> None:
        findings = self.findings
        characters = []
        for turns in conversations:
            lengths = [len(turn.content) for turn in turns]
            for turn, length in zip(turns, lengths, strict=True):
                findings.turns_by_role[turn.role] += 1
                findings.characters_by_role[turn.role] += length
            characters.append(sum(lengths))
        findings.turns.add([len(turns) for turns in conversations])
        findings.characters.add(characters)

    def _laid_out(
        self, block: Block, usable: list[tuple[int, Conversation]], conversations: Conversations, tokenizer: Tokenizer
    ) -> tuple[list[tuple[int, Conversation]], EncodedTexts]:
        """The conversations that the template takes, and their rows; the others are counted as refused."""
        dtype = np.dtype(np.uint32)
        if not isinstance(self._template, JinjaTemplate):
            documents = lay_out(conversations, tokenizer, dtype, self._template)
            found = conversations.texts, conversations.first_turns, conversations.lines
            return usable, EncodedTexts(*found, *documents[:3])
        refused: list[Rejection] = []
        rows = render_rows(
            block, conversations, refused, tokenizer, self._template, dtype, self._reading[1]
        )  # fmt: skip
        for rejection, (_, conversation) in zip(refused, (usable[n] for n in rows.left_out), strict=True):
            self._count(rejection.rule, rejection.line, rejection.reason, describe(conversation.turns))
        self.findings.inputs[-1].conversations -= len(refused)
        lines = conversations.lines[rows.kept]
        return [usable[number] for number in rows.kept], EncodedTexts(
            rows.texts, rows.first_turns, lines, *rows.documents[:3]
        )

    def _measure_tokens(
        self, usable: list[tuple[int, Conversation]], encoded: EncodedTexts, tokenizer: Tokenizer
    ) -> None:
        findings = self.findings
        assert findings.tokens is not None and findings.trained_percent is not None
        ids, mask, lengths = encoded.ids, encoded.mask, encoded.lengths
        turns_of = {line: one.turns for line, one in usable}
        self._count_losses(check_texts(findings.inputs[-1].name, encoded, tokenizer), turns_of)
        end_ids = np.array(sorted(stop_ids(tokenizer, self._template)))
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        trained = np.add.reduceat(mask, starts, dtype=np.int64)
        findings.tokens.add(lengths)
        findings.trained_percent.add(trained * 100 // lengths)
        findings.trained_tokens += int(trained.sum())
        findings.inputs[-1].tokens += len(ids)
        # Nearly every conversation fits and ends with a trained end of turn; only the others are looked at closely.
        ends_well = (mask[ends - 1] == 1) & np.isin(ids[ends - 1], end_ids)
        excess = np.maximum(0, lengths - (self._seq_length or np.iinfo(np.int32).max))
        for number in np.flatnonzero(~ends_well | (excess > 0)).tolist():
            line, conversation = usable[number]
            begin, end = starts[number], ends[number]
            for rule, reason in _row_faults(ids[begin:end], mask[begin:end], end_ids, self._seq_length):
                self._count(rule, line, reason, describe(conversation.turns))
        if findings.row_loss:
            findings.row_loss.conversations += int((excess > 0).sum())
            findings.row_loss.tokens += int(excess.sum())

    def _count_losses(self, found: BlockTextCheck, turns: Mapping[int, Sequence[Turn]]) -> None:
        assert self.findings.text_check is not None
        self.findings.text_check.add(found)
        for entry in found.unknown:
            reason = f"{counted(entry.num_ids, 'unknown id')}, {entry.num_trained} of them trained: {entry.example}"
            self._count(UNKNOWN_IDS, entry.line, reason, describe(turns[entry.line]))
        for line, changed in sorted({entry.line: entry for entry in reversed(found.changed)}.items()):
            self._count(CHANGED_TEXT, line, changed.reason, describe(turns[line]))

    def _count(self, rule: str, line: int, reason: str, shown: str) -> None:
        entry = self.findings.rules.setdefault(rule, RuleCount(rule))
        entry.count += 1
        if len(entry.examples) < self._num_examples:
            entry.examples.append(Example(self.findings.inputs[-1].name, line, reason, shown))


def _as_rendered(conversation: Conversation) -> Sequence[Turn]:
    """Turns with all that belongs to them in their text, so that others are no duplicates."""
    if is_plain(conversation):
        return conversation.turns
    return [Turn(piece.role, piece.text) for piece in render(conversation)]  # type: ignore[arg-type]


def _row_faults(
    ids: np.ndarray, mask: np.ndarray, end_ids: np.ndarray, seq_length: int | None
) -> Iterator[tuple[str, str]]:
    """(rule, reason) for what a row of `seq_length` tokens (None: of any length) does to one conversation."""
    kept = len(ids) if seq_length is None else min(seq_length, len(ids))
    if kept < len(ids):
        yield OVERLONG, f"{counted(len(ids), 'token')}, {len(ids) - kept:,} beyond {seq_length:,}"
    if not mask[:kept].any():
        yield NOTHING_TRAINED, f"the first trained token is number {int(mask.argmax()) + 1:,}"
    elif not (mask[:kept] & np.isin(ids[:kept], end_ids)).any():
        yield NO_TRAINED_END, f"no assistant turn ends within the first {counted(kept, 'token')}"


def _line_excerpt(data: bytes, begin: int) -> str:
    """The first words of the line at `begin`; nothing of a line that was too long to be held."""
    line, _, _ = data[begin : begin + _EXCERPT_BYTES].partition(b"\n")
    return excerpt(line.decode("utf-8", "backslashreplace"))
