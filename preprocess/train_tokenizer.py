"""Train a SentencePiece model on conversations, with the chat template's markers as control symbols.

Exact by construction: identity normalization, no dummy prefix, no removed spaces, and byte fallback, so any
text decodes to itself. Deterministic: the sample is chosen by a hash of each line, and SentencePiece runs
with a fixed number of threads.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from lumina_ds.data.conversation import is_blank, parse_conversation, split_lines
from lumina_ds.data.formats import check_format
from lumina_ds.data.rendering import render
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.tokenizer.sentencepiece_file import SPACE_SYMBOL
from lumina_ds.data.tokenizer.tokenizer import END_MARKER, ROLE_MARKERS, Tokenizer
from lumina_ds.errors import ConfigError, DataError, MachineError
from lumina_ds.files import shown_path, write_atomically
from lumina_ds.text import counted
from preprocess.quarantine import common_fault
from preprocess.sources import InputFile, resolve_inputs

log = logging.getLogger("lumina_ds.preprocess")

ModelType = Literal["bpe", "unigram"]

SAMPLE_BYTES = 100 << 20
MIN_VOCAB_SIZE = 300
CHARACTER_COVERAGE = 0.9995
# Part of a cached tokenizer's key: another recipe gives another model.
RECIPE = "lumina-sentencepiece-2"

_NUM_THREADS = 4
_NUM_FIXED_IDS = 256 + 3 + len(ROLE_MARKERS)  # bytes, <unk>, <s>, end of turn, roles
_MAX_SENTENCE_CHARACTERS = 4000
# Line ends and tabs are spelled in bytes, and SentencePiece skips whole sentences that hold a tab or NUL.
_SENTENCE_ENDS = re.compile("[\n\r\t\0]+")


def train_tokenizer(
    files: Sequence[str],
    vocab_size: int,
    out: str | Path,
    model_type: ModelType = "bpe",
    max_conversations: int | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    format_name: str | None = None,
) -> Tokenizer:
    """Train on about `sample_bytes` of the turns' text and write the model to `out`, atomically.

    The model has `vocab_size` ids, or fewer where the text is too small for so many. Raises ConfigError for a
    vocabulary that cannot hold bytes, markers and characters, or an `out` that is a folder, DataError for input without conversations,
    MachineError where `out` cannot be written.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"a vocabulary of {vocab_size} ids is too small: bytes and markers take {_NUM_FIXED_IDS}; "
            f"use {MIN_VOCAB_SIZE} or more"
        )
    if Path(out).is_dir():
        raise ConfigError(f"{out} is a folder; name a file in it with --out")
    check_format(format_name)
    sample = _Sample(resolve_inputs(files), max_conversations, sample_bytes, format_name)
    sentences = list(sample.sentences())
    if not sample.num_conversations:
        raise DataError(common_fault(set(sample.refused_by_rule), ", ".join(map(shown_path, files))))
    sample.report_refused()
    model = _train(sentences, vocab_size, model_type)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out), model)
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    tokenizer = Tokenizer.load(out)
    if tokenizer.vocab_size < vocab_size:
        log.info("the text gives %d ids, fewer than the %d asked for", tokenizer.vocab_size, vocab_size)
    return tokenizer


class _Sample:
    """A sample spread evenly over the files; from standard input, their beginning. Refused lines of it are counted."""

    def __init__(
        self, files: list[InputFile], max_conversations: int | None, sample_bytes: int, format_name: str | None
    ) -> None:
        self._files = files
        self._format_name = format_name
        self._max_conversations = max_conversations
        self._sample_bytes = sample_bytes
        self.num_conversations = 0
        self.refused_by_rule: Counter[str] = Counter()
        self._first_refused = ""

    def sentences(self) -> Iterator[str]:
        """The text of all turns, in pieces."""
        sizes = [file.size_bytes for file in self._files]
        total = sum(size or 0 for size in sizes)
        share = 1.0 if None in sizes else min(1.0, self._sample_bytes / max(1, total))
        num_bytes = 0
        for place, line in self._lines():
            if share < 1 and _uniform(line) >= share:
                continue
            try:
                conversation = parse_conversation(line, format_name=self._format_name)
            except RejectedLine as refused:
                self._refuse(place, refused.rule, refused.reason)
                continue
            for piece in render(conversation):
                num_bytes += len(piece.text)
                yield from _sentences(piece.text)
            self.num_conversations += 1
            if self.num_conversations == self._max_conversations or num_bytes >= self._sample_bytes:
                return

    def report_refused(self) -> None:
        """Warn of refused lines, which train nothing here either."""
        if not self.refused_by_rule:
            return
        num_refused = self.refused_by_rule.total()
        rules = ", ".join(f"{count:,} {rule}" for rule, count in sorted(self.refused_by_rule.items()))
        log.warning(
            "%s of %s refused (first: %s; by rule: %s)",
            f"{num_refused:,}", counted(num_refused + self.num_conversations, "line"), self._first_refused, rules,
        )  # fmt: skip

    def _refuse(self, place: str, rule: str, reason: str) -> None:
        self.refused_by_rule[rule] += 1
        self._first_refused = self._first_refused or f"{place}: {reason}"

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """(where, line) of every line that is not blank; lines that are not held count as refused."""
        for file in self._files:
            for block in file.blocks():
                if block.fault:
                    self._refuse(f"{block.source} line {block.first_line}", *block.fault)
                for number, (_, line) in enumerate(split_lines(block.data), block.first_line):
                    if not is_blank(line):
                        yield f"{block.source} line {number}", line


def _uniform(line: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big") / 2**64


def _sentences(content: str) -> Iterator[str]:
    for line in _SENTENCE_ENDS.split(content):
        for begin in range(0, len(line), _MAX_SENTENCE_CHARACTERS):
            yield line[begin : begin + _MAX_SENTENCE_CHARACTERS]


def _train(sentences: list[str], vocab_size: int, model_type: ModelType) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_with_space(_without_rare_characters(sentences, vocab_size))),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _MAX_SENTENCE_CHARACTERS + 16,
            unk_id=0,
            bos_id=1,
            # The end of a turn is the model's end of sequence, which other software finds by its usual name.
            eos_id=2,
            eos_piece=END_MARKER,
            pad_id=-1,
            control_symbols=list(ROLE_MARKERS.values()),
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip()
        raise DataError(f"SentencePiece cannot train {vocab_size} ids on this text: {reason}") from error
    return model.getvalue()


def _with_space(sentences: list[str]) -> list[str]:
    """Sentences that hold a space: without a piece of its own it would be spelled in bytes that decode to U+2581.

    Newlines and tabs need none: their bytes decode to themselves.
    """
    is_there = any(" " in sentence or SPACE_SYMBOL in sentence for sentence in sentences)
    return sentences if is_there else [*sentences, " "]


def _without_rare_characters(sentences: list[str], vocab_size: int) -> list[str]:
    """Cut the sentences at characters that get no id of their own and are spelled in bytes.

    Those are the rarest ones beyond CHARACTER_COVERAGE of the text, and all beyond half of the room above the
    fixed ids: a small vocabulary on a large alphabet would otherwise hold single characters only, or not
    even fit them, which SentencePiece refuses.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    kept: list[str] = []
    left = CHARACTER_COVERAGE * counts.total()
    for character, count in counts.most_common((vocab_size - _NUM_FIXED_IDS) // 2):
        if left <= 0:
            break
        kept.append(character)
        left -= count
    if len(kept) == len(counts):
        return sentences
    rare = re.compile(f"[^{re.escape(''.join(kept))}]+")
    return [part for sentence in sentences for part in rare.split(sentence) if part]
