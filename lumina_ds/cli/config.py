"""`lumina config`: every field in words, a file to start from, a schema for editors, and what differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from lumina_ds.cli.completers import complete_config, complete_preset
from lumina_ds.cli.config_options import ConfigCommand, config_options, resolve
from lumina_ds.config.config_file import SCHEMA_FILE, commented_yaml, json_schema
from lumina_ds.config.fields import FieldText, all_fields, doc_of, sections, value_text
from lumina_ds.config.foreign_runs import TRAINERS, run_from, shown
from lumina_ds.config.load import load_config, preset_names
from lumina_ds.config.yaml_file import read_yaml
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.files import write_atomically
from lumina_ds.text import counted, nearest, shortened


def _complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [*all_fields(), *(name for name, _ in sections() if name)]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.group(epilog="Example: lumina config explain train.learning_rate", short_help="every option of a run, in words")
def command() -> None:
    """Show, write, compare and explain the configuration of a run."""


@command.command("show", cls=ConfigCommand, epilog="Example: lumina config show run.yaml --changed")
@config_options
@click.option("--changed", is_flag=True, help="only what differs from the defaults")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
@click.pass_context
def show(ctx: click.Context, changed: bool, as_json: bool, **_: Any) -> None:
    """Every field with its value, default and origin. A preset or a file, then fields as `lumina train` takes them."""
    if ctx.args and not ctx.args[0].startswith("-") and ctx.params["config"] is None and "=" not in ctx.args[0]:
        ctx.params["config"] = _source(ctx.args.pop(0))
    found = resolve(ctx)
    values = dotted_values(found.config.model_dump())
    fields = all_fields()
    kept = [name for name in fields if name in values and not (changed and values[name] == fields[name].default)]
    if as_json:
        rows = {
            name: {"value": values[name], "default": fields[name].default, "origin": found.origins[name]}
            for name in kept
        }
        click.echo(json.dumps(rows, indent=2))
        return
    _table(("field", "value", "default", "origin"), [
        (name, _shown(values[name]), fields[name].default_text, found.origins[name]) for name in kept
    ])  # fmt: skip


@command.command("init", epilog="Example: lumina config init b1 --out run.yaml")
@click.argument("preset", shell_complete=complete_preset)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="file to write, with its schema beside it")
def init(preset: str, out: Path | None) -> None:
    """A YAML file that starts from PRESET. Every field stands in it as a comment: its value, meaning and bounds."""
    if preset not in preset_names():
        raise ConfigError(f"no preset {preset!r}{nearest(preset, preset_names())} (see: lumina presets list)")
    text = commented_yaml(preset)
    if out is None:
        click.echo(text, nl=False)
        return
    schema = out.parent / SCHEMA_FILE
    if out.exists():
        raise ConfigError(f"{out} exists; give another --out, or remove it")
    try:
        write_atomically(out, text)
        write_atomically(schema, json.dumps(json_schema(), indent=1) + "\n")
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
    click.echo(
        f"wrote {out}, and {schema} for editors; take the # from what is to change\ntrain with: lumina train {out}"
    )


@command.command("schema", epilog="Example: lumina config schema > lumina.schema.json")
def schema() -> None:
    """JSON Schema of a run's YAML file. Editors complete and check by it while one types."""
    click.echo(json.dumps(json_schema(), indent=1))


@command.command("diff", epilog="Example: lumina config diff b1 b7")
@click.argument("first", shell_complete=complete_config)
@click.argument("second", shell_complete=complete_config)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def diff(first: str, second: str, as_json: bool) -> None:
    """Fields in which two presets, files or run folders differ."""
    one, other = (dotted_values(load_config(_source(each)).config.model_dump()) for each in (first, second))
    names = [name for name in all_fields() if one.get(name) != other.get(name)]
    if as_json:
        click.echo(json.dumps({name: [one.get(name), other.get(name)] for name in names}, indent=2))
    elif names:
        _table(("field", first, second), [(name, _shown(one.get(name)), _shown(other.get(name))) for name in names])
    else:
        click.echo(f"{first} and {second} say the same")


@command.command("from", epilog="Example: lumina config from axolotl their.yaml --out run.yaml")
@click.argument("trainer", type=click.Choice(list(TRAINERS)))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="file to write; else it is printed")
@click.option("--preset", shell_complete=complete_preset, help="preset whose model is trained")
def from_(trainer: str, file: Path, out: Path | None, preset: str | None) -> None:
    """A run file of another trainer as one of ours. What does not map is left out and listed, with the reason."""
    if preset is not None and preset not in preset_names():
        raise ConfigError(f"no preset {preset!r}{nearest(preset, preset_names())} (see: lumina presets list)")
    if not file.is_file():
        raise ConfigError(f"{file} is no file; give the run file of {trainer}")
    found = run_from(trainer, read_yaml(file))
    if not found.values:
        raise ConfigError(
            f"{file}: none of its keys is one of {trainer} that has a counterpart here; is it the right file?"
        )
    if out is None:
        click.echo(found.text(preset), nl=False)
    else:
        if out.exists():
            raise ConfigError(f"{out} exists; give another --out, or remove it")
        try:
            write_atomically(out, found.text(preset))
        except OSError as error:
            raise MachineError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
        click.echo(f"wrote {out}: {counted(len(found.values), 'field')}")
    for key, value, reason in found.left_out:
        click.echo(f"left out: {shortened(key)} {shown(value)}: {reason}", err=True)


@command.command(
    "explain",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: lumina config explain train.learning_rate",
)
@click.argument("field", shell_complete=_complete_name)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def explain(field: str, as_json: bool) -> None:
    """What a field, or a section, means. FIELD is a dotted name, its last word or its short option; shown are type,
    bounds, default, meaning and options."""
    fields = all_fields()
    names = {name: section for name, section in sections() if name}
    found = [
        each
        for each in fields.values()
        if field in (each.name, each.key, each.flag) or each.name.startswith(f"{field}.")
    ]
    if not found:
        known = [*fields, *names]
        raise ConfigError(f"no field {field}{nearest(field, known)} (see: lumina config show debug)")
    if as_json:
        click.echo(json.dumps([_record(each) for each in found], indent=2))
        return
    if field in names:
        click.echo(f"{field}: {doc_of(names[field])}\n")
    click.echo("\n\n".join(_paragraph(each) for each in found))


def dotted_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted names."""
    found: dict[str, Any] = {}
    names = {name for name, _ in sections()}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= dotted_values(value, f"{name}.") if name in names else {name: value}
    return found


def _source(text: str) -> str:
    """A run folder means its config.yaml."""
    return str(Path(text) / "config.yaml") if Path(text).is_dir() else text


def _record(field: FieldText) -> dict[str, Any]:
    default = None if field.info.is_required() else field.default
    return {"name": field.name, "type": field.kind, "default": default, "meaning": field.meaning, "option": field.flag}


def _paragraph(field: FieldText) -> str:
    words = [f"--{field.name} VALUE", *([f"{field.flag}"] if field.flag else [])]
    lines = (f"{field.name}", f"  {field.meaning}", f"  type     {field.kind}", f"  default  {field.default_text}")
    return "\n".join((*lines, f"  option   {', '.join(words)}"))


def _shown(value: Any) -> str:
    return "unset" if value is None else value_text(value)


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout).print(table)
