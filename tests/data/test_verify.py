"""`lumina data verify` over a whole folder with its held-out part: whatever byte changes, its file is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.shards.verify import tree_faults
from lumina_ds.errors import DataError
from preprocess.pipeline import preprocess_files
from preprocess.train_tokenizer import train_tokenizer

FILES = [
    "manifest.json", "packing-16.arrow", "packing-9.arrow", "rejected.jsonl", "shard-00000.arrow", "tokenizer.model",
    "eval/manifest.json", "eval/packing-16.arrow", "eval/shard-00000.arrow", "eval/tokenizer.model",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file: shards, plans of the folder and added later, rejected lines, tokenizer, a held-out part."""
    path = tmp_path_factory.mktemp("whole")
    lines = [
        json.dumps({"messages": [{"role": role, "content": f"number {n} is not {n + 1}"} for role in ("user", "ai")]})
        for n in range(60)
    ]
    (path / "in.jsonl").write_text("\n".join([*lines, "no JSON"]))
    tokenizer = train_tokenizer([str(path / "in.jsonl")], 330, path / "tok.model")
    settings = Settings(seq_length=16, eval_fraction=0.3, overlong="split")
    preprocess_files([str(path / "in.jsonl")], tokenizer.path, path / "out", settings)
    ShardFolder.open(path / "out").packing(9)
    assert sorted(str(file.relative_to(path / "out")) for file in path.glob("out/**/*.*")) == sorted(FILES)
    assert tree_faults(path / "out") == []
    return path / "out"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def fault_of(folder: Path) -> str:
    """The one fault found, whether listed or raised; it begins with the file, or names it."""
    try:
        (fault,) = tree_faults(folder)
    except DataError as error:
        return str(error)
    return fault


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(folder: Path, name: str) -> None:
    intact = (folder / name).read_bytes()
    generator = random.Random(name)
    for position in sorted(generator.sample(range(len(intact) * 8), min(25, len(intact) * 8))):
        damaged = bytearray(intact)
        damaged[position // 8] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        assert name in fault_of(folder), f"bit {position} of {name}"
    (folder / name).write_bytes(intact)
    assert tree_faults(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_cut_off_or_missing(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    for length in (size - 1, size // 2, 0):
        os.truncate(folder / name, length)
        assert name in fault_of(folder)
    os.remove(folder / name)
    if name == "packing-9.arrow":  # made again at will
        assert tree_faults(folder) == []
    else:
        assert name in fault_of(folder) or f"{Path(name).parent} has no manifest.json" in fault_of(folder)


def test_several_at_once(folder: Path) -> None:
    """A plan that was added is judged by its own digest where the shards cannot vouch for it."""
    shutil.copy(folder / "shard-00000.arrow", folder / "shard-00001.arrow")
    os.truncate(folder / "shard-00000.arrow", 900)
    os.truncate(folder / "packing-9.arrow", 300)
    os.remove(folder / "eval/tokenizer.model")
    (folder / "eval/notes.txt").touch()
    (folder / "report.html").touch()
    assert [fault.split(":")[0] for fault in tree_faults(folder)] == [
        "shard-00000.arrow", "packing-9.arrow", "shard-00001.arrow", "eval/tokenizer.model", "eval/notes.txt",
    ]  # fmt: skip
