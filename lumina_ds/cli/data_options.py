"""Options of verbs that read conversations without a configuration.

They stand apart from config_options.py: building the configuration's schema takes longer than all else that such a verb
does before it reads its first line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, OTHER_TEMPLATES, TEMPLATE_SUFFIX, TEMPLATES
from lumina_ds.text import nearest


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
    """Add --train-reasoning to a verb."""
    return click.option(
        "--train-reasoning",
        default="yes",
        show_default=True,
        type=click.Choice(["yes", "no", "last"]),
        help="Assistants' reasoning: a label; context without a label; or a label in the last exchange of each conversation "
        "and left out before it.",
    )(function)


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --format to a verb."""
    return click.option(
        "--format", metavar="NAME", help="Format of every line, of lumina data formats; its keys tell when unset."
    )(function)


def chat_template_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --chat-template to a verb."""

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
