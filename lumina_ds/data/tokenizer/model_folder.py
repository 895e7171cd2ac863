"""What stands beside a tokenizer in a model's folder, as transformers reads it: chat template, named special tokens.

chat_template.jinja                         the template; counts before the one in tokenizer_config.json
tokenizer_config.json                       chat_template, bos_token, eos_token, ...
chat_template.json                          older folders of models with pictures have the template there
special_tokens_map.json                     older folders have the names there
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lumina_ds.errors import DataError
from lumina_ds.text import with_article

TEMPLATE_FILE = "chat_template.jinja"
# Folders that Lumina DS writes have a file of this name too, with other keys.
LEGACY_FILE = "chat_template.json"
CONFIG_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
# What a template may ask for by name.
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of several templates in one file, the one that is used where nobody asks for another.
_DEFAULT = "default"


def read_chat_template(folder: Path) -> str | None:
    """The folder's own chat template, or None. Raises DataError for a file that cannot be read, or none to choose."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return _read_text(path)
    found = _read_json(folder / CONFIG_FILE).get("chat_template")
    if found is None:
        return legacy_template(folder / LEGACY_FILE)
    if isinstance(found, str):
        return found
    entries = found if isinstance(found, list) else [found]
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    chosen = named.get(_DEFAULT)
    if not isinstance(chosen, str):
        raise DataError(
            f"{folder / CONFIG_FILE} has chat templates {sorted(map(str, named))} and none of the name {_DEFAULT}; "
            f"write the one to use into {path}"
        )
    return chosen


def legacy_template(path: Path) -> str | None:
    """The template in a chat_template.json that transformers wrote; None where there is none, or it is ours."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # who reads it as one of ours says what is wrong
    source = document.get("chat_template") if isinstance(document, dict) else None
    return source if isinstance(source, str) and "format" not in document else None


def read_token_names(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... and the special tokens that they name."""
    names: dict[str, str] = {}
    for file in (NAMES_FILE, CONFIG_FILE):  # the latter counts
        entries = _read_json(folder / file)
        for key in TOKEN_NAMES:
            value = entries.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                names[key] = content
    return names


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; take it from its source again, or remove it") from None
    if not isinstance(document, dict):
        raise DataError(
            f"{path} is {with_article(type(document).__name__)}, not an object; take it from its source again"
        )
    return document


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; take it from its source again") from None
