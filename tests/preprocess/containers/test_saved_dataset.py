"""Folders of datasets.save_to_disk: the order of state.json, rows counted through all files, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from written import in_arrow, save_to_disk

from lumina_ds.data.shards.manifest import Settings, read_manifest
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from preprocess.pipeline import preprocess_files
from preprocess.sources import resolve_inputs


def chat(number: int) -> dict[str, Any]:
    return {"id": number, "prompt": f"question {number}", "completion": "yes"}


def ids(path: Path) -> list[int]:
    (file,) = resolve_inputs([str(path)])
    return [json.loads(line)["id"] for block in file.blocks(200) for line in block.data.splitlines()]


def change_state(folder: Path, **entries: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | entries))


def test_a_dataset_is_one_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    save_to_disk([chat(number) for number in range(30)], folder, num_files=3)
    assert ids(folder) == list(range(30))
    preprocess_files([str(folder)], tokenizer.path, tmp_path / "out", Settings(seq_length=64))
    (entry,) = read_manifest(tmp_path / "out").inputs
    files = sorted(folder.glob("*.arrow"))
    assert (entry.name, entry.size_bytes) == ("chats", sum(file.stat().st_size for file in files))
    assert entry.sha256 == file_digest(*files)
    # The same command finds its result.
    preprocess_files([str(folder)], tokenizer.path, tmp_path / "out", Settings(seq_length=64))
    with pytest.raises(DataError, match="holds other shards"):
        change_state(folder, _data_files=[{"filename": files[0].name}])
        preprocess_files([str(folder)], tokenizer.path, tmp_path / "out", Settings(seq_length=64))


def test_the_order_is_that_of_the_state(tmp_path: Path) -> None:
    """Not that of the names: a dataset of ten files and more would be shuffled."""
    save_to_disk([chat(number) for number in range(10)], tmp_path / "d")
    names = [path.name for path in sorted((tmp_path / "d").glob("*.arrow"))]
    change_state(tmp_path / "d", _data_files=[{"filename": name} for name in reversed(names)])
    (tmp_path / "d/data-00009-of-00009.arrow").write_bytes(in_arrow([chat(99)]))  # left over from an earlier save
    assert ids(tmp_path / "d") == [*range(5, 10), *range(5)]


def test_an_empty_dataset(tmp_path: Path) -> None:
    save_to_disk([chat(1)], tmp_path / "d", num_files=1)
    change_state(tmp_path / "d", _data_files=[])
    assert ids(tmp_path / "d") == []


def test_splits(tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for number, split in enumerate(("train", "test")):
        save_to_disk([chat(number)], both / split, num_files=1)
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=f"both holds the splits train, test; name one of them: {both}/train"):
        resolve_inputs([str(both)])
    assert ids(both / "test") == [1]
    (both / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert ids(both) == [0]


FAULTS: dict[str, tuple[str, str]] = {
    '{"_data_files": [{"filename": "../x.arrow"}]}': ("lacks the file '../x.arrow'", "outside"),
    '{"_data_files": [{"filename": "none.arrow"}]}': ("lacks the file 'none.arrow', which its state.json", "missing"),
    '{"_data_files": [{}]}': ("lacks the file None", "no name"),
    '{"_data_files": ["a"]}': ("lists no data files", "no object"),
    "{}": ("lists no data files", "no list"),
    "[]": ("is not an object", "list"),
    "{": ("is not JSON", "broken"),
    '{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}': ("flatten_indices", "selection"),
}


@pytest.mark.parametrize("state", FAULTS, ids=[name for _, name in FAULTS.values()])
def test_a_folder_that_is_not_whole(state: str, tmp_path: Path) -> None:
    save_to_disk([chat(1)], tmp_path / "d")
    (tmp_path / "x.arrow").write_bytes(in_arrow([chat(1)]))
    (tmp_path / "d/state.json").write_text(state)
    with pytest.raises(DataError, match=FAULTS[state][0]):
        resolve_inputs([str(tmp_path / "d")])


@pytest.mark.parametrize("splits", ['{"splits": []}', '{"splits": ["../d"]}', '{"splits": ["none"]}', "{}", "[]"])
def test_splits_that_are_none(splits: str, tmp_path: Path) -> None:
    save_to_disk([chat(1)], tmp_path / "d")
    (tmp_path / "both").mkdir()
    (tmp_path / "both/dataset_dict.json").write_text(splits)
    with pytest.raises(DataError):
        resolve_inputs([str(tmp_path / "both")])


def test_a_file_that_is_cut_off_between_batches(tmp_path: Path) -> None:
    """The next file must not be read as if it went on there."""
    save_to_disk([chat(number) for number in range(20)], tmp_path / "d")
    path = tmp_path / "d/data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cannot read .*d: the Arrow data is damaged or cut off"):
        ids(tmp_path / "d")


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; name its files, for instance '.*/\*.jsonl'"):
        resolve_inputs([str(tmp_path)])
    (tmp_path / "train-00000.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"is a folder; name its files, for instance '.*/\*.parquet'"):
        resolve_inputs([str(tmp_path)])


def test_a_folder_that_datasets_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([chat(number) for number in range(25)])
    made.save_to_disk(tmp_path / "d", num_shards=4)
    made.shuffle(seed=1).select(range(10)).save_to_disk(tmp_path / "s")
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "dict")
    assert ids(tmp_path / "d") == ids(tmp_path / "dict") == list(range(25))
    assert ids(tmp_path / "s") == datasets.load_from_disk(tmp_path / "s")["id"][:]
