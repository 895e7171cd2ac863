"""A small corpus for the self-test, through the real offline stage, and the same conversations without it.

The rows come from JSONL through tokenizer, chat template, packing, shards and loader, like those of a run. Beside
them stands what they must mean, worked out from the turns by the rule alone: an assistant's words and the marker
after them are trained, and nothing else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from lumina_ds.data.loader import IGNORED_LABEL, MicroBatch, PackedRows
from lumina_ds.data.sampler import FILLER_ROW, TrainingOrder
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.measure.selftest.layouts import ROWS_PER_RANK, Layout

SEQ_LENGTH = 96
VOCAB_SIZE = 320
_NUM_CONVERSATIONS = 120
_SEED = 7
_WORDS = (
    "red", "green", "blue", "small", "large", "cat", "dog", "bird", "house", "river", "runs", "sleeps", "sings",
    "why", "not", "yes", "no", "and", "the", "a", "is", "it",
)  # fmt: skip


def write_corpus(folder: Path) -> None:
    """Conversations, a tokenizer, and shards of both packings below `folder`."""
    from preprocess.pipeline import preprocess_files
    from preprocess.train_tokenizer import train_tokenizer

    source, tokenizer = folder / "conversations.jsonl", folder / "tokenizer.model"
    source.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in _conversations()))
    train_tokenizer((str(source),), VOCAB_SIZE, tokenizer)
    for packing in ("best_fit", "none"):
        settings = Settings(seq_length=SEQ_LENGTH, packing=packing)  # type: ignore[arg-type]
        preprocess_files((str(source),), tokenizer, folder / packing, settings)


class Corpus:
    """Micro-batches of every layout, all of the same conversations in the same step."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        """`num_ranks`: the most that any layout has; it sets the rows of a step."""
        self.rows_per_step = ROWS_PER_RANK * num_ranks
        self._packed, self._unpacked = (
            PackedRows(ShardFolder.open(folder / packing), SEQ_LENGTH) for packing in ("best_fit", "none")
        )
        assert self._packed.describe_losses() is None, "a conversation is longer than a row"
        self._order = TrainingOrder(self._packed.num_rows, _SEED)
        self._row_of_line = {
            origin.line: row for row in range(self._unpacked.num_rows) for origin in self._unpacked.origins(row)
        }
        self._tokenizer = Tokenizer.load(folder / "tokenizer.model")
        lines = (folder / "conversations.jsonl").read_text().splitlines()
        self._turns = [json.loads(line)["messages"] for line in lines]

    def batches(self, layout: Layout, step: int, rank: int) -> list[MicroBatch]:
        """What one rank reads in a step; for plain PyTorch every conversation of the step as a batch of its own."""
        if layout.zero is None:
            return [self._from_turns(line) for line in self._lines(step)]
        parts = layout.accumulation * layout.num_ranks
        if layout.packed:
            size = self.rows_per_step // parts
            place = (rank, layout.num_ranks, size, layout.accumulation)
            return [
                self._packed.collate(self._order.step_rows(step, index, *place)) for index in range(layout.accumulation)
            ]
        rows = [self._row_of_line[line] for line in self._lines(step)]
        size = -(-len(rows) // parts)
        rows += [FILLER_ROW] * (size * parts - len(rows))
        starts = [(index * layout.num_ranks + rank) * size for index in range(layout.accumulation)]
        return [self._unpacked.collate(rows[start : start + size]) for start in starts]

    def _lines(self, step: int) -> list[int]:
        """Lines of the conversations in a step's packed rows, counted from 1."""
        rows = self._order.step_rows(step, 0, 0, 1, self.rows_per_step, 1)
        return [origin.line for row in rows for origin in self._packed.origins(row)]

    def _from_turns(self, line: int) -> MicroBatch:
        """One conversation as a row of its own length, straight from its turns."""
        tokenizer = self._tokenizer
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        trained = [False] * len(ids)
        for turn in self._turns[line - 1]:
            [content] = tokenizer.encode_batch([turn["content"]])
            ids += [tokenizer.role_ids[turn["role"]], *content, tokenizer.end_id]
            trained += [False] + [turn["role"] == "assistant"] * (len(content) + 1)
        labels = [
            token if is_trained else IGNORED_LABEL for token, is_trained in zip(ids[1:], trained[1:], strict=True)
        ]
        return MicroBatch(
            input_ids=np.array([ids], np.int64),
            labels=np.array([[*labels, IGNORED_LABEL]], np.int64),
            position_ids=np.arange(len(ids))[None],
            document_lengths=(len(ids),),
            num_trained_tokens=sum(trained[1:]),
            num_tokens=len(ids),
            row_ids=(line,),
            padding_mask=np.ones((1, len(ids)), bool),
        )


def _conversations() -> list[list[dict[str, str]]]:
    """One or two exchanges, some with a system turn, of different lengths: micro-batches train unlike token counts."""
    chance = random.Random(_SEED)

    def words(longest: int) -> str:
        return " ".join(chance.choices(_WORDS, k=chance.randint(1, longest)))

    conversations = []
    for number in range(_NUM_CONVERSATIONS):
        turns = [{"role": "system", "content": words(3)}] if number % 4 == 0 else []
        for _ in range(1 + number % 2):
            turns.append({"role": "user", "content": words(4)})
            turns.append({"role": "assistant", "content": words(3 if number % 3 else 12)})
        conversations.append(turns)
    return conversations
