"""Shard folders: readable by others, kept whole, and every kind of damage found by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.packing_file import read_packing
from lumina_ds.data.shards.verify import folder_faults, verify_folder
from lumina_ds.data.shards.writer import publish, shard_schema, staging_folder
from lumina_ds.errors import DataError

DOCUMENTS = [([1, 4, 20, 2], [0, 0, 1, 1]), ([1, 30, 2], [0, 1, 0]), ([1, 5, 7, 8, 9], [0, 1, 1, 1, 1])]


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(DOCUMENTS, 8, one_per_shard=True)


@pytest.mark.parametrize("force_streaming", [False, True])
def test_documents_read_back(folder: Path, force_streaming: bool) -> None:
    shards = ShardFolder.open(folder, force_streaming)
    assert shards.num_documents == 3 and shards.lengths.tolist() == [4, 3, 5]
    assert [tuple(column.tolist() for column in shards.document(i)) for i in range(3)] == DOCUMENTS
    assert shards.document(0)[0].dtype == np.uint16
    assert tuple(shards.origin(2)) == ("hand", 3)


def test_other_readers_open_the_shards(folder: Path) -> None:
    with pa.ipc.open_stream((folder / "shard-00001.arrow").read_bytes()) as stream:
        assert stream.schema.names == ["input_ids", "loss_mask", "num_tokens", "source", "line"]
        assert stream.read_all().to_pylist() == [
            {"input_ids": [1, 30, 2], "loss_mask": [0, 1, 0], "num_tokens": 3, "source": "hand", "line": 2}
        ]


def test_wide_vocabularies_take_four_bytes() -> None:
    assert shard_schema(1 << 16).field("input_ids").type == pa.list_(pa.uint16())
    assert shard_schema((1 << 16) + 1).field("input_ids").type == pa.list_(pa.uint32())


def test_mapping_copies_nothing(folder: Path) -> None:
    before = pa.total_allocated_bytes()
    shards = ShardFolder.open(folder, force_streaming=True)
    assert pa.total_allocated_bytes() == before
    assert not shards.document(0)[0].flags.writeable


def test_intact_folder_verifies(folder: Path) -> None:
    ShardFolder.open(folder).packing(8)
    assert folder_faults(folder) == []
    verify_folder(folder)


def test_row_24_truncated_shard_is_refused_by_name(folder: Path) -> None:
    """In the middle, and where the schema or a batch ends, which a reader of the stream takes for its end."""
    shard = folder / "shard-00001.arrow"
    places = [shard.stat().st_size // 2]
    with open(shard, "rb") as stream:
        while pa.ipc.read_message(stream).type != "record batch":
            places.append(stream.tell())
        places.append(stream.tell())
    assert len(places) == 3
    for size in sorted(places, reverse=True):
        os.truncate(shard, size)
        assert_refused(folder)


def assert_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"shard-00001.arrow is damaged: \d+ bytes, not \d+"):
        ShardFolder.open(folder)


def test_row_24_missing_shard_is_refused_by_name(folder: Path) -> None:
    (folder / "shard-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"cannot read .*shard-00002.arrow: No such file"):
        ShardFolder.open(folder)
    assert folder_faults(folder) == ["shard-00002.arrow: is missing"]


def test_added_shard_is_found(folder: Path) -> None:
    (folder / "shard-00003.arrow").write_bytes((folder / "shard-00001.arrow").read_bytes())
    assert folder_faults(folder) == ["shard-00003.arrow: not part of this folder"]


@pytest.mark.parametrize("name", ["shard-00001.arrow", "tokenizer.model"])
def test_row_24_every_flipped_bit_is_found(folder: Path, name: str) -> None:
    intact = (folder / name).read_bytes()
    for position in np.random.default_rng(0).integers(0, len(intact) * 8, 40).tolist():
        damaged = bytearray(intact)
        damaged[position // 8] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        assert folder_faults(folder) == [f"{name}: was altered (its digest differs)"]


def test_every_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    intact = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(intact) * 8, 300).tolist():
        damaged = bytearray(intact)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest.json"):
            folder_faults(folder)


def test_a_flipped_bit_that_opening_survives_never_crashes(folder: Path) -> None:
    path = folder / "shard-00001.arrow"
    intact = path.read_bytes()
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        try:
            tokens, _ = ShardFolder.open(folder, force_streaming=True).document(1)
        except DataError as error:
            assert "shard-00001.arrow" in str(error)
        else:
            assert len(tokens) == 3


def test_unfinished_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none does not exist"):
        ShardFolder.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no manifest.json, so it is no finished shard folder"):
        ShardFolder.open(tmp_path)
    for content, reason in (
        ("[1]", "no manifest"),
        ("{", "invalid JSON"),
        ('{"format":"lumina-shards","version":9}', "version 9"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=reason):
            ShardFolder.open(tmp_path)


def test_edited_manifest_is_refused(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    document["totals"]["tokens"] += 1
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="does not match its digest"):
        ShardFolder.open(folder)


def test_packing_of_another_length_is_computed_kept_and_checked(folder: Path) -> None:
    shards = ShardFolder.open(folder)
    plan = shards.packing(7)
    assert [plan.row(index) for index in range(plan.num_rows)] == [[(2, 0, 5)], [(0, 0, 4), (1, 0, 3)]]
    kept = folder / "packing-7.arrow"
    assert kept.exists() and shards.packing(7).row(1) == plan.row(1)
    assert folder_faults(folder) == []
    # a sound plan of other documents
    os.rename(kept, folder / "packing-12.arrow")
    assert folder_faults(folder) == ["packing-12.arrow: damaged, or made from other shards"]


def test_damaged_packing_is_refused_by_name(folder: Path) -> None:
    ShardFolder.open(folder).packing(8)
    path = folder / "packing-8.arrow"
    intact = path.read_bytes()
    plan = read_packing(path)
    for position in range(0, len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            same = read_packing(path)
        except DataError as error:
            assert "packing-8.arrow is damaged" in str(error)
        else:  # padding between the buffers
            assert all(same.row(index) == plan.row(index) for index in range(plan.num_rows))


def test_packing_in_a_read_only_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lumina_ds.data.shards.folder.write_packing", refuse)
    assert ShardFolder.open(folder).packing(8).num_rows == 2
    assert not (folder / "packing-8.arrow").exists()


def test_staging_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), staging_folder(out) as staging:
        (staging / "half").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with staging_folder(out) as staging:
        (staging / "whole").write_text("x")
        publish(staging, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
