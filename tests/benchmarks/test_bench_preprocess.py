"""The benchmark runs from its documents to its table; its figures are no business of a test."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from preprocess.train_tokenizer import train_tokenizer

HERE = Path(__file__).parent
SENTENCE = "the kernel reads a page of memory and writes it back when nobody else has changed it"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """About 300 kB in each of the formats that the corpus is made from."""
    folder = tmp_path / "doc"
    folder.mkdir()
    draw = random.Random(0)
    for page in range(60):
        bodies = [" ".join(draw.choices(SENTENCE.split(), k=150)) for _ in range(7)]
        html = "".join(f"<h2>Section {n}</h2><p>{body} <b>&amp;</b></p>" for n, body in enumerate(bodies[:3]))
        (folder / f"{page}.html").write_text(f"<html><body>{html}</body></html>")
        (folder / f"{page}.txt").write_text("".join(f"Heading {page}\n=======\n\n{body} .\n\n" for body in bodies[3:5]))
        troff = "".join(f'.SH "NAME {page}"\n\\fB{body}\\fP x\n' for body in bodies[5:])
        (folder / f"{page}.1.gz").write_bytes(gzip.compress(troff.encode()))
    return folder


@pytest.mark.slow
def test_benchmark(documents: Path, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": SENTENCE}]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer([str(tmp_path / "chats.jsonl")], 330, tmp_path / "t.model")
    command = [sys.executable, HERE / "bench_preprocess.py", "--size-mb", 0.2, "--documents", documents]
    command += ["--tokenizer", tmp_path / "t.model", "--workers", 1, "--sample-mb", 0.1, "--peer", "sentencepiece"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, _, lumina, *peers = done.stdout.strip().splitlines()
    assert header.startswith("| contender | workers | CPU seconds |")
    assert lumina.startswith("| lumina preprocess | 1 |")
    assert all(line.endswith("| yes |") for line in [lumina, *peers])
    if not peers:
        assert "left out: datasets map + sentencepiece; not installed: datasets" in done.stderr


def test_corpus(documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    from corpus import write_corpus

    sizes = [write_corpus(tmp_path / name, 100_000, [documents]) for name in ("a", "b")]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sizes[0] == (tmp_path / "a").stat().st_size and 100_000 <= sizes[0] < 120_000
    turns = [turn for line in (tmp_path / "a").open() for turn in json.loads(line)["messages"]]
    assert {turn["role"] for turn in turns} == {"user", "assistant"}
    assert not any("<p>" in turn["content"] or "&amp;" in turn["content"] for turn in turns)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert len(answers) == len(set(answers))
