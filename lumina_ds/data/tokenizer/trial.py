"""A tokenizer.json is tried in a process of its own first: a file may hang, panic, or take all memory.

Its expressions run in a library of Rust, where nothing in this process could stop them. So another process reads the
file and encodes texts that bring expressions to light (runs of the characters that they name), within limits of CPU
time and memory; what it finds is one typed error. A file that passed is read here as usual.

    python -m lumina_ds.data.tokenizer.trial SECONDS BYTES FILE      the process; prints {"error": ..., "kind": ...}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lumina_ds.data.limited import limit_this_process, verdict_of
from lumina_ds.data.tokenizer.tokenizer_json import parse_tokenizer_json, read_tokenizer_json
from lumina_ds.errors import DataError, MachineError

# A file of 10 MB is read in 2 to 4 seconds on a slow machine.
CPU_SECONDS = 20
CPU_SECONDS_PER_MB = 2
MEMORY_BYTES = 8 << 30
MEMORY_PER_BYTE = 100
RUN_LENGTH = 300
_MOST_CHARACTERS = 64
_CHARACTERS = "a0 \n.é你"


@lru_cache(maxsize=8)
def try_elsewhere(path: Path, digest: str, num_bytes: int) -> None:
    """Raise DataError where the file cannot be read and used within the limits. digest: of its content, tried once."""
    seconds = CPU_SECONDS + CPU_SECONDS_PER_MB * (num_bytes >> 20)
    memory_bytes = MEMORY_BYTES + MEMORY_PER_BYTE * num_bytes
    verdict = verdict_of(__name__, seconds, memory_bytes, str(path))
    if verdict is None:
        raise _too_costly(path, seconds)
    if verdict["error"]:
        raise (MachineError if verdict["kind"] == "MachineError" else DataError)(verdict["error"])


def probes(document: dict[str, Any]) -> Iterator[str]:
    """Texts on which an expression that backtracks without end does so: runs of the characters that it names."""
    named = dict.fromkeys(_CHARACTERS + "".join(_expressions(document)))
    characters = list(named)[:_MOST_CHARACTERS]
    # An expression that ends in a letter is not even tried on a text without it.
    end = "\x01" + "".join(characters)
    for character, other in zip(characters, characters[1:] + characters[:1], strict=True):
        yield character * RUN_LENGTH
        yield character * RUN_LENGTH + end
        yield (character + other) * RUN_LENGTH + end


def _expressions(component: Any) -> Iterator[str]:
    """Every regular expression of a normalizer, pre-tokenizer or decoder."""
    if isinstance(component, list):
        for part in component:
            yield from _expressions(part)
    elif isinstance(component, dict):
        for key, part in component.items():
            if key == "Regex" and isinstance(part, str):
                yield part
            elif key not in ("vocab", "merges", "added_tokens"):
                yield from _expressions(part)


def _too_costly(path: Path, seconds: int) -> DataError:
    return DataError(
        f"{path} cannot be read and tried within {seconds} seconds of CPU time and its share of memory: an expression "
        "in it backtracks without end, or it is damaged; take it from its source again, or use another"
    )


def _main(seconds: int, memory_bytes: int, path: Path) -> None:
    limit_this_process(seconds, memory_bytes)
    verdict: dict[str, str | None] = {"error": None, "kind": None}
    try:
        content = path.read_bytes()
        document = parse_tokenizer_json(content) or {}
        tokenizer = read_tokenizer_json(content, document, path)
        texts = list(probes(document))
        for ids in tokenizer.encode(texts):
            tokenizer.decode(ids)
        tokenizer.encode_template("".join(texts[:3]))
    except (DataError, MachineError) as error:
        verdict = {"error": str(error), "kind": type(error).__name__}
    except MemoryError:
        return  # no verdict: the parent says what that means
    print(json.dumps(verdict))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
