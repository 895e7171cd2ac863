"""One DeepSpeed JSON looked at as a whole, for `lumina plan check`: faults, warnings, "auto", the batch equation.

Without a run's configuration the file stands alone; with one it is completed as `lumina train` would do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.combinations import combination_warnings
from lumina_ds.config.deepspeed.compose import BATCH_KEYS, compose_deepspeed
from lumina_ds.config.deepspeed.tree import AUTO, auto_paths, load_deepspeed_json, value_at
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted

_DEFAULT = "DeepSpeed's default"


@dataclass(frozen=True)
class DeepSpeedReport:
    """`auto` maps a dotted path to what it becomes; `batch` is the equation with numbers, None where it is open;
    `composed` is the JSON that a run would hand to DeepSpeed, None without a run or with faults."""

    faults: list[str]
    warnings: list[str]
    auto: Mapping[str, Any] = field(default_factory=dict)
    batch: str | None = None
    composed: Mapping[str, Any] | None = None


def report_on_file(name_or_path: str, world_size: int | None = None) -> DeepSpeedReport:
    """Judge a file by itself. "auto" stays open; the batch equation is shown as far as `world_size` allows.

    Raises ConfigError when the file cannot be read.
    """
    json = load_deepspeed_json(name_or_path)
    faults = deepspeed_faults(json)
    batch, batch_fault = batch_equation(json, world_size) if not faults else (None, None)
    return DeepSpeedReport(
        faults=faults + ([batch_fault] if batch_fault else []),
        warnings=combination_warnings(json),
        auto=dict.fromkeys(auto_paths(json), "set by the run"),
        batch=batch,
    )


def report_on_run(config: RunConfig, world_size: int, precision: str) -> DeepSpeedReport:
    """Judge the file that `config.deepspeed.config` names, in this run on `world_size` ranks in a resolved
    `precision`."""
    json = load_deepspeed_json(config.deepspeed.config) if config.deepspeed.config else {}
    try:
        composed = compose_deepspeed(config, world_size, precision)
    except ConfigError as error:
        return DeepSpeedReport(faults=_lines(error), warnings=combination_warnings(json))
    return DeepSpeedReport(
        faults=[],
        warnings=combination_warnings(composed),
        auto={path: value_at(composed, path, _DEFAULT) for path in auto_paths(json)},
        batch=batch_equation(composed, world_size)[0],
        composed=composed,
    )


def batch_equation(json: Mapping[str, Any], world_size: int | None) -> tuple[str | None, str | None]:
    """(equation, fault): the batch numbers solved as deepspeed/runtime/config.py does it, without its rounding down.

    The equation is None where numbers are missing or "auto"; the fault says which numbers would hold.
    """
    total, micro, accumulation = (_number(json.get(name)) for name in BATCH_KEYS)
    ranks = world_size
    if total is None:
        # Either factor alone stands for the other being 1; no factor at all leaves the batch open.
        if micro is None or ranks is None:
            return None, None
        accumulation = accumulation or 1
        total = micro * accumulation * ranks
    elif ranks is None:
        if micro is None or accumulation is None:
            return None, None
        ranks = total // (micro * accumulation)
    elif micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * ranks)
    elif accumulation is None:
        accumulation = total // (micro * ranks)
    assert micro is not None and accumulation is not None
    product = micro * accumulation * ranks
    equation = f"{BATCH_KEYS[0]} {total} = {micro} per GPU x {accumulation} accumulated x {counted(ranks, 'rank')}"
    if product == total and product > 0:
        return equation, None
    factors = max(1, micro) * max(1, accumulation)
    below = max(1, total // (factors * ranks)) * factors * ranks
    return None, (
        f"the batch equation does not hold on {counted(ranks, 'rank')}: {BATCH_KEYS[0]} {total} is not micro-batch {micro} x "
        f"accumulation {accumulation} x {ranks} = {product}; set it to {below}, or leave one of the three out"
    )


def _number(value: Any) -> int | None:
    return None if value in (None, AUTO) else int(value)


def _lines(error: ConfigError) -> list[str]:
    """The single faults of ConfigError.from_faults."""
    _, *several = str(error).split("\n  - ")
    return several or [str(error)]
