"""How a folder is read: by size, lazily where it is large, and the same rows in every mode."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lumina_ds.data.loader import IGNORED_LABEL, MicroBatch, PackedRows
from lumina_ds.data.shards import folder as shards
from lumina_ds.data.shards import shard
from lumina_ds.data.shards.folder import ShardFolder, reading_mode
from lumina_ds.data.shards.packing_file import read_packing
from lumina_ds.errors import DataError

MB = 1 << 20
ARRAYS = ("input_ids", "labels", "position_ids", "padding_mask")


def documents(count: int) -> list[tuple[list[int], list[int]]]:
    generator = np.random.default_rng(4)
    return [
        (generator.integers(3, 400, length).tolist(), [0, *generator.integers(0, 2, length - 2).tolist(), 1])
        for length in generator.integers(2, 30, count).tolist()
    ]


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(documents(40), 32, one_per_shard=True)


def slow_collate(rows: PackedRows, row_ids: list[int]) -> dict[str, list[list[int]]]:
    """What collate makes, token by token."""
    batch: dict[str, list[list[int]]] = {name: [] for name in ARRAYS}
    for row_id in row_ids:
        places = []
        for document, start, length in [] if row_id == -1 else rows.folder.packing(rows.seq_length).row(row_id):
            ids, mask = (column.tolist() for column in rows.folder.document(document))
            for offset in range(length):
                position = start + offset
                follows = offset + 1 < length and mask[position + 1]
                places.append((ids[position], ids[position + 1] if follows else IGNORED_LABEL, offset, True))
        places += [(0, IGNORED_LABEL, offset, False) for offset in range(rows.seq_length - len(places))]
        for name, column in zip(ARRAYS, zip(*places, strict=True), strict=True):
            batch[name].append(list(column))
    return batch


@pytest.mark.parametrize("seq_length", [12, 32, 100])
@pytest.mark.parametrize("mode", ["memory", "sharded", "streaming"])
def test_rows_equal_the_slow_reference_in_every_mode(
    folder: Path, seq_length: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MEMORY_LIMIT_BYTES", {"memory": MB, "sharded": 0, "streaming": 0}[mode])
    monkeypatch.setattr(shards, "SHARDED_LIMIT_BYTES", {"memory": MB, "sharded": MB, "streaming": 0}[mode])
    rows = PackedRows(ShardFolder.open(folder), seq_length)
    assert rows.folder.mode == mode
    row_ids = [*range(rows.num_rows), -1, 0]
    batch: MicroBatch = rows.collate(row_ids)
    assert {name: getattr(batch, name).tolist() for name in ARRAYS} == slow_collate(rows, row_ids)
    assert batch.num_tokens == batch.padding_mask.sum()
    assert batch.num_trained_tokens == (batch.labels != IGNORED_LABEL).sum()
    starts = np.concatenate([[0], np.cumsum(batch.document_lengths)[:-1]])
    assert np.flatnonzero(batch.position_ids.ravel() == 0).tolist() == starts.tolist()
    assert sum(batch.document_lengths) == batch.input_ids.size


@pytest.mark.parametrize(("together", "long"), [(1, 10_000), (8, 10_000), (10_000, 10_000), (8, 1)])
@pytest.mark.parametrize("force_streaming", [False, True])
def test_segments_copied_together_and_one_by_one_are_the_same(
    make_folder: Callable[..., Path], together: int, long: int, force_streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of many documents, each in a record batch of its own, and pieces of documents longer than a row."""
    monkeypatch.setattr(shard, "_MIN_TOGETHER", together)
    monkeypatch.setattr(shards, "LONG_SEGMENT", long)
    folder = make_folder(documents(300), 200)
    for seq_length in (9, 200):
        rows = PackedRows(ShardFolder.open(folder, force_streaming), seq_length)
        row_ids = [-1, *range(0, rows.num_rows, 3), -1, 1]
        batch = rows.collate(row_ids)
        assert {name: getattr(batch, name).tolist() for name in ARRAYS} == slow_collate(rows, row_ids)
        assert sum(batch.document_lengths) == batch.input_ids.size and min(batch.document_lengths) > 0
    assert rows.collate([-1]).document_lengths == (200,)


@pytest.mark.parametrize("one_per_shard", [False, True])
def test_labels_of_segments_are_those_of_their_masks(make_folder: Callable[..., Path], one_per_shard: bool) -> None:
    """Segments in any order, overlapping, of one token, and up to the last of a record batch."""
    folder = ShardFolder.open(make_folder(documents(60), 32, one_per_shard=one_per_shard))
    draw = np.random.default_rng(5)
    chosen = draw.integers(0, 60, 500)
    starts = (draw.random(500) * folder.lengths[chosen]).astype(np.int64)
    sizes = 1 + (draw.random(500) * (folder.lengths[chosen] - starts)).astype(np.int64)
    expected = [
        any(folder.document(document)[1][start + 1 : start + size].tolist())
        for document, start, size in zip(chosen.tolist(), starts.tolist(), sizes.tolist(), strict=True)
    ]
    assert folder.has_labels(chosen, starts, sizes).tolist() == expected
    assert {False, True} == set(expected)


def test_the_mode_goes_by_size_and_streaming_can_be_forced() -> None:
    assert [reading_mode(size) for size in (0, 500 * MB, 500 * MB + 1, 10240 * MB, 10240 * MB + 1)] == [
        "memory",
        "memory",
        "sharded",
        "sharded",
        "streaming",
    ]
    assert reading_mode(1, force_streaming=True) == "streaming"


def test_streaming_maps_a_shard_when_it_is_needed(folder: Path) -> None:
    (folder / "shard-00007.arrow").write_bytes(bytes((folder / "shard-00007.arrow").stat().st_size))
    with pytest.raises(DataError, match=r"shard-00007.arrow is damaged"):
        ShardFolder.open(folder)  # small folders are read whole
    streamed = ShardFolder.open(folder, force_streaming=True)
    assert [streamed.document(index)[0].tolist() for index in (0, 39)] == [documents(40)[0][0], documents(40)[39][0]]
    with pytest.raises(DataError, match=r"shard-00007.arrow is damaged"):
        streamed.document(7)


def test_streaming_finds_missing_and_cut_shards_at_the_start(folder: Path) -> None:
    streamed = ShardFolder.open(folder, force_streaming=True)
    os.truncate(folder / "shard-00005.arrow", 100)
    with pytest.raises(DataError, match=r"shard-00005.arrow is damaged: 100 bytes, not \d+; restore it"):
        ShardFolder.open(folder, force_streaming=True)
    with pytest.raises(DataError, match=r"shard-00005.arrow is damaged: 100 bytes"):  # cut after the start
        streamed.document(5)
    (folder / "shard-00005.arrow").unlink()
    with pytest.raises(DataError, match=r"cannot read .*shard-00005.arrow: No such file"):
        ShardFolder.open(folder, force_streaming=True)


def test_streaming_names_a_shard_that_was_replaced_and_takes_a_copy_of_it(folder: Path) -> None:
    streamed = ShardFolder.open(folder, force_streaming=True)
    digest, manifest = streamed.digest, folder / "manifest.json"
    assert digest == hashlib.sha256(manifest.read_bytes()).hexdigest()
    manifest.write_text("another")
    assert streamed.digest == digest
    shard = sorted(folder.glob("shard-*.arrow"))[0]
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content)
    os.utime(shard, (1, 1))
    assert streamed.document(0)[0].tolist() == documents(40)[0][0]
    late = ShardFolder(folder, streamed.manifest, "streaming", digest)
    late._shards[0].check_size()
    content[-100] ^= 1
    shard.write_bytes(content)
    os.utime(shard, (2, 2))
    with pytest.raises(DataError, match=f"{shard.name} was replaced by another file since the folder was opened"):
        late.document(0)


def test_a_packing_plan_is_mapped(folder: Path) -> None:
    rows = PackedRows(ShardFolder.open(folder, force_streaming=True), 32)
    plan = read_packing(folder / "packing-32.arrow")
    for column in (plan.row_offsets, plan.documents, plan.starts, plan.lengths):
        assert not column.flags.owndata and not column.flags.writeable
    assert plan.num_rows == rows.num_rows
