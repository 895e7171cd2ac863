"""Trained models: exact, deterministic, never larger than asked, and clear about what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.errors import ConfigError, DataError
from preprocess.train_tokenizer import train_tokenizer


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_round_trip_and_determinism(chats: Path, tmp_path: Path, model_type: str) -> None:
    one = train_tokenizer([str(chats)], 360, tmp_path / "one.model", model_type)  # type: ignore[arg-type]
    other = train_tokenizer([str(chats)], 360, tmp_path / "other.model", model_type)  # type: ignore[arg-type]
    assert one.digest == other.digest
    assert 300 <= one.vocab_size <= 360
    for text in ("the fox", "  The Fox!\n", "日本語 \u2581 \0"):
        assert one.decode(one.encode_batch([text])[0]) == text


RARE_SPACES = {
    "chinese": "你好世界今天天气怎么样我们去公园吧" * 3,
    "digits": "0123456789",
    "one word": "hello",
    "one letter": "a",
    "only newlines": "\n\n",
    "only NUL": "\0",
    "only spaces": "   ",
    "only the symbol": "\u2581\u2581",
    "one space in ten thousand": "x" * 5000 + " " + "y" * 5000,
    "large alphabet": "".join(chr(0x4E00 + number) for number in range(3000)),
    "tabs": "a\tb\tc",
    "marks": "\ufeff\u200b\u2028\x85",
    "markers": "<|user|><|end|><s><unk>",
}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_every_text_comes_back_whatever_it_was_trained_on(tmp_path: Path, model_type: str) -> None:
    texts = [
        " ",
        "  ",
        "a b",
        "\n",
        "\t",
        "\r\n",
        "a\tb\n c",
        " x ",
        "\0",
        "\u2581",
        "你好 世界",
        "<|end|>",
        *RARE_SPACES.values(),
    ]
    for name, content in RARE_SPACES.items():
        (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": content}]}))
        tokenizer = train_tokenizer([str(tmp_path / "c.jsonl")], 300, tmp_path / "t.model", model_type)  # type: ignore[arg-type]
        pieces = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
        assert tokenizer.encode_batch([" "]) == [[pieces["\u2581"]]], name
        assert {"<0x09>", "<0x0A>"} <= pieces.keys()
        assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts, name


def test_small_text_gives_fewer_ids(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"messages":[{"role":"assistant","content":"hello hello"}]}')
    assert 262 < train_tokenizer([str(tmp_path / "c.jsonl")], 5000, tmp_path / "t.model").vocab_size < 300


def test_large_alphabet_in_a_small_vocabulary(tmp_path: Path) -> None:
    characters = "".join(chr(0x4E00 + number) for number in range(3000))
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": characters}]}))
    tokenizer = train_tokenizer([str(tmp_path / "c.jsonl")], 400, tmp_path / "t.model")
    assert tokenizer.vocab_size <= 400
    assert tokenizer.decode(tokenizer.encode_batch([characters])[0]) == characters


def test_the_sample_is_bounded_and_spread(chats: Path, tmp_path: Path) -> None:
    first, last = "zzzzzz", "qqqqqq"
    line = '{{"messages":[{{"role":"assistant","content":"{} {}"}}]}}\n'
    text = [line.format(word, number) for word in (first, last) for number in range(2000)]
    (tmp_path / "c.jsonl").write_text("".join(text))
    tokenizer = train_tokenizer([str(tmp_path / "c.jsonl")], 330, tmp_path / "t.model", sample_bytes=20_000)
    for word in (first, last):  # learnt from both ends of the file
        assert len(tokenizer.encode_batch([word])[0]) < 4


def test_max_conversations(chats: Path, tmp_path: Path) -> None:
    lines = [
        '{"messages":[{"role":"assistant","content":"aaaa"}]}',
        '{"messages":[{"role":"assistant","content":"bbbb"}]}',
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer([str(tmp_path / "c.jsonl")], 300, tmp_path / "t.model", max_conversations=1)
    a, b = tokenizer.encode_batch(["aaaa", "bbbb"])
    assert len(a) < 4 and len(b) == 4


def test_errors(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a vocabulary of 299 ids is too small"):
        train_tokenizer([str(chats)], 299, tmp_path / "t.model")
    (tmp_path / "empty.jsonl").write_text("x\n")
    with pytest.raises(DataError, match=r"empty.jsonl is not JSONL"):
        train_tokenizer([str(tmp_path / "empty.jsonl")], 300, tmp_path / "t.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "empty.jsonl"]


def test_refused_lines_are_counted(chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "lumina_ds.preprocess")
    train_tokenizer([str(chats)], 360, tmp_path / "t.model")
    assert not caplog.records
    good = chats.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([good[0], "", '{"id": 1}', *good[1:40], "{", '{"id": 2}', "x" * (17 << 20), good[40]]))
    train_tokenizer([str(broken)], 360, tmp_path / "t.model")
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("4 of 45 lines refused (first: broken.jsonl line 3: no key 'messages'"), message
    assert message.endswith("by rule: 1 invalid JSON, 1 line too long, 2 missing key)"), message


def test_sentencepiece_is_silent(chats: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lumina_ds", "tokenizer", "train", str(chats), "--vocab-size", "300", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "t.model")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["vocab_size"] == 300
    assert done.stderr == ""
