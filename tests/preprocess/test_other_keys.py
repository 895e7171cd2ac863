"""Keys that mean nothing here: all are counted, however many names there are, and validation warns of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.shards.manifest import Settings, read_manifest
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess.other_keys import MAX_NAMES, add_other_keys, describe_other_keys
from preprocess.pipeline import preprocess_files
from preprocess.validation.validate import validate_files

TURNS = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]


def write(path: Path, *beside: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({"messages": TURNS} | keys) + "\n" for keys in beside))
    return path


def test_names_are_bounded_and_nothing_is_uncounted() -> None:
    counts = Counter[str]()
    names = [f"name {number:05d}" for number in range(3 * MAX_NAMES)]
    for begin in range(0, len(names), 500):
        add_other_keys(counts, Counter(reversed(names[begin : begin + 500])))
    add_other_keys(counts, {names[0]: 5, "x" * 90 + "y" * 1_000_000: 3, names[-1]: 1})
    assert len(counts) == MAX_NAMES + 1 and set(counts) == {*names[:MAX_NAMES], "other names"}
    assert counts[names[0]] == 6 and counts["other names"] == 2 * MAX_NAMES + 4
    assert describe_other_keys(counts).startswith("name 00000 6, name 00001 1,"), "other names stand last"
    few = Counter[str]()
    add_other_keys(few, {"x" * 90 + "y" * 1000: 3, "x" * 90 + "y" * 2000: 4})
    assert few == {"x" * 90 + "y" * 10: 7}


def test_any_number_of_workers_and_any_interruption_keep_the_same_names(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", *({f"key {number}": 1, "id": number} for number in range(2 * MAX_NAMES)))
    settings = Settings(seq_length=64)
    for name, workers in (("one", 1), ("three", 3)):
        preprocess_files([str(path)], tokenizer.path, tmp_path / name, settings, num_workers=workers, block_bytes=9000)
    kept = read_manifest(tmp_path / "one").totals.other_keys
    assert kept == read_manifest(tmp_path / "three").totals.other_keys
    assert len(kept) == MAX_NAMES + 1 and kept["id"] == 2 * MAX_NAMES
    assert sum(kept.values()) == 4 * MAX_NAMES and kept["other names"] == MAX_NAMES + 1


def test_validation_warns_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "chats.jsonl", {}, {"id": 1, "source": "x"}, {"train": True}, {"id": 2}, {"tools": []})
    findings = validate_files([str(path)], num_examples=1)
    (entry,) = (entry for rule, entry in findings.rules.items() if rule != "duplicate conversation")
    assert (entry.rule, entry.count, entry.level) == ("keys without a meaning", 2, "warning")
    assert [(example.line, example.reason) for example in entry.examples] == [(2, "id 1, source 1 (ignored)")]
    assert findings.other_keys == {"id": 2, "source": 1}
    write(path, {"id": 1})
    assert run_command(cli, ["validate", str(path)]) == 0 and "keys without a meaning" in capsys.readouterr().out
    assert run_command(cli, ["validate", str(path), "--strict"]) == 3
    write(path, {})
    assert run_command(cli, ["validate", str(path), "--strict"]) == 0
