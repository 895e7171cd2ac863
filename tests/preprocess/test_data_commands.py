"""`lumina preprocess`, `tokenizer` and `data` at the command line: output, JSON, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.tokenizer.tokenizer import Tokenizer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lumina(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        code = run_command(cli, [str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def shards(lumina: Command, chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    options = ("--tokenizer", tokenizer.path, "--seq-length", 64, "--out", out, "--eval-fraction", 0.1)
    code, text, _ = lumina("preprocess", chats, *options)
    assert code == 0 and "0 of 300 lines rejected" in text and "held out in" in text
    return out


def test_preprocess_json(lumina: Command, chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = ("--tokenizer", tokenizer.path, "--seq-length", 64, "--out", tmp_path / "out")
    code, text, _ = lumina("preprocess", chats, *options, "--packing", "concat", "--workers", 2, "--json")
    manifest = json.loads(text)
    assert code == 0 and manifest["totals"]["conversations"] == 300 and manifest["settings"]["packing"] == "concat"


def test_preprocess_from_standard_input(
    lumina: Command, chats: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tokenizer", tokenizer.path, "--seq-length", 64, "--out", tmp_path / "out")
    for code_expected, message in ((0, ""), (3, "out exists; use --overwrite")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(chats.read_bytes()))))
        code, _, error = lumina("preprocess", "-", *options)
        assert code == code_expected and message in error


def test_python_m_preprocess(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "preprocess", str(chats), "--tokenizer", str(tokenizer.path)]
    done = subprocess.run(
        [*command, "--seq-length", "64", "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "300 conversations" in done.stdout


@pytest.mark.parametrize(("words", "code", "message"), [
    (["none.jsonl", "--tokenizer", "{tok}"], 3, "no such file: none.jsonl"),
    (["{chats}", "--tokenizer", "none.model"], 3, "cannot read the tokenizer none.model"),
    (["{chats}", "--tokenizer", "{chats}"], 3, "is not a SentencePiece model"),
    (["{tok}", "--tokenizer", "{tok}"], 3, "is not JSONL"),
    (["{bad}", "--tokenizer", "{tok}"], 3, "no assistant turn anywhere"),
    (["{bad}", "{chats}", "--tokenizer", "{tok}", "--max-rejected", "0"], 3, "more than --max-rejected 0"),
    (["{chats}", "--tokenizer", "{tok}", "--overlong", "cut"], 2, "'cut' is not one of"),
    (["{chats}", "--tokenizer", "{tok}", "--packing", "concat", "--overlong", "truncate"], 2, "--overlong truncate contradicts"),
    (["{chats}", "--tokenizer", "{tok}", "--packing", "concat", "--overlong", "drop"], 2, "--overlong drop contradicts"),
    (["{empty}", "--tokenizer", "{tok}"], 3, "it is empty"),
    (["{utf16}", "--tokenizer", "{tok}"], 3, "starts with the byte order mark of UTF-16; convert it to UTF-8"),
    (["{folder}", "--tokenizer", "{tok}"], 3, "is a folder; name its files"),
    (["{folder}/*.json", "--tokenizer", "{tok}"], 3, "no such file"),
    (["{chats}"], 2, "Missing option '--tokenizer'"),
    (["--tokenizer", "{tok}"], 2, "Missing argument 'FILES...'"),
    (["{chats}", "--tokenizer", "{tok}", "--eval-fraction", "1"], 2, "1.0 is not in the range"),
])  # fmt: skip
def test_preprocess_errors(
    words: list[str], code: int, message: str, lumina: Command, chats: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages":[{"role":"user","content":"x"}]}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "utf16.jsonl").write_text(chats.read_text(), encoding="utf-16")
    places = {"empty": tmp_path / "empty.jsonl", "utf16": tmp_path / "utf16.jsonl", "folder": tmp_path}
    filled = [word.format(chats=chats, tok=tokenizer.path, bad=bad, **places) for word in words]
    got, out, error = lumina("preprocess", *filled, "--seq-length", 64, "--out", tmp_path / "out")
    assert (got, out) == (code, "")
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_outputs_that_cannot_be_written(lumina: Command, chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A file in the way, a parent that is a file, a kernel's folder, and a file size limit as a full disk."""
    words = ["preprocess", chats, "--tokenizer", tokenizer.path, "--seq-length", 64, "--out"]
    for out, code, message in (
        (chats, 3, "exists and is no shard folder; choose another --out"),
        (chats / "out", 4, "choose another --out"),
        ("/proc/none/out", 4, "cannot write /proc/none/out: No such file or directory; choose another --out"),
    ):
        got, text, error = lumina(*words, out)
        assert (got, text) == (code, "") and message in error and error.count("\n") == 1
    command = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", sys.executable, "-m", *map(str, words), tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and "File too large; make room, and the same command goes on" in done.stderr
    assert done.stderr.count("\n") == 1 and (tmp_path / "out.partial").is_dir()
    assert lumina(*words, tmp_path / "out")[0] == 0 == lumina("data", "verify", tmp_path / "out")[0]
    assert lumina(*words, tmp_path / "other")[0] == 0
    for name in ("manifest.json", "shard-00000.arrow"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_ctrl_c_is_one_line(
    lumina: Command, chats: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    words = ["preprocess", chats, "--tokenizer", tokenizer.path, "--seq-length", 64, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.workers.encode_block", interrupt)
        assert lumina(*words) == (130, "", "\ninterrupted\n") and (tmp_path / "out.partial").is_dir()
    assert lumina(*words)[0] == 0


def test_pack(lumina: Command, shards: Path) -> None:
    code, text, _ = lumina("data", "pack", shards, "--seq-length", 32)
    assert code == 0 and "packing-32.arrow: " in text and "eval/packing-32.arrow: " in text
    plans = json.loads(lumina("data", "pack", shards, "--seq-length", 128, "--json")[1])["plans"]
    assert [plan["file"] for plan in plans] == [f"{shards}/packing-128.arrow", f"{shards}/eval/packing-128.arrow"]
    assert json.loads(lumina("data", "stats", shards, "--seq-length", 128, "--json")[1])["rows"] == plans[0]["rows"]
    assert lumina("data", "verify", shards)[0] == 0
    assert lumina("data", "pack", shards / "none", "--seq-length", 128)[0] == 3


def test_tokenizer_commands(lumina: Command, chats: Path, tmp_path: Path) -> None:
    model = tmp_path / "new" / "tok.model"
    code, text, _ = lumina("tokenizer", "train", chats, "--vocab-size", 330, "--model-type", "unigram", "--out", model)
    assert code == 0 and f"{model}: " in text
    code, text, _ = lumina("tokenizer", "inspect", model, "the <s> fox", "\u2581", "--json")
    facts = json.loads(text)
    assert code == 0 and facts["bos_id"] == 1 and facts["role_ids"] == {"system": 3, "user": 4, "assistant": 5}
    assert [entry["round_trip"] for entry in facts["texts"]] == [True, True]
    code, text, _ = lumina("tokenizer", "inspect", model, "the fox")
    assert code == 0 and "'the fox'" in text
    assert lumina("tokenizer", "inspect", tmp_path / "none.model")[0] == 3
    code, _, error = lumina("tokenizer", "train", chats, "--vocab-size", 100, "--out", model)
    assert code == 2 and "too small" in error


def test_stats(lumina: Command, shards: Path) -> None:
    code, text, _ = lumina("data", "stats", shards, "--json")
    stats = json.loads(text)
    assert code == 0 and stats["lines"] == 300 == stats["conversations"] + stats["held_out"]
    assert stats["row_fullness"] > 0.9 and 0 < stats["trained_share"] < 1
    code, text, _ = lumina("data", "stats", shards, "--seq-length", 32, "--json")
    assert json.loads(text)["seq_length"] == 32 and json.loads(text)["rows"] > stats["rows"]
    assert "row_fullness" in lumina("data", "stats", shards)[1]


def test_verify(lumina: Command, shards: Path) -> None:
    code, text, _ = lumina("data", "verify", shards)
    assert code == 0 and "7 files intact" in text  # shard, packing, tokenizer of both, and rejected.jsonl
    damaged = shards / "eval" / "shard-00000.arrow"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 8
    damaged.write_bytes(data)
    code, out, error = lumina("data", "verify", shards)
    assert (code, out) == (3, "")
    assert "eval/shard-00000.arrow: was altered (its digest differs)" in error
    code, text, _ = lumina("data", "verify", shards, "--json")
    assert code == 3 and json.loads(text)["intact"] is False and len(json.loads(text)["faults"]) == 1


def test_truncated_shard_at_the_command_line(lumina: Command, shards: Path) -> None:
    os.truncate(shards / "shard-00000.arrow", 500)
    code, _, error = lumina("data", "stats", shards)
    assert code == 3 and "shard-00000.arrow is damaged: 500 bytes" in error and error.count("\n") == 1


def test_inspect(lumina: Command, shards: Path, tokenizer: Tokenizer) -> None:
    code, text, _ = lumina("data", "inspect", shards, "--row", 1, "--json")
    row = json.loads(text)
    assert code == 0 and row["row"] == 1
    assert sum(segment["length"] for segment in row["segments"]) + row["padding"] == 64
    for segment in row["segments"]:
        assert segment["source"] == "chats.jsonl" and segment["line"] >= 1
        pieces = list(zip(segment["pieces"], segment["trained"], strict=True))
        assert pieces[:2] == [("<s>", 0), ("<|user|>", 0)]
        # an end marker is trained exactly where it closes an assistant's turn
        markers = [(piece, trained) for piece, trained in pieces if piece in ("<|user|>", "<|assistant|>", "<|end|>")]
        for (opening, _), (closing, trained) in zip(markers[::2], markers[1::2], strict=False):
            assert closing == "<|end|>" and trained == (opening == "<|assistant|>")
    code, text, _ = lumina("data", "inspect", shards, "--row", 1)
    assert code == 0 and "chats.jsonl line" in text and "<|assistant|>" in text
    code, _, error = lumina("data", "inspect", shards, "--row", 99999)
    assert code == 2 and "99999 is beyond the last row" in error
