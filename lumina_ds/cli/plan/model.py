"""`lumina plan --model`: the states of a model that is not ours, counted by transformers, at every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.tree import load_deepspeed_json, section_of
from lumina_ds.errors import ConfigError
from lumina_ds.export.count_foreign import counted_model
from lumina_ds.export.planned_config import PlannedModel
from lumina_ds.plan.foreign_states import STAGES, ForeignModel, ForeignStates, filled_in, foreign_states
from lumina_ds.text import counted, format_bytes, format_count, with_article

if TYPE_CHECKING:
    from rich.console import Console

# Options that say something of activations or of our own layouts, which are not known for such a model.
_OF_OURS = ("expert_parallel", "micro_batch", "seq_length", "activation_checkpointing")


def plan_foreign(
    found: PlannedModel,
    freeze: Sequence[str],
    world_size: int,
    device: str,
    settings: Mapping[str, Any],
    refused: Sequence[str],
    as_json: bool,
) -> None:
    """Print the states of a model on `world_size` ranks. ConfigError for an option that says nothing about states."""
    words = [*refused, *(f"--{name.replace('_', '-')}" for name in _OF_OURS if settings[name] is not None)]
    words += ["--device"] if device != "cuda" else []
    if words:
        raise ConfigError(
            f"{', '.join(words)}: of {with_article(found.family)}, which lumina does not train, only the states are planned "
            f"(parameters, optimizer, gradients, buckets, gathering); leave the option{'s' * (len(words) > 1)} out"
        )
    precision = "bf16" if settings["precision"] in (None, "auto") else settings["precision"]
    jsons = _jsons(settings, precision)
    model = counted_model(found.folder, found.family).frozen_by(freeze)
    states = [foreign_states(model, world_size, precision, filled_in(each, model.hidden_size)) for each in jsons]
    if as_json:
        click.echo(json.dumps(_record(model, states, world_size, precision), indent=2))
        return
    from rich.console import Console

    _render(model, states, world_size, precision, Console())


def _jsons(settings: Mapping[str, Any], precision: str) -> list[dict[str, Any]]:
    """A DeepSpeed JSON for each stage that is asked for: the file's, or DeepSpeed's defaults."""
    source, stage, offload = settings["deepspeed_config"], settings["zero"], settings["offload"]
    base = load_deepspeed_json(source) if source else {}
    if faults := deepspeed_faults(base):
        raise ConfigError.from_faults(faults)
    own = section_of(base, "zero_optimization").get("stage")
    asked = own if stage is None else stage
    # In 16 bits DeepSpeed keeps fp32 weights from stage 1 on; what it does without ZeRO, no plan of ours follows.
    possible = [each for each in STAGES if each >= 1 or precision == "fp32"]
    if offload and offload != "none":
        possible = [each for each in possible if each >= (3 if "params" in offload else 1)]
    if asked is not None and asked not in possible:
        raise ConfigError(
            f"ZeRO {asked} in {precision}{f' with --offload {offload}' if offload else ''} is not planned; "
            f"set --zero to {' or '.join(map(str, possible))}"
        )
    return [
        {**base, "zero_optimization": _zero_section(base, each, offload)}
        for each in (possible if asked is None else [asked])
    ]


def _zero_section(base: Mapping[str, Any], stage: int, offload: str | None) -> dict[str, Any]:
    zero: dict[str, Any] = {**section_of(base, "zero_optimization"), "stage": stage}
    if offload is not None:
        zero = {name: value for name, value in zero.items() if not name.startswith("offload_")}
    for name, word in (("offload_optimizer", "optimizer"), ("offload_param", "params")):
        if word in (offload or ""):
            zero[name] = {"device": "cpu"}
    return zero


def _record(model: ForeignModel, found: Sequence[ForeignStates], world_size: int, precision: str) -> dict[str, Any]:
    name, numel = model.largest_layer
    return {
        "name": model.name,
        "family": model.family,
        "parameters": {**model.kinds, "total": model.total, "trainable": model.trainable},
        "largest_layer": {"name": name, "parameters": numel},
        "world_size": world_size,
        "precision": precision,
        "states": [{**vars(states), "peak": states.peak} for states in found],
        "activations": None,
    }


def _render(
    model: ForeignModel, found: Sequence[ForeignStates], world_size: int, precision: str, console: Console
) -> None:
    from rich.table import Table

    parts = ", ".join(f"{kind.replace('_', ' ')} {format_count(number)}" for kind, number in model.kinds.most_common())
    share = "" if model.trainable == model.total else f", {format_count(model.trainable)} trained"
    name, numel = model.largest_layer
    console.print(
        f"[bold]{model.name}[/bold] ({model.family}): {format_count(model.total)} parameters{share}, counted by "
        f"transformers\n{parts}\nLargest layer: {name}, {format_count(numel)}",
        highlight=False,
    )
    console.print(f"{counted(world_size, 'rank')}, {precision}, AdamW, without activations:", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("per rank", no_wrap=True)
    for states in found:
        table.add_column(f"ZeRO {states.stage}", justify="right", no_wrap=True)
    rows = (
        "parameters",
        "master_weights",
        "moments",
        "gradients",
        "buckets",
        "gathered",
        "step_gradients",
        "step",
        "peak",
        "host",
    )
    for row in rows:
        sizes = [getattr(states, row) for states in found]
        if any(sizes):
            if row == "peak":
                table.add_section()
            table.add_row(row.replace("_", " "), *(format_bytes(size) if size else "-" for size in sizes))
    console.print(table)
    console.print(
        "The peak is the higher of backward pass and optimizer step. Activations, the CUDA context (0.5 GiB) and NCCL "
        "(0.5 GiB) come on top: lumina plans them for the families that it trains.",
        highlight=False,
    )
