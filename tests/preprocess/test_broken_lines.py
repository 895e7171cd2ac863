"""Every kind of broken line: none ends a run, none vanishes, each is refused for its own reason."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest

from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.text import as_max_rejected
from preprocess.pipeline import preprocess_files
from preprocess.quarantine import is_too_many

GOOD = '{"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]}'
ASSISTANT = '{"role": "assistant", "content": "x"}'


def messages(text: str) -> str:
    return f'{{"messages": {text}}}'


def with_key(text: str) -> str:
    return f"{GOOD[:-1]}, {text}}}"


BROKEN: dict[str, list[str | bytes]] = {
    "invalid JSON": [
        GOOD[:40],  # truncated
        GOOD[:-1],
        GOOD[:-1] + ",}",  # trailing comma
        GOOD + GOOD,  # two objects on a line
        f"[{GOOD}",
        with_key('"x": NaN'),
        with_key('"x": -Infinity'),
        with_key('"x": 01'),
        with_key('"x": 1.'),
        with_key('"x": +1'),
        with_key("'x': 1"),
        with_key('"x": undefined'),
        GOOD + " // a comment",
        "# a comment",
        "/* a comment */" + GOOD,
        GOOD.replace("fox", "fo\tx"),  # control characters in a string
        GOOD.replace("fox", "fo\x00x"),
        GOOD.replace("fox", "fo\\x"),  # unknown escape
        GOOD.replace("fox", "\\u12"),
        "role,content",
        "\x0c" + GOOD,
    ],
    "invalid UTF-8": [
        GOOD.encode().replace(b"fox", b"f\xffx"),
        GOOD.encode().replace(b"fox", "fö".encode("latin-1")),
        GOOD.encode().replace(b"fox", b"\xed\xa0\x80"),  # a surrogate in UTF-8
        GOOD.encode().replace(b"fox", b"\xc0\x80"),  # overlong
        gzip.compress(GOOD.encode(), mtime=0).replace(b"\n", b""),
        GOOD.encode("utf-16"),
    ],
    "byte order mark": [b"\xef\xbb\xbf" + GOOD.encode()],
    "not an object": ["[]", '"text"', "null", "true", "17", f"[{GOOD}]"],
    "missing key": [
        "{}",
        '{"texts": "x"}',
        GOOD.replace("messages", "Messages"),
        messages(f'[{{"content": "x"}}, {ASSISTANT}]'),
        messages(f'[{{"role": "user"}}, {ASSISTANT}]'),
    ],
    "unsupported content part": [messages(f'[{{"role": "user", "content": ["x"]}}, {ASSISTANT}]')],
    "wrong type": [
        messages("null"),
        messages('"text"'),
        messages("{}"),
        messages(f'["hi", {ASSISTANT}]'),
        messages(f"[[], {ASSISTANT}]"),
        messages(f'[{{"role": "user", "content": null}}, {ASSISTANT}]'),
        messages(f'[{{"role": 1, "content": "x"}}, {ASSISTANT}]'),
    ],
    "empty conversation": [messages("[]")],
    "empty content": [GOOD.replace("the fox", "")],
    "unknown role": [GOOD.replace("user", "User"), GOOD.replace("user", "narrator"), GOOD.replace("user", "user ")],
    "no assistant turn": [GOOD.replace("assistant", "user")],
    "duplicate key": [with_key('"messages": []'), GOOD.replace('"role": "user"', '"role": "bot", "role": "user"')],
    "lone surrogate": [GOOD.replace("fox", "\\ud800"), GOOD.replace("fox", "\\udc00\\ud800")],
    "number out of range": [with_key('"x": 1e999'), with_key('"x": ' + "9" * 5000)],
    "nested too deeply": [with_key('"x": ' + "[" * 500 + "]" * 500), with_key('"x": ' + '{"x":' * 100_000 + "1" + "}" * 100_000)],
}  # fmt: skip
FINE = [
    GOOD,
    GOOD + "\r",
    "  " + GOOD + "\t",
    GOOD.replace("fox", "\\u0000"),
    GOOD.replace("fox", "\u2028\u0085\x7f"),
    GOOD.replace("fox", "</s><|end|><|assistant|>\u2581"),
    GOOD.replace("fox", "\\ud83d\\ude00"),
    messages(f"[{ASSISTANT}, {ASSISTANT}]"),
    with_key('"x": ' + "9" * 4000),
]
BLANK = ["", "   ", "\t\r"]


def lines() -> list[tuple[bytes, str | None]]:
    """(line, its rule; None for a fine one); a fine or blank one after every broken one."""
    result: list[tuple[bytes, str | None]] = []
    for rule, texts in BROKEN.items():
        for text in texts:
            result.append((text if isinstance(text, bytes) else text.encode(), rule))
            result.append(((FINE + BLANK)[len(result) // 2 % (len(FINE) + len(BLANK))].encode(), None))
    return result


@pytest.mark.parametrize("num_workers", [1, 2])
def test_row_26_every_broken_line_is_accounted_for(tokenizer: Tokenizer, tmp_path: Path, num_workers: int) -> None:
    written = lines()
    broken = {number: rule for number, (_, rule) in enumerate(written, 1) if rule}
    blank = sum(line.strip() == b"" for line, _ in written)
    assert len(broken) > 55
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in written) + b"\n")
    settings = Settings(seq_length=64)
    manifest = preprocess_files([str(path)], tokenizer.path, tmp_path / "out", settings, num_workers=num_workers, block_bytes=20_000)  # fmt: skip
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_bytes().splitlines()]
    assert {entry["line"]: entry["rule"] for entry in rejected} == broken and len(rejected) == len(broken)
    content = path.read_bytes()
    assert all(content[entry["byte_offset"] :].startswith(written[entry["line"] - 1][0]) for entry in rejected)
    totals = manifest.totals
    assert totals.lines == totals.conversations + totals.rejected == len(written) - blank
    assert totals.rejected == len(broken) == sum(totals.rejected_by_rule.values())
    folder = ShardFolder.open(tmp_path / "out")
    fine = [number for number, (line, rule) in enumerate(written, 1) if rule is None and line.strip()]
    assert [folder.origin(index).line for index in range(folder.num_documents)] == fine


def test_max_rejected_counts_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines()))
    count = sum(len(texts) for texts in BROKEN.values())
    preprocess_files([str(path)], tokenizer.path, tmp_path / "out", Settings(seq_length=64), max_rejected=count)
    with pytest.raises(
        DataError, match=rf"{count} of [\d,]+ lines rejected, more than --max-rejected {count - 1}"
    ) as raised:
        preprocess_files([str(path)], tokenizer.path, tmp_path / "b", Settings(seq_length=64), max_rejected=count - 1)
    assert raised.value.exit_code == 3


def test_a_share_of_refused_lines_is_compared_exactly() -> None:
    for num_lines in (1, 3, 7, 100, 1000):
        for num_rejected in range(num_lines + 1):
            # The share as a user writes it, where it has an end.
            for text in (f"{num_rejected * 100 / num_lines:.1f}%", f"{num_rejected / num_lines:.3f}"):
                limit, exact = as_max_rejected(text), Fraction(text.rstrip("%")) / (100 if "%" in text else 1)
                assert is_too_many(num_rejected, num_lines, limit) == (Fraction(num_rejected, num_lines) > exact), text
    assert not is_too_many(0, 0, 0.0) and is_too_many(1, 100, 0.0) and not is_too_many(100, 100, 1.0)
