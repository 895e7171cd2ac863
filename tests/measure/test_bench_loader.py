"""`lumina bench loader`: its numbers agree with the folder and with each other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, template_digest
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Manifest, Settings, TemplateEntry, TokenizerEntry, Totals, write_manifest
from lumina_ds.data.shards.writer import ShardWriter, shard_schema

DOCUMENTS, BATCHES, LENGTH = 400, 10, 500  # 2 M tokens: 4 conversations of 500 tokens fill a row of 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "shards"
    path.mkdir()
    schema = shard_schema(32_000)
    writer = ShardWriter(path, schema, shard_bytes=1 << 20)
    generator = np.random.default_rng(0)
    for _ in range(BATCHES):
        offsets = np.arange(0, DOCUMENTS * LENGTH + 1, LENGTH, dtype=np.int32)
        ids = generator.integers(3, 32_000, DOCUMENTS * LENGTH, dtype=np.uint16)
        mask = (np.arange(DOCUMENTS * LENGTH) // 50 % 2).astype(np.uint8)
        columns = [
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, mask),
            pa.array([LENGTH] * DOCUMENTS, pa.int32()),
            pa.array(["made"] * DOCUMENTS),
            pa.array(range(1, DOCUMENTS + 1), pa.int64()),
        ]
        writer.write(pa.RecordBatch.from_arrays(columns, schema=schema))
    writer.close()
    count = DOCUMENTS * BATCHES
    totals = Totals(lines=count, conversations=count, tokens=count * LENGTH, trained_tokens=count * LENGTH // 2)
    manifest = Manifest(
        settings=Settings(seq_length=2000),
        tokenizer=TokenizerEntry(digest="0" * 64, vocab_size=32_000),
        template=TemplateEntry(version=DEFAULT_TEMPLATE, digest=template_digest(DEFAULT_TEMPLATE)),
        inputs=[],
        totals=totals,
        shards=writer.shards,
        files=[],
    )
    write_manifest(manifest, path)
    return path


def run(*words: object) -> int:
    return run_command(cli, ["bench", "loader", *map(str, words)])


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--batch-size", 4, "--seconds", 0.2, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["mode"], record["seq_length"], record["batch_size"]) == ("memory", 2000, 4)
    assert (record["num_documents"], record["num_tokens"], record["num_rows"]) == (4000, 2_000_000, 1000)
    assert record["shard_bytes"] == sum(path.stat().st_size for path in folder.glob("shard-*.arrow"))
    parts = ("open_seconds", "plan_seconds", "first_batch_seconds")
    assert record["startup_seconds"] == pytest.approx(sum(record[part] for part in parts))
    assert 0.2 <= record["measured_seconds"] < 5
    assert record["measured_rows"] % 4 == 0
    assert record["rows_per_second"] == pytest.approx(record["measured_rows"] / record["measured_seconds"])
    # every row is full, so tokens are rows times their length
    assert record["tokens_per_second"] == pytest.approx(record["rows_per_second"] * 2000)
    assert record["tokens_per_second_per_core"] >= record["tokens_per_second"] * 0.9
    assert {"memory_bytes", "mapped_bytes"} <= set(record)


def test_text_and_another_row_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--seq-length", 1000, "--seconds", 0, "--force-streaming") == 0
    shown = capsys.readouterr().out
    assert (
        "4,000 conversations, 2,000,000 tokens, 2,000 rows of 1000, 5.84 MiB" in shown and "read as streaming" in shown
    )
    assert "start-up" in shown and "M tokens/s per core (micro-batches of 8 rows" in shown


def test_no_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none") == 3
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} does not exist; `lumina preprocess` makes one\n"


def test_gathering_keeps_its_speed(folder: Path) -> None:
    """At least 5 M tokens a second of processor time: a quarter of the figure asked for, as machines are shared."""
    rows = PackedRows(ShardFolder.open(folder), 2000)
    generator = np.random.default_rng(1)
    best = 0.0
    for _ in range(5):
        started, tokens = time.process_time(), 0
        for _ in range(20):
            tokens += rows.collate(generator.integers(0, rows.num_rows, 8).tolist()).num_tokens
        best = max(best, tokens / (time.process_time() - started))
    assert best > 5e6
