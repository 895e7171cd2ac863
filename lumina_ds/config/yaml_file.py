"""The one reader and writer of YAML: configurations, mixtures, presets, and what a run or an import wrote.

Such a file may come from anybody, so its bytes, its depth, and its values with every alias and merge key written out are
bounded before anything is built. Plain words mean what YAML 1.2 says: `1e-4` is a number, `on` and `1:30` are text. What
the versions of YAML read differently, or only one program understands, is refused with its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lumina_ds.errors import ConfigError
from lumina_ds.foreign_files import ForeignFileError, read_bounded
from lumina_ds.text import shortened

MAX_YAML_BYTES = 1 << 20
# A few lines of aliases of aliases would fill any memory; the largest file of ours has some hundreds of values.
MAX_YAML_VALUES = 20_000
MAX_YAML_DEPTH = 32

_PREFIX = "tag:yaml.org,2002:"
_PLAIN = "plain"
_TAGS = ("str", "int", "float", "bool", "null", "seq", "map")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0o_*[0-7][0-7_]*|0b_*[01][01_]*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]|[0-9][0-9_]*(?=[.eE]))[0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF|nan|NaN|NAN)")
_OCTAL_TO_SOME = re.compile(r"[-+]?0[0-9_]+")
_MOST_DIGITS = 400
_UNREADABLE = yaml.reader.Reader.NON_PRINTABLE


@dataclass(frozen=True)
class YamlFile:
    """What a file holds, and where: `places` are the offsets in `text` of every entry by its dotted name."""

    path: Path
    values: dict[str, Any]
    text: str = field(repr=False)
    places: Mapping[str, int] = field(repr=False)

    def place(self, name: str) -> str:
        """Line, column and the line itself of a dotted name, or of what holds it; empty where it is not from here."""
        while name and name not in self.places:
            name = name.rpartition(".")[0]
        return _place(self.text, self.places[name]) if name else ""


class _Fault(Exception):
    """What is wrong, and at which offset of the text."""

    def __init__(self, problem: str, offset: int) -> None:
        super().__init__(problem)
        self.offset = offset


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one. ConfigError with the line of what is wrong."""
    return read_yaml_file(path).values


def read_yaml_file(path: Path) -> YamlFile:
    """The same with the places of its entries."""
    text = read_text(path)
    try:
        root = _compose(text)
        if root is None or _is_null(root):
            return YamlFile(path, {}, text, {})
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
            raise ConfigError(f"{path} holds {kind}, not a mapping of sections, at {_place(text, _offset(root))}")
        builder = _Builder()
        return YamlFile(path, builder.mapping(root, ""), text, builder.places)
    except _Fault as fault:
        raise ConfigError(f"{path} is not valid YAML: {fault}, at {_place(text, fault.offset)}") from None


def yaml_text(values: Mapping[str, Any]) -> str:
    """YAML that read_yaml reads as the same values: texts that look like numbers are quoted."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def parse_yaml_value(text: str) -> Any:
    """The value that a text stands for in YAML, as one types it on a command line. ValueError where it is no YAML."""
    if len(text) > MAX_YAML_BYTES:
        raise ValueError("the text is too long")
    try:
        root = _compose(text)
        return None if root is None else _Builder().value(root, "")
    except _Fault as fault:
        raise ValueError(str(fault)) from None


def read_text(path: Path) -> str:
    """The text of a configuration in UTF-8, of YAML or JSON, with line ends of one kind; ConfigError for anything else."""
    content = _content(path)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it in that encoding"
        ) from error


def _content(path: Path) -> bytes:
    """The bytes of a plain file; what ends never, or is too large, is refused unread."""
    try:
        return read_bounded(path, MAX_YAML_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ForeignFileError as error:
        raise ConfigError(f"{path} {error}; give a file of settings") from None


def _compose(text: str) -> yaml.Node | None:
    """The tree of nodes of a text, in which aliases stay shared; bounded in every way."""
    if unreadable := _UNREADABLE.search(text):
        raise _Fault(f"character U+{ord(unreadable[0]):04X} stands in it; remove it", unreadable.start())
    loader = _Composer(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _explained(error, text) from None
    except (ValueError, OverflowError):
        raise _Fault("an escape there stands for no character", loader.index) from None
    if root is not None:
        _measure(root, {})
    return root


def _explained(error: yaml.MarkedYAMLError, text: str) -> _Fault:
    mark = error.problem_mark or error.context_mark
    if mark is not None and error.context_mark is not None and not text[mark.index :].strip():
        mark = error.context_mark  # what was begun there has no end
    offset = 0 if mark is None else mark.index
    if text[offset : offset + 1] == "\t":
        return _Fault("a tab stands where YAML wants spaces; write spaces", offset)
    if error.problem == "but found another document":
        return _Fault("a second document begins; keep one in a file", offset)
    problem = f"{error.problem} {error.context}" if error.context else str(error.problem)
    return _Fault(shortened(" ".join(problem.split()), 200), offset)


class _Dumper(yaml.SafeDumper):
    """Takes more words for numbers than YAML 1.1 does."""


for _pattern in (_INTEGER, _FLOAT, _OCTAL_TO_SOME):
    _Dumper.add_implicit_resolver("!number", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789"))


class _Composer(yaml.SafeLoader):
    """PyYAML's parser up to the nodes, with a limit of depth and number; the meaning of plain words is left open."""

    num_nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.num_nodes += 1
        self.depth += 1
        event = self.peek_event()
        offset = event.start_mark.index
        if getattr(event, "tag", None) == "!":
            raise _Fault("tag ! is not taken; quote a text, or remove it", offset)
        if self.depth > MAX_YAML_DEPTH:
            raise _Fault(f"it is nested deeper than {MAX_YAML_DEPTH} levels", offset)
        if self.num_nodes > MAX_YAML_VALUES:
            raise _Fault(f"it holds above {MAX_YAML_VALUES} values", offset)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit is not None and implicit[0] else f"{_PREFIX}str"
        return f"{_PREFIX}{'seq' if kind is yaml.SequenceNode else 'map'}"


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, depth) with every alias written out; each node is visited once. One that holds itself has no end."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) not in known:
        known[id(node)] = (MAX_YAML_VALUES + 1, 1)
        parts = [_measure(part, known) for part in _parts(node)]
        values = 1 + sum(count for count, _ in parts)
        depth = 1 + max((depth for _, depth in parts), default=0)
        if values > MAX_YAML_VALUES:
            raise _Fault(
                f"it holds above {MAX_YAML_VALUES} values once its aliases are written out; remove them", _offset(node)
            )
        if depth > MAX_YAML_DEPTH:
            raise _Fault(f"it is nested deeper than {MAX_YAML_DEPTH} levels with its aliases", _offset(node))
        known[id(node)] = (values, depth)
    return known[id(node)]


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    for part in node.value:
        yield from part if isinstance(part, tuple) else (part,)


class _Builder:
    """Makes values of measured nodes, and notes where each stands."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def value(self, node: yaml.Node, name: str) -> Any:
        """The value of a node whose dotted name is `name`."""
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, f"{name}.")
        _check_tag(node, "seq")
        for number, part in enumerate(node.value):
            self.places[f"{name}.{number}"] = _offset(part)
        return [self.value(part, f"{name}.{number}") for number, part in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        """Keys are taken as text. What `<<` merges gives way to the mapping's own keys."""
        _check_tag(node, "map")
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Fault("a key must be a word", _offset(key_node))
            if key_node.value in entries:
                raise _Fault(f"key {shortened(repr(key_node.value))} stands twice; remove one", _offset(key_node))
            entries[key_node.value] = key_node, value_node
        merged: dict[str, Any] = {}
        if "<<" in entries and entries["<<"][0].tag == _PLAIN:
            for source in self._merged(entries.pop("<<")[1]):
                merged = self.mapping(source, prefix) | merged
        for key, (key_node, value_node) in entries.items():
            self.places[prefix + key] = _offset(key_node)
            merged[key] = self.value(value_node, prefix + key)
        return merged

    def _merged(self, node: yaml.Node) -> list[yaml.MappingNode]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise _Fault("<< merges mappings, and this is none", _offset(node))
        return list(sources)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and _scalar(node) is None


def _check_tag(node: yaml.Node, *kinds: str) -> None:
    if node.tag.removeprefix(_PREFIX) not in kinds:
        shown = shortened(node.tag.replace(_PREFIX, "!!"))
        taken = ", ".join(f"!!{tag}" for tag in _TAGS)
        raise _Fault(f"tag {shown} does not fit its value, or is none of {taken}; remove it", _offset(node))


def _scalar(node: yaml.ScalarNode) -> Any:
    if re.search("[\ud800-\udfff]", node.value):
        raise _Fault("half of a surrogate pair stands for no character; write the character itself", _offset(node))
    if node.tag == f"{_PREFIX}str":
        return node.value
    value = _plain(node)
    if node.tag == _PLAIN:
        return value
    kind = "null" if value is None else type(value).__name__
    if node.tag == f"{_PREFIX}float" and kind == "int":
        return float(value)
    _check_tag(node, *({kind} - {"str"}))
    return value


def _plain(node: yaml.ScalarNode) -> Any:
    """The meaning of a word without quotes."""
    word: str = node.value
    if word in _WORDS:
        return _WORDS[word]
    if _OCTAL_TO_SOME.fullmatch(word):
        raise _Fault(
            f"{shortened(word)} begins with 0, which some read as octal; write 0o17 or 15, or quote a text",
            _offset(node),
        )
    is_integer = bool(_INTEGER.fullmatch(word))
    if not is_integer and not _FLOAT.fullmatch(word):
        return float(word.replace(".", "", 1)) if _NOT_FINITE.fullmatch(word) else word
    digits = word.replace("_", "")
    if len(digits) > _MOST_DIGITS:
        raise _Fault(f"a number of {len(digits)} digits is beyond any use; quote a text", _offset(node))
    if is_integer:
        return int(digits, 0)
    number = float(digits)
    if math.isinf(number) or (number == 0 and re.search("[1-9]", re.split("[eE]", digits)[0])):
        raise _Fault(
            f"{shortened(word)} is beyond the range of a number; write one between 1e-307 and 1e308", _offset(node)
        )
    return number


def _offset(node: yaml.Node) -> int:
    return int(node.start_mark.index)


def _place(text: str, offset: int) -> str:
    """`line 3, column 5: '  seed: x'`, as an editor counts."""
    begin = text.rfind("\n", 0, offset) + 1
    end = text.find("\n", offset)
    line = text[max(begin, offset - 60) : end if end >= 0 else len(text)]
    return f"line {text.count(chr(10), 0, offset) + 1}, column {offset - begin + 1}: {shortened(repr(line))}"
