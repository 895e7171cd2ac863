"""A small chat corpus with every kind of line, and a tokenizer of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess.train_tokenizer import train_tokenizer

WORDS = [
    "the",
    "a",
    "small",
    "brown",
    "fox",
    "dog",
    "runs",
    "jumps",
    "over",
    "under",
    "lazy",
    "quick",
    "river",
    "hill",
    "day",
    "night",
    "and",
    "or",
    "but",
]


def chat_lines(count: int, seed: int = 0) -> list[str]:
    """Good JSONL lines of one to three exchanges."""
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, 15)))

    return [
        json.dumps({
            "messages": [
                {"role": role, "content": text()} for _ in range(generator.randint(1, 3)) for role in ("user", "assistant")
            ]
        })
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def make_lines() -> Callable[..., list[str]]:
    return chat_lines


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """300 good lines."""
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(chat_lines(300)) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "chats.jsonl").write_text("\n".join(chat_lines(200)))
    return train_tokenizer([str(folder / "chats.jsonl")], 360, folder / "tok.model")
