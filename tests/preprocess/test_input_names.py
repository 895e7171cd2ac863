"""Names of inputs: bytes that are no UTF-8, and the same file by several names."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.config.load import load_config
from lumina_ds.data.shards.manifest import Settings, read_manifest
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.files import path_of_text, shown_path
from preprocess.pipeline import preprocess_files
from preprocess.prepare import check_sources
from preprocess.sources import resolve_inputs

NAME = os.fsdecode(b"caf\xe9.jsonl")


@pytest.fixture
def latin(chats: Path) -> Path:
    """A file with one faulty line and a Latin-1 name, as an old archive leaves it."""
    path = chats.with_name(NAME)
    path.write_bytes(b"nope\n" + chats.read_bytes())
    return path


def test_a_path_as_text() -> None:
    for path, text in {
        b"caf\xe9.jsonl": r"caf\xe9.jsonl", b"caf\xc3\xa9": "café", b"a\nb": r"a\x0ab", rb"a\b": r"a\b", b"": "",
        rb"a\xe9": r"a\\xe9", rb"a\\xe9": r"a\\\\xe9", b"\\\xe9": r"\\\xe9", b"\x1b[1m": r"\x1b[1m",
    }.items():  # fmt: skip
        assert shown_path(os.fsdecode(path)) == text
        assert path_of_text(text) == os.fsdecode(path)


def test_every_path_comes_back_from_its_text() -> None:
    generator = random.Random(3)
    paths: dict[str, bytes] = {}
    for _ in range(20_000):
        path = bytes(generator.choices(b"a\\xe9E\xe9\xc3\xa9\n0\x7f", k=generator.randint(1, 8)))
        text = shown_path(os.fsdecode(path))
        assert text.encode() and path_of_text(text) == os.fsdecode(path)
        assert paths.setdefault(text, path) == path


def test_a_name_that_is_no_utf8(latin: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Journal, manifest, shards, rejected.jsonl and messages hold text that names the file, and it can be given so."""
    says = "caf\\xe9.jsonl line 1: invalid JSON"
    for number, given in enumerate((str(latin), shown_path(latin), str(latin).replace("caf", "*"))):
        out = tmp_path / f"out{number}"
        preprocess_files([given], tokenizer.path, out, Settings(seq_length=64), block_bytes=2000)
        manifest = read_manifest(out)
        assert [entry.name for entry in manifest.inputs] == ["caf\\xe9.jsonl"]
        assert manifest.totals.first_rejected["invalid JSON"].startswith(says)
        (rejected,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        (found,) = resolve_inputs([str(tmp_path / rejected["source"])])
        assert found.path == latin
    with pytest.raises(DataError, match=r"no such file: .*none\\xe9"):
        resolve_inputs([str(tmp_path / os.fsdecode(b"none\xe9"))])


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_the_command_line_prints_such_names(locale: str, latin: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    script = (
        "import sys; from lumina_ds.cli.main import cli, run_command\n"
        "for words in (['validate', F], ['validate', F, '--json', '--report', 'page.html'],"
        " ['preprocess', F, '--tokenizer', T, '--seq-length', '64', '--out', 'out'],"
        " ['preprocess', F, '--tokenizer', T, '--seq-length', '64', '--out', 'out', '--json'],"
        " ['data', 'inspect', 'out'], ['data', 'stats', 'out', '--html', 'stats.html'], ['validate', F + 'x'],"
        " ['tokenizer', 'train', F, '--vocab-size', '300', '--out', 'tok.model'],"
        " ['train', '--config', 'debug', '--train-data', F, F]):\n"
        "    print('CODE', run_command(cli, words), flush=True)\n"
    )
    script = f"F, T = {str(latin)!r}, {str(tokenizer.path)!r}\n{script}"
    environment = {"LC_ALL": locale, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(b"CODE")]
    assert codes == [3, 3, 0, 0, 0, 0, 3, 0, 2]
    assert b"Traceback" not in done.stderr and b"no such file: " in done.stderr
    assert b"--train-data takes one path each time: --train-data A --train-data B, or a glob in quotes" in done.stderr
    assert done.stdout.count(b"caf\\xe9.jsonl") >= 3


def test_the_same_file_is_read_once_and_said(chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(chats.read_bytes())  # a copy is a file of its own
    (tmp_path / "soft.jsonl").symlink_to(chats)
    os.link(chats, tmp_path / "hard.jsonl")
    for again, name in (
        (str(chats), "chats.jsonl is named twice"),
        (f"{chats.parent}/../{chats.parent.name}/chats.jsonl", "is the same file as"),
        (str(tmp_path / "soft.jsonl"), "soft.jsonl is the same file as"),
        (str(tmp_path / "hard.jsonl"), "hard.jsonl is the same file as"),
        (f"{tmp_path}/cha*.jsonl", "chats.jsonl is named twice"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lumina_ds.preprocess"):
            from preprocess import sources

            sources._warn_of_same_file.cache_clear()
            files = resolve_inputs([str(chats), str(other), again])
        assert [file.path for file in files] == [chats, other]
        (record,) = caplog.records
        assert name in record.getMessage() and record.getMessage().endswith("; it is read once")


def test_a_file_that_is_trained_and_evaluated_on(chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "link.jsonl").symlink_to(chats)
    config = load_config("debug").config
    config.data.train_data, config.data.eval_data = [str(chats)], [str(tmp_path / "link.jsonl")]
    with caplog.at_level(logging.WARNING, "lumina_ds.preprocess"):
        check_sources(config)
    (record,) = caplog.records
    assert "link.jsonl" in record.getMessage() and "is evaluated on and trained on too" in record.getMessage()
