"""What stands beside a tokenizer in a model's folder, as transformers reads it: chat template, named special tokens.

chat_template.jinja                         the template; counts before the one in tokenizer_config.json
additional_chat_templates/NAME.jinja        others; tool_use is the one for conversations with tools
tokenizer_config.json                       chat_template (one, or a list of {name, template}), bos_token, eos_token, ...
chat_template.json                          older folders of models with pictures have the template there
special_tokens_map.json                     older folders have the names there
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lumina_ds.errors import DataError
from lumina_ds.foreign_files import shorten
from lumina_ds.text import with_article

TEMPLATE_FILE = "chat_template.jinja"
# Folders that Lumina DS writes have a file of this name too, with other keys.
LEGACY_FILE = "chat_template.json"
CONFIG_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
# What a template may ask for by name.
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Beside the first, newer folders of several templates have the others here.
OTHERS_FOLDER = "additional_chat_templates"
# Of several templates, the one that is used where nobody asks for another, and the one for conversations with tools.
_DEFAULT, _FOR_TOOLS = "default", "tool_use"


class FolderTemplate(NamedTuple):
    """A folder's chat template for where nobody asks for another.

    place: its file, and its name among several there. others: such places of other templates in the folder.
    for_tools: the one of these that transformers takes for conversations with tools, "" where there is none.
    """

    source: str
    place: str
    others: tuple[str, ...] = ()
    for_tools: str = ""


def read_chat_template(folder: Path) -> FolderTemplate | None:
    """The folder's own chat template, or None. Raises DataError for a file that cannot be read, or none to choose."""
    found = _files(folder)
    config = folder / CONFIG_FILE
    entry = _read_json(config).get("chat_template")
    # Where there are files, transformers looks at no other.
    is_read = not found or (isinstance(entry, str) and entry.strip())
    listed = _listed(config, entry, folder / TEMPLATE_FILE) if is_read else {}
    named = found or listed
    if not named:
        source = legacy_template(folder / LEGACY_FILE)
        return None if source is None else FolderTemplate(source, str(folder / LEGACY_FILE))
    if _DEFAULT not in named:
        where = ", ".join(place for place, _ in named.values())
        raise DataError(
            f"{where}: no chat template of the name {_DEFAULT}; write the one to use into {folder / TEMPLATE_FILE}, or "
            "name its file with --chat-template FILE.jinja"
        )
    place, source = named[_DEFAULT]
    every = [*found.values(), *listed.values()]
    others = dict.fromkeys(other for other, text in every if text != source)
    return FolderTemplate(source, place, tuple(others), named[_FOR_TOOLS][0] if _FOR_TOOLS in named else "")


def _files(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> (place, source) of the templates in files of their own."""
    default = {_DEFAULT: folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    paths = default | {path.stem: path for path in sorted((folder / OTHERS_FOLDER).glob("*.jinja"))}
    read = {name: (str(path), _read_text(path)) for name, path in paths.items()}
    empty = next((place for place, source in read.values() if not source.strip()), None)
    if empty is not None:
        raise DataError(f"{empty} is empty; write a chat template into it, or remove it")
    return read


def _listed(config: Path, entry: Any, remedy: Path) -> dict[str, tuple[str, str]]:
    """Name -> (place, source) of the templates that tokenizer_config.json holds: one, or a list of named ones."""
    if entry is None:
        return {}
    entries = [{"name": _DEFAULT, "template": entry}] if isinstance(entry, str) else entry
    if isinstance(entry, dict):
        entries = [{"name": name, "template": source} for name, source in entry.items()]
    named: dict[str, tuple[str, str]] = {}
    for each in entries if isinstance(entries, list) else ():
        name, source = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(source, str) and source.strip()) or name in named:
            break
        named[name] = (str(config) if isinstance(entry, str) else f"{config} ({name})", source)
    if not named or len(named) < len(entries):
        raise DataError(
            f"{config}: chat_template is {shorten(json.dumps(entry))[1:-1]}, neither a template nor a list of templates, each "
            f"with a name of its own; write the template into {remedy}, or name its file with --chat-template FILE.jinja"
        )
    return named


def legacy_template(path: Path) -> str | None:
    """The template in a chat_template.json that transformers wrote; None where there is none, or it is ours."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # who reads it as one of ours says what is wrong
    source = document.get("chat_template") if isinstance(document, dict) else None
    is_theirs = isinstance(source, str) and source.strip() and "format" not in document
    return source if is_theirs else None


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
