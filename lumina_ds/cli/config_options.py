"""Command-line options of every verb that takes a run's configuration: short names, and --SECTION.FIELD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lumina_ds.cli.completers import complete_config, complete_field
from lumina_ds.config.choices import NameOf
from lumina_ds.config.load import Override, ResolvedConfig, dotted_fields, load_config
from lumina_ds.config.options import SHORT_OPTIONS, ShortOption
from lumina_ds.config.peer_options import peer_hint
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.files import shown_path
from lumina_ds.text import nearest


class ConfigCommand(click.Command):
    """Keeps what follows `--` apart (meta["runner_arguments"]) and lets dotted options through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"ignore_unknown_options": True, "allow_extra_args": True, "max_content_width": 110}
        super().__init__(*args, **{**kwargs, "context_settings": settings})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, runner = args, []
        if "--" in args:
            cut = args.index("--")
            own, runner = args[:cut], args[cut + 1 :]
        ctx.meta["arguments"] = list(own)
        ctx.meta["runner_arguments"] = runner
        return super().parse_args(ctx, list(own))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(ctx, incomplete), *complete_field(ctx.args, incomplete)]


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and every short option of config/options.py to a click command."""
    for option in reversed(SHORT_OPTIONS):
        function = click.option(option.flag, **_click_arguments(option))(function)
        if option.kind == "choice":
            function = click.option(_negation(option), is_flag=True, help=f"the same as {option.flag} off")(function)
    return click.option(
        "--config", metavar="PRESET|FILE", help="preset name or YAML file", shell_complete=complete_config
    )(function)


def resolve(ctx: click.Context) -> ResolvedConfig:
    """The configuration that the parsed options, and the dotted ones left over in ctx.args, ask for."""
    overrides = []
    for option in SHORT_OPTIONS:
        value = ctx.params[_parameter_name(option)]
        if value is not None and value != ():
            overrides.append(Override(option.field, list(value) if option.kind == "many" else value, option.flag))
        if option.kind == "choice" and ctx.params[f"no_{_parameter_name(option)}"]:
            overrides.append(Override(option.field, "off", _negation(option)))
    source, rest = _source(ctx)
    known = [flag for option in ctx.command.params for flag in option.opts]
    return load_config(source, overrides + _dotted(rest, known, ctx))


def _source(ctx: click.Context) -> tuple[str | None, list[str]]:
    """--config, or the YAML file that is the first of the other words, and the words that are left."""
    given, words = ctx.params["config"], list(ctx.args)
    if not words or words[0].startswith("-") or not words[0].endswith((".yaml", ".yml")):
        return given, words
    if given is not None:
        raise ConfigError(
            f"--config {given} and {shown_path(words[0])} both name a configuration; leave one of them out"
        )
    return words[0], words[1:]


def _dotted(args: list[str], known: list[str], ctx: click.Context) -> list[Override]:
    overrides = []
    rest = list(args)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        is_setting = flag.startswith("--") or equals  # --train.seed 1, --train.seed=1, train.seed=1
        if (flag.startswith("-") and not flag.startswith("--")) or not is_setting or "." not in name:
            kind = "option" if flag.startswith("-") else "argument"
            hint = _hint_to_repeat(flag, ctx.meta["arguments"]) or peer_hint(flag) or nearest(flag, known)
            raise ConfigError(f"unknown {kind} {shown_path(flag)}{hint}")
        if not equals:
            if not rest:
                raise ConfigError(f"{flag} needs a value")
            value = rest.pop(0)
        overrides.append(Override(name.replace("-", "_"), value, f"--{name}"))
    return overrides


def _hint_to_repeat(word: str, arguments: list[str]) -> str:
    """How to give several values where `word` is a further one after an option that takes one each time, else nothing."""
    before = arguments[: arguments.index(word)] if word in arguments else []
    place = next((number for number in reversed(range(len(before))) if before[number].startswith("-")), None)
    flag = None if place is None else before[place]
    if word.startswith("-") or flag not in {option.flag for option in SHORT_OPTIONS if option.kind == "many"}:
        return ""
    return f"; {flag} takes one path each time: {flag} A {flag} B, or a glob in quotes: {flag} 'chats/*.jsonl'"


def _negation(option: ShortOption) -> str:
    return f"--no-{option.flag.removeprefix('--')}"


def _parameter_name(option: ShortOption) -> str:
    return option.flag.removeprefix("--").replace("-", "_")


def _click_arguments(option: ShortOption) -> dict[str, Any]:
    arguments: dict[str, Any] = {"default": None, "help": f"{option.field}: {_description(option.field)}"}
    if option.kind == "many":
        arguments["multiple"] = True
    elif option.kind == "true":
        arguments |= {"is_flag": True, "flag_value": True}
    elif option.kind == "choice":
        arguments |= {"is_flag": False, "flag_value": "on", "metavar": f"[{'|'.join(_choices(option.field))}]"}
    elif option.kind == "value":
        arguments |= {"type": str, "metavar": "|".join(_choices(option.field)) or "VALUE"}
    if option.kind in ("many", "value", "choice"):
        arguments["shell_complete"] = _completer(option.field)
    return arguments


def _completer(field: str) -> Callable[..., list[CompletionItem]]:
    """Completes a field's choices, or files for a field of text."""
    choices, is_text = _choices(field), "str" in str(_field(field).annotation)

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if choices:
            return [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file")] if is_text else []

    return complete


def _choices(field: str) -> list[str]:
    """The values that a field takes, where there are few."""
    info = _field(field)
    for mark in info.metadata:
        if isinstance(mark, NameOf):
            return mark.names()
    annotation = info.annotation
    for choice in (annotation, *get_args(annotation)):
        if get_origin(choice) is Literal:
            return [str(value) for value in get_args(choice)]
    return []


def _description(field: str) -> str:
    info = _field(field)
    default = "" if info.default in (None, False) or info.default_factory else f" [{info.default}]"
    return (info.description or field.rpartition(".")[2].replace("_", " ")) + default


def _field(field: str) -> FieldInfo:
    section: type[BaseModel] = RunConfig
    *path, name = field.split(".")
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        section = annotation
    return section.model_fields[name]


assert {option.field for option in SHORT_OPTIONS} <= set(dotted_fields(RunConfig)), "an option names no field"
