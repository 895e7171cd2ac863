"""Rules about tools: calls of what is defined, with arguments that the tool's JSON schema allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lumina_ds.data.turns import Conversation, ToolCall
from lumina_ds.report.data.visible import excerpt
from preprocess.validation.rules import INVALID_SCHEMA, UNDEFINED_TOOL, WRONG_ARGUMENTS, Fault


def tool_faults(conversation: Conversation) -> Iterator[Fault]:
    """Every call that breaks a rule. Dangling ids are no warnings: parse_conversation() refuses them."""
    if not any(turn.tool_calls for turn in conversation.turns):
        return
    tools = {json.loads(tool)["function"]["name"]: tool for tool in conversation.tools}
    broken: set[str] = set()
    for number, turn in enumerate(conversation.turns, 1):
        for call in turn.tool_calls:
            where = f"turn {number} calls {call.name}"
            if call.name not in tools:
                defined = f"; defined: {', '.join(tools)}" if tools else "; no tool is defined"
                yield Fault(UNDEFINED_TOOL, f"{where}{defined}", excerpt(_shown(call)))
                continue
            validator = _validator(tools[call.name])
            if isinstance(validator, str):
                if call.name not in broken:
                    yield Fault(INVALID_SCHEMA, f"{call.name}: {validator}", excerpt(tools[call.name]))
                broken.add(call.name)
                continue
            if fault := _fault_of(validator, call):
                yield Fault(WRONG_ARGUMENTS, f"{where}: {fault}", excerpt(_shown(call)))


def _fault_of(validator: Any, call: ToolCall) -> str | None:
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(validator.iter_errors(json.loads(call.arguments)))
    except (Unresolvable, RecursionError) as fault:
        return f"its schema cannot be followed: {type(fault).__name__}"
    if error is None:
        return None
    place = ".".join(map(str, error.absolute_path))
    return f"{place}: {error.message}" if place else str(error.message)


@lru_cache(maxsize=1000)
def _validator(tool: str) -> Any:
    """What checks arguments of a definition, or why its schema is none. Nothing is fetched for a schema."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = json.loads(tool)["function"].get("parameters")
    if schema is None:
        schema = {}
    if not isinstance(schema, (dict, bool)):
        return "'parameters' is no JSON schema"
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        return str(getattr(error, "message", "its schema is too deep"))
    return kind(schema, registry=Registry())


def _shown(call: ToolCall) -> str:
    return f"{call.name} {call.arguments}"
