"""From the name of a chat template and a tokenizer to a template that is proven for it, and back from folders.

A folder of shards, of a run, a step or an import that has a Jinja template holds it in chat_template.json, with all that
its ids depend on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from lumina_ds.config.chat_templates import (
    ALIASES,
    AUTO_TEMPLATE,
    DEFAULT_TEMPLATE,
    END_MARKER,
    OTHER_TEMPLATES,
    TEMPLATE_SUFFIX,
    TEMPLATES,
    ChatTemplate,
    jinja_source,
    name_of_digest,
    template_digest,
)
from lumina_ds.data.tokenizer.model_folder import CONFIG_FILE, LEGACY_FILE, legacy_template
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.text import nearest

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # imported where a template is no entry of the table: most runs need none of it
    from lumina_ds.data.templates.jinja_template import JinjaTemplate
    from lumina_ds.data.tokenizer.tokenizer import Tokenizer

STORED_TEMPLATE = LEGACY_FILE
_MOST_BYTES = 4 << 20

Template: TypeAlias = "ChatTemplate | JinjaTemplate"


@dataclass(frozen=True)
class NamedTemplate:
    """A template, its name, and the digest by which shards and checkpoints know it."""

    name: str
    template: Template

    @property
    def digest(self) -> str:
        return template_digest(self.name) if isinstance(self.template, ChatTemplate) else self.template.digest

    @property
    def certificate(self) -> str | None:
        return None if isinstance(self.template, ChatTemplate) else self.template.certificate


def certified_template(name: str, tokenizer: Tokenizer) -> NamedTemplate:
    """The template that `data.chat_template` names. Raises DataError where its masks cannot be proven, or where there
    is no such file; ConfigError for a name that is none."""
    found = find_template(name, tokenizer)
    if isinstance(found.template, ChatTemplate):
        return found
    from lumina_ds.data.templates.certificate import certify

    return replace(found, template=certify(found.template, tokenizer).certified(str(tokenizer.path)))


def find_template(name: str, tokenizer: Tokenizer) -> NamedTemplate:
    """As certified_template, before anything is proven of it."""
    name = ALIASES.get(name, name)
    if name in TEMPLATES:
        return NamedTemplate(name, TEMPLATES[name])
    folder = tokenizer.path.parent
    if name == AUTO_TEMPLATE:
        stored = read_template(folder)
        if stored is not None:
            return NamedTemplate(stored.name, stored)
        brought = tokenizer.chat_template
        if brought is None or is_own(brought.source):
            return NamedTemplate(DEFAULT_TEMPLATE, TEMPLATES[DEFAULT_TEMPLATE])
        if brought.others:
            _say_which(brought.place, ", ".join(brought.others))
        made = jinja_template(name, brought.source, tokenizer)
        return NamedTemplate(name, replace(made, for_tools=brought.for_tools))
    else:
        source = jinja_source(name)
        if source is None:
            path = Path(name)
            if path.suffix != TEMPLATE_SUFFIX and not path.is_file():
                names = [*OTHER_TEMPLATES, *TEMPLATES]
                raise ConfigError(
                    f"there is no chat template {name}{nearest(name, names)}; use {', '.join(names)} or a file"
                )
            source, name = _text(path), path.name
    return NamedTemplate(name, jinja_template(name, source, tokenizer))


def jinja_template(name: str, source: str, tokenizer: Tokenizer) -> JinjaTemplate:
    """The template of `source` with the special tokens that the files beside the tokenizer name."""
    from lumina_ds.data.templates.jinja_template import JinjaTemplate
    from lumina_ds.data.templates.render import DATE_FUNCTION, today

    special_tokens = _special_tokens(tokenizer)
    _try(name, source, special_tokens, written_here=jinja_source(name) is not None)
    config = tokenizer.path.parent / CONFIG_FILE
    return JinjaTemplate(
        name=name,
        source=source,
        special_tokens=tuple(sorted(special_tokens.items())),
        day=today() if DATE_FUNCTION in source else None,
        tokenizer_config=_text(config) if config.is_file() else None,
    )


def _try(name: str, source: str, special_tokens: Mapping[str, str], written_here: bool) -> None:
    """Raises DataError where the template does not end, or cannot be compiled."""
    from lumina_ds.data.templates.render import check_source
    from lumina_ds.data.templates.trial import try_elsewhere

    if not written_here:
        try_elsewhere(name, source, special_tokens)
    check_source(source, name)


@lru_cache(maxsize=32)
def _say_which(taken: str, others: str) -> None:
    """Once for each folder."""
    log.warning(
        "of several chat templates the one of %s is taken, not %s; --chat-template FILE.jinja takes another",
        taken,
        others,
    )


def is_own(source: str) -> bool:
    """Is it what an export of ours writes for lumina-chat-1? No other template holds such a code point."""
    from lumina_ds.data.templates.text_ids import GUARDS

    return GUARDS[0] in source


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int = 1
    name: str
    source: str
    special_tokens: dict[str, str]
    day: str | None
    stops: list[str]
    ends_with_next: bool
    rewrites: bool
    certificate: str | None
    tokenizer_config: str | None
    for_tools: str = ""


def stored_text(template: JinjaTemplate) -> str:
    """The content of chat_template.json."""
    values = {name: getattr(template, name) for name in _Stored.model_fields if name != "format"}
    stored = _Stored(**{**values, "special_tokens": dict(template.special_tokens), "stops": list(template.stops)})
    return (
        json.dumps(
            stored.model_dump(exclude={"for_tools"} if not stored.for_tools else None), ensure_ascii=False, indent=2
        )
        + "\n"
    )


def read_template(folder: Path) -> JinjaTemplate | None:
    """The template in a folder's chat_template.json; None where there is none. Raises DataError."""
    path = folder / STORED_TEMPLATE
    if not path.is_file() or legacy_template(path) is not None:
        return None
    try:
        stored = _Stored.model_validate_json(_text(path))
    except ValidationError:
        raise DataError(f"{path} is damaged or of another version; preprocess or import again") from None
    # Folders come from elsewhere too, and a name proves nothing.
    _try(str(path), stored.source, stored.special_tokens, written_here=stored.source == jinja_source(stored.name))
    from lumina_ds.data.templates.jinja_template import JinjaTemplate

    values = stored.model_dump(exclude={"format"})
    values |= {"special_tokens": tuple(sorted(stored.special_tokens.items())), "stops": tuple(stored.stops)}
    return JinjaTemplate(**values)


def is_same(made: NamedTemplate, name: str) -> bool:
    """Does `name`, of a table or a file, stand for the template that something was made with?"""
    if isinstance(made.template, ChatTemplate):
        return made.name == ALIASES.get(name, name)
    if name in TEMPLATES:
        return False
    return made.template.source == (jinja_source(name) or _text(Path(name)))


def tokenizer_for(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """The tokenizer as the template needs it: a model's own has no use for our markers."""
    return tokenizer if isinstance(template, ChatTemplate) else _without_markers(tokenizer)


@lru_cache(maxsize=4)
def _without_markers(tokenizer: Tokenizer) -> Tokenizer:
    """One object for each, by which its other readers are found again."""
    return tokenizer.without_markers() if tokenizer.role_ids else tokenizer


def template_of(folder: Path, digest: str) -> NamedTemplate | None:
    """The template with that digest, from the table or the folder; None where neither has it. Raises DataError."""
    name = name_of_digest(digest)
    if name is not None:
        return NamedTemplate(name, TEMPLATES[name])
    stored = read_template(folder)
    return NamedTemplate(stored.name, stored) if stored is not None and stored.digest == digest else None


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token and the like: as the files beside the tokenizer say, or the SentencePiece model itself."""
    names = tokenizer.token_names
    if names or tokenizer.file_name != "tokenizer.model":
        return names
    ends = [name for name in ("</s>", END_MARKER) if name in tokenizer.special_tokens]
    begins = {} if tokenizer.bos_id is None else {"bos_token": tokenizer.piece(tokenizer.bos_id)}
    return {**begins, "eos_token": ends[0]} if ends else begins


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} is larger than {_MOST_BYTES >> 20} MiB, too large for a chat template")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a chat template's file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save it so") from None
