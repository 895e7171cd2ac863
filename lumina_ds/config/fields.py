"""Every field of the configuration in words: type, bounds, default, meaning, short option. The schema is the only source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lumina_ds.config.choices import NameOf
from lumina_ds.config.options import SHORT_OPTIONS
from lumina_ds.config.schema import RunConfig, Section


@dataclass(frozen=True)
class FieldText:
    """One field, `name` dotted. `kind` is its type and bounds, choices without quotes."""

    name: str
    info: FieldInfo

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]

    @cached_property
    def choices(self) -> list[str]:
        """The values that it takes, where they are names."""
        return [name for mark in self.info.metadata if isinstance(mark, NameOf) for name in mark.names()]

    @property
    def values(self) -> list[str]:
        """The few values that it takes, where there are few: names, choices, true and false."""
        annotation = self.info.annotation
        if annotation is bool:
            return ["true", "false"]
        parts = [each for each in (annotation, *get_args(annotation)) if get_origin(each) is Literal]
        return self.choices or [str(value) for part in parts for value in get_args(part)]

    @property
    def kind(self) -> str:
        return self.kind_in("")

    def kind_in(self, quote: str) -> str:
        """The same with values in quotes."""
        quoted = [f"{quote}{name}{quote}" for name in self.choices]
        return ", ".join(quoted or [type_text(self.info.annotation, quote), *_bounds(self.info)])

    @property
    def default(self) -> Any:
        """Its value where nothing is said."""
        return self.info.get_default(call_default_factory=True)

    @property
    def default_text(self) -> str:
        if self.info.is_required():
            return "needed"
        return "unset" if self.default is None else value_text(self.default)

    @property
    def meaning(self) -> str:
        return self.info.description or self.key.replace("_", " ")

    @property
    def flag(self) -> str | None:
        """The short option that sets it."""
        return next((option.flag for option in SHORT_OPTIONS if option.field == self.name), None)


def sections(section: type[BaseModel] = RunConfig, name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted name, class) of every section, the whole with the name "" first."""
    yield name, section
    for field, info in section.model_fields.items():
        if is_section(info):
            assert isinstance(info.annotation, type)
            yield from sections(info.annotation, f"{name}.{field}" if name else field)


def fields_of(section: type[BaseModel], name: str = "") -> list[FieldText]:
    """The fields of one section, without those of sections in it."""
    prefix = f"{name}." if name else ""
    return [FieldText(f"{prefix}{field}", info) for field, info in section.model_fields.items() if not is_section(info)]


def all_fields() -> dict[str, FieldText]:
    """Every field of a run by its dotted name."""
    return {field.name: field for name, section in sections() for field in fields_of(section, name)}


def is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


def entry_of(info: FieldInfo) -> type[BaseModel] | None:
    """The class of a list's entries, where they have fields of their own."""
    inner = get_args(info.annotation)[:1] if get_origin(info.annotation) is list else ()
    # Annotated[Entry, ...]
    found = next((each for kind in inner for each in (kind, *get_args(kind))), None)
    found = next((each for each in get_args(found) if isinstance(each, type)), found)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def doc_of(section: type[BaseModel]) -> str:
    """What a section is for, on one line."""
    return " ".join((section.__doc__ or "").split())


def type_text(annotation: Any, quote: str = "") -> str:
    """A type in words: `whole number`, a list of choices, `text or unset`."""
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "unset"}
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) is Literal:
        return ", ".join(f"{quote}{value}{quote}" for value in get_args(annotation))
    if get_origin(annotation) is list:
        [inner] = get_args(annotation)
        return "list of texts" if inner is str else f"list of {type_text(inner, quote)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "entries"
    if get_origin(annotation) is Annotated:
        return type_text(get_args(annotation)[0], quote)
    parts = [type_text(part, quote) for part in get_args(annotation)]
    if not parts:
        raise TypeError(f"{annotation} has no words yet; add them to lumina_ds/config/fields.py")
    return " or ".join(part for part in parts if part != "unset")


def value_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounds(info: FieldInfo) -> list[str]:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = []
    for limit in info.metadata:
        found += [f"{words} {_number(getattr(limit, sign))}" for sign, words in signs.items() if hasattr(limit, sign)]
    return found


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
