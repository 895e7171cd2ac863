"""Text fields of the configuration that name an entry of a table.

The table is the only list of the names: whoever adds an entry to it, from outside this package too, has added a value
that the field takes. What will never be added to is a Literal in schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from lumina_ds.text import nearest


@dataclass(frozen=True, eq=False)
class NameOf:
    """In Annotated[str, NameOf(TABLE)]: the text must be a key of the table, or one of the words `besides`, or the name of
    a file that ends in `suffix`."""

    table: Mapping[str, Any]
    besides: tuple[str, ...] = ()
    suffix: str | None = None

    def names(self) -> list[str]:
        return [*self.besides, *self.table]

    def check(self, name: str) -> str:
        """The name itself; pydantic's error with all names, and the nearest one, where it is none of them."""
        names = self.names()
        if name in names or (self.suffix and name.endswith(self.suffix)):
            return name
        if self.suffix:
            names = [*names, f"FILE{self.suffix}"]
        *most, last = (f"'{each}'" for each in names)
        raise PydanticCustomError(
            "unknown_name",
            "Input should be {expected}{hint}",
            {"expected": f"{', '.join(most)} or {last}" if most else last, "hint": nearest(name, names)},
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choice = {"enum": self.names()}
        if self.suffix:
            return {**handler(schema), "anyOf": [choice, {"pattern": f"{re.escape(self.suffix)}$"}]}
        return {**handler(schema), **choice}
