"""What a shell offers after TAB: presets, cards, runs and their steps, fields and their choices."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from lumina_ds.config.load import preset_names

RUNS = "runs"  # the default folder of runs


def complete_config(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Presets that begin so, else files."""
    return _beginning(preset_names(), incomplete) or [CompletionItem(incomplete, type="file")]


def complete_preset(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _beginning(preset_names(), incomplete)


def complete_card(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from lumina_ds.plan.hardware import GPUS

    return _beginning([gpu.name for gpu in GPUS], incomplete)


def complete_run(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Run folders below ./runs, or below the folder that was typed; behind a run's name its steps; else folders."""
    from lumina_ds.checkpoint.format import step_folders

    parent = Path(incomplete.rpartition("/")[0] or RUNS)
    run = parent.parent if parent.name == "checkpoints" else parent
    found = [str(file.parent) for file in sorted(parent.glob("*/config.yaml"))]
    found += [str(step) for step in step_folders(run / "checkpoints")]
    return _beginning(found, incomplete) or [CompletionItem(incomplete, type="dir")]


def complete_field(words: list[str], incomplete: str) -> list[CompletionItem]:
    """Dotted fields as `--train.seed` or `train.seed=`; behind a dotted option the choices of its field.

    `words` are those before that no option of the command took.
    """
    from lumina_ds.config.fields import all_fields

    fields = all_fields()
    before = words[-1] if words else ""
    if before.startswith("--") and "=" not in before and (field := fields.get(before[2:].replace("-", "_"))):
        return _beginning(field.values, incomplete)
    name, equals, value = incomplete.removeprefix("--").partition("=")
    if equals and name in fields:
        return _beginning(
            [f"{incomplete[: -len(value) or None]}{choice}" for choice in fields[name].values], incomplete
        )
    if incomplete.startswith("--"):
        return _beginning([f"--{name}" for name in fields if "." in name], incomplete)
    return _beginning([f"{name}=" for name in fields if "." in name], incomplete) if incomplete else []


def _beginning(names: list[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
