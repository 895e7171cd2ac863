"""Options of the `lumina plan` commands that set fields of the run's configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import click

from lumina_ds.config.load import Override
from lumina_ds.config.precision import PRECISIONS
from lumina_ds.plan.layout import OFFLOADS

# Click parameter -> configuration field and the flag that origins name.
_FIELDS = {
    "zero": ("deepspeed.zero_stage", "--zero"),
    "expert_parallel": ("deepspeed.expert_parallel_size", "--expert-parallel"),
    "deepspeed_config": ("deepspeed.config", "--deepspeed_config"),
    "micro_batch": ("train.micro_batch_size", "--micro-batch"),
    "seq_length": ("data.seq_length", "--seq-length"),
    "activation_checkpointing": ("train.activation_checkpointing", "--activation-checkpointing"),
    "precision": ("train.precision", "--precision"),
    "offload": ("deepspeed.offload", "--offload"),
}
_OPTIONS = (
    click.option("--zero", type=click.IntRange(0, 3), help="ZeRO stage."),
    click.option("--expert-parallel", type=click.IntRange(min=1), help="Ranks that share one set of experts."),
    click.option("--deepspeed_config", help="A DeepSpeed JSON: a file, or a name such as zero3_offload."),
    click.option("--micro-batch", type=click.IntRange(min=1), help="Packed rows per GPU and forward pass."),
    click.option("--seq-length", type=click.IntRange(min=2), help="Tokens of a packed row."),
    click.option("--offload", type=click.Choice(OFFLOADS), help="Keep states in host memory."),
    click.option("--precision", type=click.Choice(PRECISIONS), help="auto: by device and model size."),
    click.option(
        "--activation-checkpointing",
        type=click.Choice(["none", "full", "attention", "experts"]),
        help="What the backward pass recomputes.",
    ),
)

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class TokenCount(click.ParamType):
    """A number of tokens: 300000000, 3e8, 300M, 1.5B."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmbt]?)", str(value).lower().replace("_", ""))
        try:
            number = int(float(found[1]) * _SUFFIXES[found[2]]) if found else 0
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value} is no number of tokens; write it as 300000000, 3e8 or 300M", param, ctx)
        return number


def setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command; it receives them as keyword arguments, None where not given."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def overrides(settings: Mapping[str, Any]) -> list[Override]:
    """The given ones as overrides for load_config."""
    return [
        Override(_FIELDS[name][0], value, _FIELDS[name][1]) for name, value in settings.items() if value is not None
    ]
