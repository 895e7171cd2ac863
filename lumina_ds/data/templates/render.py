"""Chat templates of Hugging Face models: Jinja text and messages to the text that transformers renders.

The environment has what transformers gives its templates: the sandbox that changes nothing, break and continue in
loops, `tojson` without escaping, `raise_exception`, `strftime_now`, `dict`, `namespace`, and the `generation` tag, whose
body is written as it stands. Messages come as transformers passes them on: keys without a value are left out, and
reasoning stands under the names that templates read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from lumina_ds.data.templates.leaves import Message, all_texts
from lumina_ds.errors import ConfigError, DataError

# Names under which a turn's reasoning is found, and the two under which templates look for it.
_REASONING = ("reasoning_content", "thinking", "reasoning")
DATE_FUNCTION = "strftime_now"


# A rendering holds its conversation a few times at most, and what the template says beside it.
MOST_CHARACTERS, _TIMES_AS_MANY = 1_000_000, 20


class TemplateRefusal(Exception):
    """The template itself refused the messages, or could not be run on them."""


class TemplateWithoutEnd(TemplateRefusal):
    """The template computes or writes more than the messages can need: it is not fit for use."""


def render(
    source: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    day: str | None = None,
) -> str:
    """The text of `messages` under the template `source`.

    special_tokens: what the template knows as `bos_token`, `eos_token` and the like. day: year-month-day that
    `strftime_now` tells; today's when None. Raises TemplateRefusal, DataError for a source that is no template.
    """
    from lumina_ds.data.templates.work import TooMuchWork

    num_characters = sum(map(len, all_texts([messages, tools or ()])))
    try:
        template = compiled(source, day)
        with template.environment.lock:
            template.environment.work.begin(num_characters)
            text: str = template.render(
                messages=[_as_passed(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
    except TooMuchWork as error:
        raise TemplateWithoutEnd(str(error)) from None
    except RecursionError:
        raise TemplateRefusal("it calls itself too deeply") from None
    except Exception as error:  # whatever a template's own expressions raise: the sandbox's, TypeError, KeyError ...
        raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error
    if len(text) > MOST_CHARACTERS + _TIMES_AS_MANY * num_characters:
        raise TemplateWithoutEnd(f"writes {len(text):,} characters for a conversation of {len(messages)} turns")
    return text


def check_source(source: str, name: str) -> None:
    """Raise DataError, with the line, for a source that is no Jinja template."""
    from jinja2 import TemplateSyntaxError

    try:
        compiled(source, None)
    except TemplateSyntaxError as error:
        raise DataError(f"{name}, line {error.lineno}: {error.message}; mend the template") from None
    except RecursionError:
        raise DataError(f"{name} is nested too deeply to be a chat template") from None
    except (
        SyntaxError,
        ValueError,
    ) as error:  # of Python, which jinja2 makes of it, or of a text that cannot be written
        message = getattr(error, "msg", None) or " ".join(str(error).split())
        raise DataError(f"{name} cannot be compiled: {message}; mend the template") from None


def today() -> str:
    """Year-month-day that templates with a date are rendered with: SOURCE_DATE_EPOCH's where that is set.

    Raises ConfigError where that is no date."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        now = datetime.fromtimestamp(int(fixed), timezone.utc) if fixed else datetime.now()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"SOURCE_DATE_EPOCH is {fixed!r}, no date; set it to seconds since 1970, or unset it"
        ) from None
    return f"{now:%Y-%m-%d}"


@lru_cache(maxsize=16)
def compiled(source: str, day: str | None) -> Any:
    """The template of jinja2."""
    environment = _environment()
    environment.globals[DATE_FUNCTION] = _clock(day)
    with environment.lock:
        environment.work.begin(len(source))
        return environment.from_string(source)


def _clock(day: str | None) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        return (datetime.now() if day is None else datetime.fromisoformat(day)).strftime(form)

    return strftime_now


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols

    from lumina_ds.data.templates.work import Sandbox

    class GenerationTag(Extension):
        """{% generation %} marks what an assistant writes; masks here are proven without it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def by_chance(*_: object, **__: object) -> None:
        raise TemplateError("it writes what chance decides, so a mask proves nothing of the next rendering")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.filters["random"] = environment.globals["lipsum"] = by_chance
    environment.count_all()
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _as_passed(message: Message) -> dict[str, Any]:
    passed = {key: value for key, value in message.items() if value is not None}
    reasoning = next((passed[key] for key in _REASONING if key in passed), None)
    return passed if reasoning is None else {"thinking": reasoning, **passed, "reasoning_content": reasoning}
