"""`lumina data verify`: any flipped bit, cut, missing or added file of a folder and of its held-out part is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings, read_manifest, write_manifest
from lumina_ds.data.shards.verify import num_files, tree_faults
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.pipeline import preprocess_files


@pytest.fixture(scope="session")
def master(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_lines: Callable[..., list[str]]
) -> Path:
    """A folder with everything that one can hold: held-out part, refused lines, a plan added later."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "in.jsonl").write_text("\n".join([*make_lines(200), "not json"]))
    out = folder / "out"
    preprocess_files([str(folder / "in.jsonl")], tokenizer.path, out, Settings(seq_length=64, eval_fraction=0.2))
    for path in (out, out / "eval"):
        ShardFolder.open(path).packing(48)
    return out


@pytest.fixture
def shards(master: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(master, tmp_path / "shards"))


def test_an_intact_folder(shards: Path) -> None:
    assert tree_faults(shards) == []
    # per part a shard, a plan and the tokenizer, and the refused lines of the whole; added plans are in no manifest
    assert num_files(shards) == 7


def test_300_flipped_bits_are_all_found_by_name(shards: Path) -> None:
    generator = random.Random(0)
    files = sorted(path for path in shards.rglob("*") if path.is_file())
    assert len(files) == 11
    for number in range(300):
        path = files[number % len(files)]
        intact = path.read_bytes()
        position = generator.randrange(len(intact) * 8)
        damaged = bytearray(intact)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        name = str(path.relative_to(shards))
        try:
            found = tree_faults(shards)
        except DataError as error:
            assert name == "manifest.json" and str(path) in str(error)
        else:
            assert len(found) == 1 and found[0].startswith(f"{name}: "), (name, position, found)
        path.write_bytes(intact)
    assert tree_faults(shards) == []


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_every_truncation_is_found(shards: Path, share: float) -> None:
    for path in sorted(shards.rglob("*")):
        if path.is_file() and path != shards / "manifest.json":
            intact = path.read_bytes()
            os.truncate(path, int(len(intact) * share))
            assert [fault.split(":")[0] for fault in tree_faults(shards)] == [str(path.relative_to(shards))]
            path.write_bytes(intact)


def test_every_missing_file_is_found(shards: Path) -> None:
    for path in sorted(shards.rglob("*")):
        is_listed = path.is_file() and path.name not in ("manifest.json", "packing-48.arrow")
        if is_listed:
            intact = path.read_bytes()
            path.unlink()
            assert tree_faults(shards) == [f"{path.relative_to(shards)}: is missing"]
            path.write_bytes(intact)


@pytest.mark.parametrize("name", ["shard-00001.arrow", "notes.txt", "eval/shard-00001.arrow", "eval/eval"])
def test_added_files_are_found(shards: Path, name: str) -> None:
    shutil.copyfile(shards / "shard-00000.arrow", shards / name)
    assert tree_faults(shards) == [f"{name}: not part of this folder"]


def test_a_missing_held_out_folder_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = read_manifest(shards).totals.held_out
    shutil.rmtree(shards / "eval")
    fault = f"eval: missing, with {held_out} held-out conversations"
    assert held_out > 0 and tree_faults(shards) == [fault]
    assert run_command(cli, ["data", "verify", str(shards), "--json"]) == 3
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["files"], document["intact"], document["faults"]) == (4, False, [f"{shards}/{fault}"])
    assert fault in captured.err


def test_a_held_out_folder_without_its_manifest(shards: Path) -> None:
    (shards / "eval" / "manifest.json").unlink()
    [fault] = tree_faults(shards)
    assert fault.startswith("eval/manifest.json: ") and "has no manifest.json" in fault


def test_a_held_out_folder_of_other_data_is_found(shards: Path) -> None:
    held_out = shards / "eval"
    inner = read_manifest(held_out)
    others = {
        "it holds the split 'train'": inner.model_copy(update={"split": "train"}),
        "its manifest names other inputs": inner.model_copy(update={"inputs": []}),
    }
    for reason, manifest in others.items():
        write_manifest(manifest, held_out)
        [fault] = tree_faults(shards)
        assert fault.startswith("eval: ") and reason in fault and fault.endswith("held out of other data")
    write_manifest(inner, held_out)
    outer = read_manifest(shards)
    totals = outer.totals.model_copy(update={"held_out": outer.totals.held_out + 1})
    write_manifest(outer.model_copy(update={"totals": totals}), shards)
    [fault] = tree_faults(shards)
    assert fault.startswith("eval: it holds") and f"conversations, not {totals.held_out}" in fault
    write_manifest(outer, shards)


def test_a_held_out_folder_that_no_manifest_knows(shards: Path) -> None:
    shutil.copytree(shards / "eval", shards / "eval" / "eval")
    assert tree_faults(shards) == ["eval/eval: not part of this folder"]
