"""Equal conversations give equal shards, byte for byte, from every container and every equivalent format."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from written import CONTAINERS, FORMATS, write

from lumina_ds.data import formats
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess.pipeline import preprocess_files

# Brackets, quotes, separators and line ends of all kinds; texts that look like JSON, like numbers and like nothing.
HARD = [
    '],}{["\\",\n',
    "a,b;c\td",
    'say ""',
    "1",
    "true",
    "null",
    "NaN",
    " ",
    "é\u2028\U0001f600",
    "[1, 2]",
    "{}",
    "\r\nx\r",
]


def exchanges(count: int = 20) -> list[tuple[str, str]]:
    generator = random.Random(5)

    def text() -> str:
        return " ".join(generator.choices(["small", "fox", "runs", *HARD], k=generator.randint(1, 9)))

    return [*((hard, f"{hard}!") for hard in HARD), *((text(), text()) for _ in range(count))]


def digest(container: str, form: str, tokenizer: Tokenizer, folder: Path) -> str:
    """Of all Arrow files of the shards."""
    folder.mkdir()
    # The name stands in the shards, so it is the same for all; a table of one column needs it to be known as one.
    path = folder / "chats.csv"
    write([FORMATS[form](*exchange) for exchange in exchanges()], container, path)
    settings = Settings(seq_length=64, eval_fraction=0.1)
    preprocess_files([str(path)], tokenizer.path, folder / "out", settings, max_rejected=0)
    found = hashlib.sha256()
    for file in sorted((folder / "out").rglob("*.arrow")):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def table(tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, str]]:
    """{container: {format: digest}}, without a TSV file of one column, which needs its own name to be known as one."""
    return {
        container: {
            form: digest(container, form, tokenizer, folder / f"{container} {form}")
            for form in FORMATS
            if (container, form) != ("tsv", "text")
        }
        for container in CONTAINERS
    }


def test_equal_conversations_give_equal_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """`pytest -s` prints the table. One digest stands everywhere in it, and another one for plain texts."""
    found = table(tokenizer, tmp_path)
    print("\n" + " " * 16 + " ".join(f"{form[:12]:<12}" for form in FORMATS))
    print("\n".join(f"{container:<16}" + " ".join(row.values()) for container, row in found.items()))
    digests = {form: {row[form] for row in found.values() if form in row} for form in FORMATS}
    assert all(len(each) == 1 for each in digests.values())
    assert len(set.union(*(digests[form] for form in FORMATS if form != "text"))) == 1
    assert digests["text"] != digests["messages"]


def test_every_format_stands_in_the_table() -> None:
    assert set(formats.FORMATS) == set(FORMATS)
