"""Conversations that a tiny model learns something from in a few steps."""

from __future__ import annotations

import json
from pathlib import Path


def write_conversations(path: Path, count: int, first: int = 0) -> Path:
    """JSONL of small sums in words: regular enough that a tiny model learns something in a few steps."""
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(first, first + count):
            a, b = number % 9, number % 7
            messages = [
                {"role": "user", "content": f"what is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
                {"role": "user", "content": "and one more?"},
                {"role": "assistant", "content": f"that makes {a + b + 1}, since {a + b} plus 1 is {a + b + 1}."},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path
