"""The load of every expert in a report: a heat map per MoE layer, and a table with what each layer's router says."""

from __future__ import annotations

from collections.abc import Mapping

from lumina_ds.monitor.metrics import PerLayer
from lumina_ds.monitor.records import METRICS
from lumina_ds.report.heat_map import heat_image
from lumina_ds.report.page import details, escape, table
from lumina_ds.report.runs.run import RunRecord

# An expert below this share of an even load learns next to nothing.
_IDLE_LOAD = 0.1
_MAX_LAYERS_OPEN = 8
_HEADINGS = ("layer", "busiest expert", "its load", "idlest expert", "its load", f"experts below {_IDLE_LOAD}")


def expert_loads(run: RunRecord) -> str:
    """A heat map and a row of the table for every MoE layer; empty for a run without any."""
    num_layers = run.experts.num_layers
    if not num_layers:
        return ""
    first = run.setting("model", "first_k_dense_layers")
    offset = first if isinstance(first, int) else 0
    legend = (
        '<p class="muted">Rows are experts, columns are steps '
        f"{run.experts.first_step:,} to {run.experts.last_step:,}. "
        'No load <span class="ramp"></span> twice an even share and more.</p>'
    )
    maps = "".join(_heat_map(run, layer, offset) for layer in range(num_layers))
    columns = {
        name: metric.layers
        for name, metric in METRICS.items()
        if metric.layers and len(run.layers.get(name, ())) == num_layers
    }
    headings = [column.heading for column in columns.values()]
    rows = [_row(run, layer, offset, columns) for layer in range(num_layers)]
    return f'<h3>Load of every expert, {escape(run.name)}</h3>{legend}<div class="heat">{maps}</div>' + details(
        "Loads at the end, 1 is an even share, and balance of the last step",
        table((*_HEADINGS, *headings), rows),
        is_open=num_layers <= _MAX_LAYERS_OPEN,
    )


def _heat_map(run: RunRecord, layer: int, offset: int) -> str:
    loads = run.experts.loads(layer)
    end, name = loads[:, -1], f"layer {layer + offset}"
    description = (
        f"{run.name}, {name}: load of {len(end)} experts over steps; "
        f"at the end {end.min():.2f} to {end.max():.2f} of an even share"
    )
    image = heat_image(loads, description, height=max(48, min(160, 10 * len(end))))
    return f"<figure><figcaption>{escape(name)}, experts 0 to {len(end) - 1}</figcaption>{image}</figure>"


def _row(run: RunRecord, layer: int, offset: int, columns: Mapping[str, PerLayer]) -> list[object]:
    end = run.experts.loads(layer)[:, -1]
    idle = int((end < _IDLE_LOAD).sum())
    busiest, idlest = int(end.argmax()), int(end.argmin())
    loads = [layer + offset, busiest, f"{end.max():.2f}", idlest, f"{end.min():.2f}", idle or "none"]
    cells = [column.format.format(run.layers[name][layer]) for name, column in columns.items()]
    return [*loads, *cells]
