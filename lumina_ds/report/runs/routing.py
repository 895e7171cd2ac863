"""Balance of the routers in a report: metrics that hold one number per MoE layer, as curves and as table columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Metric -> how its layers make one curve: the layer that is worst off, or all of them.
LAYER_CURVES: dict[str, Callable[[Sequence[float]], float]] = {
    "dead_experts": sum,
    "router_entropy": min,
    "dropped_share": max,
    "rerouted_share": max,
    "capacity_factor": max,
}
# Metric -> heading and format of its column.
LAYER_COLUMNS = {
    "max_violation": ("maximum violation", "{:.2f}"),
    "usage_entropy": ("usage entropy", "{:.3f}"),
    "router_entropy": ("router entropy", "{:.3f}"),
    "dead_experts": ("dead", "{:.0f}"),
    "dropped_share": ("dropped", "{:.2%}"),
    "rerouted_share": ("rerouted", "{:.2%}"),
    "capacity_factor": ("capacity factor", "{:.3f}"),
}


def layer_values(record: Mapping[str, Any], name: str) -> list[float] | None:
    """One number per MoE layer out of a record; None when it has none, or no such numbers."""
    values = record.get(name)
    if not isinstance(values, list) or not values or not all(type(value) in (int, float) for value in values):
        return None
    return values


def layer_columns(last: Mapping[str, Sequence[float]], num_layers: int) -> tuple[list[str], list[list[str]]]:
    """Headings, and for each layer its cells, of the metrics that the last record with experts had."""
    names = [name for name in LAYER_COLUMNS if len(last.get(name, ())) == num_layers]
    cells = [[LAYER_COLUMNS[name][1].format(last[name][layer]) for name in names] for layer in range(num_layers)]
    return [LAYER_COLUMNS[name][0] for name in names], cells
