"""The chat templates: which special tokens stand before and after the content of each turn.

To add one, add an entry to TEMPLATES; `data.chat_template` then takes its name, and preprocessing, labels, generation and
the checks of shards and checkpoints follow the entry. Templates of other models are Jinja: files of templates/ by their
names, or a user's own; lumina_ds/data/templates/ renders them and proves their masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lumina_ds.errors import ConfigError
from lumina_ds.text import nearest

ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_MARKER = "<|end|>"


@dataclass(frozen=True)
class ChatTemplate:
    """One template: [BOS] (before, content, after) per turn, the content encoded on its own and unaltered.

    before, after: role -> special tokens, of ROLE_MARKERS and END_MARKER. The last one before a content is the marker of
        its role, which stands nowhere else, so that ids alone tell whose turn it is. The first one after an assistant's
        content ends a reply. Label tokens are a trained turn's content and what stands after it.
    bos: whether BOS begins a conversation, where the tokenizer has one.
    """

    before: Mapping[str, tuple[str, ...]]
    after: Mapping[str, tuple[str, ...]]
    bos: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for an entry from which no ids, or ids of two meanings, would be made."""
        for name, tokens in (("before", self.before), ("after", self.after)):
            if set(tokens) != set(ROLE_MARKERS):
                raise ValueError(f"{name} has {', '.join(tokens) or 'no role'}; give each of {', '.join(ROLE_MARKERS)}")
        for role, marker in ROLE_MARKERS.items():
            *others, last = self.before[role] or ("nothing",)
            if last != marker or not {*others, *self.after[role]} <= {END_MARKER}:
                raise ValueError(
                    f"{' '.join(self.before[role])} (content of {role}) {' '.join(self.after[role])}: the last token before "
                    f"a content is {marker}, and the others are {END_MARKER}"
                )
        if not self.after["assistant"]:
            raise ValueError("nothing stands after the assistant's content, so no reply would end")

    def around(self, role: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The special tokens before and after a piece of data/rendering.py.

        Definitions of tools and results stand behind two role tokens, which no other turn does. A text for continued
        pretraining has no header; its end is the one of a reply.
        """
        if role == "text":
            return (), (self.end_token,)
        speaker = {"tool": "user", "tools": "system"}.get(role, role)
        before = self.before[speaker]
        if role != speaker:
            before = (*before[:-1], ROLE_MARKERS["system"], before[-1])
        return before, self.after[speaker]

    @property
    def end_token(self) -> str:
        """Name of the token that ends a reply."""
        return self.after["assistant"][0]


DEFAULT_TEMPLATE = "lumina-chat-1"
TEMPLATES: dict[str, ChatTemplate] = {
    DEFAULT_TEMPLATE: ChatTemplate(
        before={role: (marker,) for role, marker in ROLE_MARKERS.items()},
        after=dict.fromkeys(ROLE_MARKERS, (END_MARKER,)),
    ),
}


ALIASES = {"lumina": DEFAULT_TEMPLATE}
# What the tokenizer's folder brings.
AUTO_TEMPLATE = "auto"
TEMPLATE_SUFFIX = ".jinja"
_JINJA_FILES = {path.stem: path for path in sorted(Path(__file__).with_name("templates").glob(f"*{TEMPLATE_SUFFIX}"))}
# Words that name a template beside the keys of TEMPLATES.
OTHER_TEMPLATES = (*ALIASES, *_JINJA_FILES, AUTO_TEMPLATE)


def jinja_source(name: str) -> str | None:
    """Source of the Jinja template that comes with the package under `name`; None where there is none."""
    path = _JINJA_FILES.get(name)
    # The line end belongs to the file.
    return None if path is None else path.read_text(encoding="utf-8").removesuffix("\n")


def template_named(name: str) -> ChatTemplate:
    """The entry of that name or alias; ConfigError where there is none."""
    name = ALIASES.get(name, name)
    if name not in TEMPLATES:
        raise ConfigError(
            f"there is no chat template {name}{nearest(name, list(TEMPLATES))}; use {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def template_digest(name: str) -> str:
    """SHA-256 of the name and the content of an entry: shards made under another template are never taken for its own."""
    name = ALIASES.get(name, name)
    template = template_named(name)
    layout = f"{'bos ' if template.bos else ''}(role content end)*; trained: assistant content end"
    before = [" ".join(template.before[role]) for role in ROLE_MARKERS]
    after = [" ".join(template.after[role]) for role in ROLE_MARKERS]
    # One end for all roles is one line: so the digest of the first template stays what it was before there was a table.
    lines = [name, layout, *ROLE_MARKERS, *before, *(after[:1] if len(set(after)) == 1 else after)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def name_of_digest(digest: str) -> str | None:
    """Name of the entry with that digest; None where it is unknown here."""
    return next((name for name in TEMPLATES if template_digest(name) == digest), None)
