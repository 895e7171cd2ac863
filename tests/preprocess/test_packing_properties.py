"""Packing against a slow reference, and what holds for any corpus."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data import packing
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.packing import Overlong, Packing, Segment, pack
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.shards.verify import folder_faults
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess.pipeline import preprocess_files

DOCUMENTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)).map(lambda pair: (pair[0], min(pair[1], pair[0] - 1))), max_size=60)  # fmt: skip


def columns(documents: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([d[0] for d in documents], np.int64), np.array([d[1] for d in documents], np.int64)


def fullest_row_with_room(rows: list[list[Segment]], length: int, seq_length: int) -> list[Segment] | None:
    def room(row: list[Segment]) -> int:
        return seq_length - sum(segment.length for segment in row)

    fitting = [row for row in rows if room(row) >= length]
    return min(fitting, key=room) if fitting else None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(DOCUMENTS, st.integers(2, 50))
def test_best_fit_decreasing_opens_as_many_rows_as_the_slow_reference(
    documents: list[tuple[int, int]], seq_length: int
) -> None:
    lengths, first_trained = columns(documents)
    rows: list[list[Segment]] = []
    for document in sorted(range(len(documents)), key=lambda d: (-lengths[d], d)):
        length = int(lengths[document])
        if length > seq_length:
            continue
        row = fullest_row_with_room(rows, length, seq_length)
        if row is None:
            rows.append(row := [])
        row.append(Segment(document, 0, length))
    plan = pack(lengths, first_trained, seq_length, "best_fit", "drop")
    made = [plan.row(index) for index in range(plan.num_rows)]
    # rows of equal room may be taken in any order, so fillings are compared, not members
    assert sorted(sorted(s.length for s in row) for row in made) == sorted(
        sorted(s.length for s in row) for row in rows
    )


@pytest.mark.parametrize("mode", ["best_fit", "concat", "none"])
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(documents=DOCUMENTS, seq_length=st.integers(2, 50), block=st.sampled_from([1, 7, 65_536]))
def test_every_token_is_where_it_must_be(
    documents: list[tuple[int, int]], seq_length: int, block: int, mode: Packing, overlong: Overlong
) -> None:
    lengths, first_trained = columns(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "DOCUMENTS_PER_BLOCK", block)
        plan = pack(lengths, first_trained, seq_length, mode, overlong)
    held: dict[int, list[Segment]] = {}
    for index in range(plan.num_rows):
        row = plan.row(index)
        assert row and sum(segment.length for segment in row) <= seq_length
        assert row == sorted(row)
        for segment in row:
            held.setdefault(segment.document, []).append(segment)
    for document, (length, first) in enumerate(documents):
        segments = sorted(held.get(document, []))
        if mode == "concat" or length <= seq_length or overlong == "split":
            # all of it, each piece from the last token of the one before, so that every token but the first is a target
            assert segments[0].start == 0 and segments[-1].start + segments[-1].length == length
            for one, other in pairwise(segments):
                assert other.start == one.start + one.length - 1
        elif overlong == "truncate" and first < seq_length:
            assert segments == [Segment(document, 0, seq_length)]
        else:
            assert segments == []


@pytest.mark.parametrize("options", [{"overlong": "split"}, {"packing": "concat"}, {"overlong": "truncate"}])
def test_every_row_has_a_label_token(options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Long questions and short answers: most pieces of 16 tokens hold nothing to train."""
    path = tmp_path / "questions.jsonl"
    ask = [{"role": "user", "content": "the small brown fox " * 60}, {"role": "assistant", "content": "a dog"}]
    turns = [ask, ask[1:], [*ask[1:], *ask]]
    path.write_text("\n".join(json.dumps({"messages": one}) for one in turns * 5))
    preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=16, **options))
    folder = ShardFolder.open(tmp_path / "out")
    packed = PackedRows(folder, 16)
    assert packed.num_rows and all(packed.collate([row]).num_trained_tokens for row in range(packed.num_rows))
    # all label tokens are there, but for those that truncation takes
    trained = packed.collate(list(range(packed.num_rows))).num_trained_tokens
    assert trained == folder.manifest.totals.trained_tokens or options == {"overlong": "truncate"}
    # a plan that is made later, from the shards, leaves the same out
    expected = folder.packing(16)
    later = folder.compute_packing(16)
    assert later.num_without_labels == expected.num_without_labels
    assert (expected.num_without_labels > 0) == (options != {"overlong": "truncate"})
    assert later.starts.tolist() == expected.starts.tolist() and folder_faults(tmp_path / "out") == []
