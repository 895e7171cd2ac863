"""The benchmark's corpus: conversations from documentation and chats that packages bring, nothing downloaded here.

Each heading of a documentation page becomes a user turn and the text below it the assistant's answer. Sections
that occur twice are left out, so that no engine's cache profits from repetition that real data would not have.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

DEFAULT_FOLDERS = (Path("/usr/share/doc"), Path("/usr/share/man"))

_SEED = 11
_MAX_SECTION_CHARACTERS = 4000
_TURN_PAIRS = (1, 2, 2, 3)  # user and assistant turns of a conversation, drawn from these
_HTML_HEADING = re.compile(r"<h[1-6][^>]*>(.*?)</h[1-6]>", re.S | re.I)
_HTML_TAG = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.S | re.I)
_RST_HEADING = re.compile(r"^(\S[^\n]{2,90})\n[=~^\"*+#.-]{3,}[ ]*$", re.M)
_MAN_HEADING = re.compile(r"^\.S[HS] +\"?([^\"\n]+)\"?$", re.M)
_MAN_MARKUP = re.compile(r"^\.\\\".*\n|^\.[A-Za-z]+ ?|\\f[A-Z]|\\&", re.M)
_BLANK_LINES = re.compile(r"[ \t]*\n\s*\n\s*")

Section = tuple[str, str]


def write_corpus(path: Path, size_bytes: int, folders: Iterable[Path] = DEFAULT_FOLDERS) -> int:
    """Write about `size_bytes` of JSONL, or as much as there is; returns the number of bytes."""
    draw = random.Random(_SEED)
    conversations = [*_chats(), *_dialogues(folders, draw, size_bytes)]
    draw.shuffle(conversations)
    written = 0
    with path.open("wb") as file:
        for messages in conversations:
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
            if written >= size_bytes:
                break
    return written


def _chats() -> Iterator[list[dict[str, str]]]:
    """Human chats of the PyPI package chitchat-dataset, where it is installed; a sender's run is one turn."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        return
    chats = json.loads((Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8"))
    for chat in chats.values():
        messages: list[dict[str, str]] = []
        for run in chat["messages"]:
            text = "\n".join(message["text"] for message in run)
            if text.strip():
                messages.append({"role": ("user", "assistant")[len(messages) % 2], "content": text})
        if len(messages) > 1:
            yield messages


def _dialogues(folders: Iterable[Path], draw: random.Random, size_bytes: int) -> Iterator[list[dict[str, str]]]:
    """Conversations of one to three sections; the pages are read in a drawn order until there is text enough."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    draw.shuffle(files)
    seen: set[bytes] = set()
    left = size_bytes
    for path in files:
        messages: list[dict[str, str]] = []
        pairs = draw.choice(_TURN_PAIRS)
        for heading, body in _sections(path):
            digest = hashlib.blake2b(body.encode(), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
            messages += ({"role": "user", "content": heading}, {"role": "assistant", "content": body})
            left -= len(heading) + len(body) + 80
            if len(messages) >= 2 * pairs:
                yield messages
                messages, pairs = [], draw.choice(_TURN_PAIRS)
        if messages:
            yield messages
        if left < 0:
            return


def _sections(path: Path) -> Iterator[Section]:
    """(heading, text) of a page in HTML, reStructuredText or troff, compressed or not; none of any other file."""
    name = path.name.removesuffix(".gz")
    is_page = name.endswith((".html", ".rst", ".txt", ".md")) or re.search(r"\.[1-8][a-z]*$", name)
    if not is_page or name.startswith("changelog"):
        return
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    if name.endswith(".html"):
        text = text.partition("<body")[2]
        parts = [html.unescape(_HTML_TAG.sub("", part)) for part in _HTML_HEADING.split(text)]
    elif name.endswith((".rst", ".txt", ".md")):
        parts = _RST_HEADING.split(text)
    else:
        parts = [_MAN_MARKUP.sub("", part) for part in _MAN_HEADING.split(text)]
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        heading = " ".join(heading.split()).removesuffix("¶")
        body = _BLANK_LINES.sub("\n\n", body).strip()
        for begin in range(0, len(body), _MAX_SECTION_CHARACTERS):
            if len(body) - begin > 40:
                yield heading or "?", body[begin : begin + _MAX_SECTION_CHARACTERS]
