"""A table is preprocessed like lines: by several workers, and again after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written import CONTAINERS, write

from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess import journal, workers
from preprocess.pipeline import preprocess_files

TABLES = [name for name in CONTAINERS if name.startswith(("parquet", "arrow", "csv", "save"))]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("container", TABLES)
def test_workers_and_interruptions_change_nothing(
    container: str, make_lines: Callable[..., list[str]], tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = [json.loads(line) for line in make_lines(120)]
    rows[70] = {"messages": []}
    write(rows, container, tmp_path / "chats")
    monkeypatch.setattr(journal, "SEAL_EVERY_SECONDS", 0)

    def run(out: str, **options: Any) -> dict[str, bytes]:
        settings = Settings(seq_length=64, eval_fraction=0.2)
        preprocess_files(
            [str(tmp_path / "chats")], tokenizer.path, tmp_path / out, settings, block_bytes=4000, **options
        )
        return content(tmp_path / out)

    expected = run("one")
    assert run("three", num_workers=3) == expected
    (rejected,) = [json.loads(line) for line in expected["rejected.jsonl"].splitlines()]
    assert rejected["line"] == 71
    encode, lines = workers.encode_block, []

    def interrupted(block: Any, *arguments: Any) -> Any:
        lines.append(block.first_line)
        if len(lines) == 4:
            raise KeyboardInterrupt
        return encode(block, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "encode_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("out")
        (stopped,) = lines[3:]
        assert run("out") == expected
    assert lines[4] == stopped > 1, "sealed blocks are not encoded again"
