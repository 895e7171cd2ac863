"""Rows, labels, positions and segments by hand; the order of rows over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lumina_ds.data.loader import PackedRows
from lumina_ds.data.sampler import TrainingOrder, evaluation_rows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.errors import DataError

X = -100
# Two documents that share a row of 8, and one too long that fills the other row.
DOCUMENTS = [
    ([1, 4, 20, 2], [0, 0, 1, 1]),
    ([1, 30, 2], [0, 1, 0]),
    ([1, 5, 40, 41, 42, 43, 44, 45, 46, 2], [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]),
]


def packed(folder: Path, seq_length: int) -> PackedRows:
    return PackedRows(ShardFolder.open(folder), seq_length)


def test_two_documents_in_a_row(make_folder: Callable[..., Path]) -> None:
    rows = packed(make_folder(DOCUMENTS, 8), 8)
    assert rows.num_rows == 2
    batch = rows.collate([1, 0, -1])
    assert batch.input_ids.tolist() == [[1, 4, 20, 2, 1, 30, 2, 0], [1, 5, 40, 41, 42, 43, 44, 45], [0] * 8]
    # a label is the next token where that is trained; never across documents, never into padding
    assert batch.labels.tolist() == [[X, 20, 2, X, 30, X, X, X], [X, 40, 41, 42, X, X, 45, X], [X] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], list(range(8)), list(range(8))]
    assert batch.document_lengths == (4, 3, 1, 8, 8)
    assert (batch.num_trained_tokens, batch.num_tokens) == (7, 15)
    assert batch.padding_mask.tolist() == [[True] * 7 + [False], [True] * 8, [False] * 8]
    assert batch.row_ids == (1, 0, -1)
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.position_ids)} == {np.dtype("int64")}


def test_every_trained_token_is_a_target_once_when_nothing_is_cut(make_folder: Callable[..., Path]) -> None:
    rows = packed(make_folder(DOCUMENTS, 16, one_per_shard=True), 16)
    batch = rows.collate(range(rows.num_rows))
    assert batch.num_trained_tokens == sum(sum(mask) for _, mask in DOCUMENTS)
    assert batch.num_tokens == sum(len(ids) for ids, _ in DOCUMENTS)
    assert sum(batch.document_lengths) == batch.input_ids.size


def test_no_row_is_a_clear_error(make_folder: Callable[..., Path]) -> None:
    folder = make_folder([([1] * 9, [0] * 8 + [1])], 8)
    with pytest.raises(DataError, match=r"gives no row of 4 tokens.*raise --seq-length"):
        packed(folder, 4)


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "accumulation"), [(1, 12, 1), (2, 3, 2), (4, 1, 3), (3, 2, 2)]
)
def test_a_steps_rows_depend_on_the_global_batch_alone(
    world_size: int, micro_batch_size: int, accumulation: int
) -> None:
    expected = TrainingOrder(30, seed=5)
    for step in range(6):
        order = TrainingOrder(30, seed=5)
        rows = [
            row
            for rank in range(world_size)
            for micro_batch in range(accumulation)
            for row in order.step_rows(step, micro_batch, rank, world_size, micro_batch_size, accumulation)
        ]
        assert sorted(rows) == sorted(expected.row_at(step * 12 + offset) for offset in range(12))


def test_step_rows_by_hand() -> None:
    # G = 2 * 2 * 2 = 8; step 1, micro-batch 1, rank 0 takes positions 8 + (1*2 + 0)*2 + {0, 1} = 12, 13
    order = TrainingOrder(100, seed=0)
    assert order.step_rows(1, 1, 0, 2, 2, 2) == [order.row_at(12), order.row_at(13)]


def test_stream_of_epochs() -> None:
    order = TrainingOrder(7, seed=1, total_rows=17)
    stream = [order.row_at(position) for position in range(20)]
    assert sorted(stream[:7]) == sorted(stream[7:14]) == list(range(7))
    assert stream[:7] != stream[7:14]
    assert stream[17:] == [-1, -1, -1] and -1 not in stream[:17]
    assert order.row_at(3) == stream[3]  # going back gives the same row
    assert order.epoch_at(14) == 2.0


def test_evaluation_rows() -> None:
    assert evaluation_rows(5, 0, 2, 2) == [[0, 1], [4, -1]]
    assert evaluation_rows(5, 1, 2, 2) == [[2, 3], [-1, -1]]
    assert evaluation_rows(4, 0, 1, 4) == [[0, 1, 2, 3]]
