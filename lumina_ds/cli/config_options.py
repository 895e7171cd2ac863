"""Command-line options of every verb that takes a run's configuration: short names, and --SECTION.FIELD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, OTHER_TEMPLATES, TEMPLATE_SUFFIX, TEMPLATES
from lumina_ds.config.choices import NameOf
from lumina_ds.config.load import Override, ResolvedConfig, dotted_fields, load_config, preset_names
from lumina_ds.config.options import SHORT_OPTIONS, ShortOption
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


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and every short option of config/options.py to a click command."""
    for option in reversed(SHORT_OPTIONS):
        function = click.option(option.flag, **_click_arguments(option))(function)
        if option.kind == "choice":
            function = click.option(_negation(option), is_flag=True, help=f"the same as {option.flag} off")(function)
    return click.option(
        "--config", metavar="PRESET|FILE", help="preset name or YAML file", shell_complete=complete_config
    )(function)


def train_turns_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --train-turns to a verb that takes no configuration."""
    return click.option(
        "--train-turns",
        default="all",
        show_default=True,
        type=click.Choice(["all", "last", "marked"]),
        help="Assistant turns that are labels: all that no flag (weight, train, loss, masked) switches off, the last of each "
        "conversation, or only those that a flag marks.",
    )(function)


def train_reasoning_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --train-reasoning to a verb that takes no configuration."""
    return click.option(
        "--train-reasoning",
        default="yes",
        show_default=True,
        type=click.Choice(["yes", "no", "last"]),
        help="Assistants' reasoning: a label; context without a label; or a label in the last exchange of each conversation "
        "and left out before it.",
    )(function)


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --format to a verb that takes no configuration."""
    return click.option(
        "--format", metavar="NAME", help="Format of every line, of lumina data formats; its keys tell when unset."
    )(function)


def chat_template_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --chat-template to a verb that takes no configuration."""

    def checked(ctx: click.Context, parameter: click.Parameter, name: str) -> str:
        names = [*OTHER_TEMPLATES, *TEMPLATES]
        if name not in names and not name.endswith(TEMPLATE_SUFFIX):
            known = ", ".join([*names, f"FILE{TEMPLATE_SUFFIX}"])
            raise click.BadParameter(f"{name!r} is not one of {known}{nearest(name, names)}")
        return name

    return click.option(
        "--chat-template",
        default=DEFAULT_TEMPLATE,
        show_default=True,
        metavar="NAME|FILE.jinja|auto",
        callback=checked,
        help=f"What stands around the turns: {', '.join(OTHER_TEMPLATES[:-1])}, a model's own template, or auto for the "
        "one that the tokenizer's folder brings.",
    )(function)


def complete_config(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Presets that begin so, else files."""
    presets = [CompletionItem(name) for name in preset_names() if name.startswith(incomplete)]
    return presets or [CompletionItem(incomplete, type="file")]


def resolve(ctx: click.Context) -> ResolvedConfig:
    """The configuration that the parsed options, and the dotted ones left over in ctx.args, ask for."""
    overrides = []
    for option in SHORT_OPTIONS:
        value = ctx.params[_parameter_name(option)]
        if value is not None and value != ():
            overrides.append(Override(option.field, list(value) if option.kind == "many" else value, option.flag))
        if option.kind == "choice" and ctx.params[f"no_{_parameter_name(option)}"]:
            overrides.append(Override(option.field, "off", _negation(option)))
    return load_config(
        ctx.params["config"],
        overrides + _dotted(ctx.args, [flag for option in ctx.command.params for flag in option.opts], ctx),
    )


def _dotted(args: list[str], known: list[str], ctx: click.Context) -> list[Override]:
    overrides = []
    rest = list(args)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in name:
            kind = "option" if flag.startswith("-") else "argument"
            hint = _hint_to_repeat(flag, ctx.meta["arguments"]) or nearest(flag, known)
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
