"""The page of `lumina report RUN`, alone or with a second run drawn over it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from lumina_ds.report.heat_map import HEAT_STYLE, heat_image
from lumina_ds.report.line_plot import LINE_STYLE, Line, LinePlot, Point, line_figure
from lumina_ds.report.page import details, escape, page, section, table, tiles
from lumina_ds.report.runs.config import differences, starting_point
from lumina_ds.report.runs.routing import LAYER_CURVES, layer_columns
from lumina_ds.report.runs.run import BUSIEST, RunRecord, moment
from lumina_ds.text import GIB, counted, format_bytes

# An expert below this share of an even load learns next to nothing.
_IDLE_LOAD = 0.1
_MAX_LAYERS_OPEN = 8


@dataclass(frozen=True)
class PlotOf:
    """How a series of RunRecord is drawn; values are divided by `divisor`."""

    series: str
    title: str
    unit: str = ""
    divisor: float = 1.0
    from_zero: bool = False
    may_be_log: bool = False


# One place to add a plot.
PLOTS = (
    PlotOf("learning_rate", "Learning rate", from_zero=True),
    PlotOf("grad_norm", "Gradient norm", "before clipping", may_be_log=True),
    PlotOf("tokens_per_second", "Speed", "tokens per second, all ranks", from_zero=True),
    PlotOf("memory_bytes", "Memory of rank 0", "GiB", GIB, from_zero=True),
    PlotOf("step_seconds", "Time of a step", "seconds", from_zero=True),
    PlotOf("data_seconds", "Waiting for data", "milliseconds per step", 1e-3, from_zero=True),
)
EXPERT_PLOTS = (
    PlotOf(BUSIEST, "Busiest expert of any layer", "load over an even share", from_zero=True),
    PlotOf("load_balancing_loss", "Load-balancing loss", "1 is even"),
    PlotOf("router_z_loss", "Router z-loss"),
    PlotOf("dead_experts", "Experts that no token chose", "all layers", from_zero=True),
    PlotOf("router_entropy", "Entropy of a token's probabilities", "lowest layer, 1 is undecided", from_zero=True),
    PlotOf("dropped_share", "Dropped choices", "percent, worst layer", 0.01, from_zero=True),
    PlotOf("rerouted_share", "Rerouted choices", "percent, worst layer", 0.01, from_zero=True),
    PlotOf("capacity_factor", "Capacity factor", "highest layer", from_zero=True),
)
# Drawn where a run has them.
HEALTH_PLOTS = (
    PlotOf("anomaly_score", "Anomaly", "deviations above the median of recent steps", from_zero=True),
    PlotOf("straggler_ratio", "Slowest rank", "its work over the median rank's", from_zero=True),
    PlotOf("host_memory_available_bytes", "Free memory of the host", "GiB", GIB, from_zero=True),
    PlotOf("disk_free_bytes", "Free space on the disk", "GiB", GIB, from_zero=True),
)


def run_page(run: RunRecord, other: RunRecord | None = None) -> str:
    """The whole document; equal folders give equal bytes on one machine."""
    runs = [run] if other is None else [run, other]
    title = f"Run {run.name}" if other is None else f"Runs {run.name} and {other.name}"
    return page(title, "; ".join(_subtitle(each) for each in runs), _sections(runs), LINE_STYLE + HEAT_STYLE)


def _subtitle(run: RunRecord) -> str:
    parts = [str(run.config.get("description") or run.path)]
    if run.last_time is not None:
        parts.append(f"last record {moment(run.last_time)}")
    return ", ".join(parts)


def _sections(runs: Sequence[RunRecord]) -> Iterator[str]:
    for run in runs:
        if len(runs) > 1:
            yield f"<h2>{escape(run.name)}</h2>"
        yield tiles(_tiles(run))
        if run.faults:
            items = "".join(f"<li>{escape(fault)}</li>" for fault in run.faults)
            yield f'<p class="warning">Not everything could be read:</p><ul>{items}</ul>'
    yield section("Loss", _loss(runs))
    figures = [_figure(plot, runs) for plot in PLOTS]
    if any(run.skipped for run in runs):
        figures.append(_figure(PlotOf("skipped", "Skipped steps", "so far", from_zero=True), runs))
    yield section("Course", f'<div class="plots">{"".join(figures)}</div>', _skips(runs))
    figures = [_figure(plot, runs) for plot in HEALTH_PLOTS if any(run.series[plot.series].points for run in runs)]
    if figures:
        yield section("Health", f'<div class="plots">{"".join(figures)}</div>')
    if any(run.experts.num_layers for run in runs):
        figures = [_figure(plot, runs) for plot in EXPERT_PLOTS if _is_drawn(plot, runs)]
        yield section("Experts", f'<div class="plots">{"".join(figures)}</div>', *map(_experts, runs))
    yield section("Checkpoints", *(_checkpoints(run, len(runs) > 1) for run in runs))
    yield section("Configuration", *_configuration(runs))
    yield section("Environment", _environment(runs))


def _tiles(run: RunRecord) -> list[tuple[str, str, str, str]]:
    loss, memory, speed = run.series["loss"], run.series["memory_bytes"].high, run.series["tokens_per_second"].mean
    planned, best = run.planned_steps, run.best_evaluation
    state = "length set by epochs" if planned is None else "finished" if run.last_step >= planned else "unfinished"
    entries = [
        ("Steps", f"{run.last_step:,}", state if planned is None else f"of {planned:,}, {state}", ""),
        ("Loss", "none" if loss.last is None else f"{loss.last:.4f}", "at the last record", ""),
        (
            "Best evaluation",
            f"{best.mean:.4f}" if best else "none",
            f"at step {best.first:,}" if best else "no evaluation ran",
            "",
        ),
        ("Tokens", _count(run.tokens), "" if speed is None else f"{speed:,.0f} per second", ""),
        ("Skipped steps", f"{run.skipped:,}", "non-finite gradients", "warning" if run.skipped else "good"),
    ]
    if memory is not None:
        entries.append(("Peak memory", format_bytes(memory), "rank 0", ""))
    if loss.num_missing:
        entries.append(("Not finite", f"{loss.num_missing:,}", "losses", "error"))
    return entries


def _count(number: int) -> str:
    """All digits while they fit into a tile, then four of them."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= max(size, 10**7):
            return f"{number / size:.4g}{letter}"
    return f"{number:,}"


def _loss(runs: Sequence[RunRecord]) -> str:
    """Training and evaluation in one plot; two runs get a plot each for training and evaluation."""
    if len(runs) == 1:
        [run] = runs
        training = Line("training", run.series["loss"].points, 0)
        evaluation = Line("evaluation", run.evaluations, 1, dots=True)
        ticks = tuple((c.step, f"checkpoint of step {c.step:,}") for c in run.checkpoints)
        bad = tuple((step, f"not finite near step {step:,}") for step in run.series["loss"].missing_steps)
        return line_figure(LinePlot("Training and evaluation loss", (training, evaluation), ticks=ticks, bad=bad))
    evaluations = [Line(run.name, run.evaluations, number, dots=True) for number, run in enumerate(runs)]
    return _figure(PlotOf("loss", "Training loss"), runs, is_wide=True) + line_figure(
        LinePlot("Evaluation loss", evaluations)
    )


def _figure(plot: PlotOf, runs: Sequence[RunRecord], is_wide: bool = False) -> str:
    lines = [
        Line(run.name if len(runs) > 1 else plot.title, _scaled(run.series[plot.series].points, plot.divisor), number)
        for number, run in enumerate(runs)
    ]
    bad = [
        (step, f"{run.name}: not finite near step {step:,}")
        for run in runs
        for step in run.series[plot.series].missing_steps
    ]
    return line_figure(LinePlot(plot.title, lines, plot.unit, plot.from_zero, plot.may_be_log, is_wide, bad=bad))


def _is_drawn(plot: PlotOf, runs: Sequence[RunRecord]) -> bool:
    """What only some settings or versions record is left out where no run has it."""
    return plot.series not in LAYER_CURVES or any(run.series[plot.series].points for run in runs)


def _scaled(points: Sequence[Point], divisor: float) -> Sequence[Point]:
    if divisor == 1.0:
        return points
    return [Point(p.first, p.last, p.mean / divisor, p.low / divisor, p.high / divisor) for p in points]


def _skips(runs: Sequence[RunRecord]) -> str:
    quiet = [run.name for run in runs if not run.skipped]
    where = f" in {escape(' and '.join(quiet))}" if len(runs) > 1 else ""
    return f'<p class="good">No step was skipped{where}.</p>' if quiet else ""


def _experts(run: RunRecord) -> str:
    """A heat map and a line of the table for every MoE layer."""
    if not run.experts.num_layers:
        return ""
    first = run.setting("model", "first_k_dense_layers")
    offset = first if isinstance(first, int) else 0
    maps, rows = [], []
    columns, cells = layer_columns(run.layers, run.experts.num_layers)
    for layer in range(run.experts.num_layers):
        loads = run.experts.loads(layer)
        end = loads[:, -1]
        idle = int((end < _IDLE_LOAD).sum())
        name = f"layer {layer + offset}"
        rows.append(
            (
                layer + offset,
                int(end.argmax()),
                f"{end.max():.2f}",
                int(end.argmin()),
                f"{end.min():.2f}",
                idle or "none",
                *cells[layer],
            )
        )
        description = f"{run.name}, {name}: load of {len(end)} experts over steps; at the end {end.min():.2f} to {end.max():.2f} of an even share"
        image = heat_image(loads, description, height=max(48, min(160, 10 * len(end))))
        maps.append(f"<figure><figcaption>{escape(name)}, experts 0 to {len(end) - 1}</figcaption>{image}</figure>")
    legend = (
        '<p class="muted">Rows are experts, columns are steps '
        f"{run.experts.first_step:,} to {run.experts.last_step:,}. "
        'No load <span class="ramp"></span> twice an even share and more.</p>'
    )
    heat = f'{legend}<div class="heat">{"".join(maps)}</div>'
    headings = ("layer", "busiest expert", "load", "idlest expert", "load", "experts below 0.1", *columns)
    return f"<h3>Load of every expert, {escape(run.name)}</h3>{heat}" + details(
        "Loads at the end, 1 is an even share, and balance of the last step",
        table(headings, rows),
        is_open=len(rows) <= _MAX_LAYERS_OPEN,
    )


def _checkpoints(run: RunRecord, named: bool) -> str:
    if not run.checkpoints:
        return f'<p class="muted">{escape(run.name)} has none yet.</p>'
    rows = [
        (
            c.name,
            ", ".join(c.marks) or c.fault,
            f"{c.step:,}",
            "unknown" if c.num_bytes is None else format_bytes(c.num_bytes),
            "none" if c.eval_loss is None else f"{c.eval_loss:.4f}",
        )
        for c in run.checkpoints
    ]
    return table(
        ("folder", "is", "step", "size", "evaluation loss"), rows, run.name if named else "", num_text_columns=2
    )


def _configuration(runs: Sequence[RunRecord]) -> Iterator[str]:
    if len(runs) > 1:
        found = differences(runs[0].config, runs[1].config)
        yield (
            table(("field", runs[0].name, runs[1].name), found, "What differs between the two", num_text_columns=3)
            if found
            else "<p>The configurations are equal.</p>"
        )
    for run in runs:
        if not run.config:
            continue
        origin, begun = starting_point(run.config)
        found = differences(begun, run.config)
        caption = f"{run.name}: what differs from {origin}"
        yield table(("field", origin, "this run"), found, caption, num_text_columns=3)
        yield details(
            f"The whole configuration of {escape(run.name)}", _code(yaml.safe_dump(run.config, sort_keys=False))
        )
        if run.deepspeed:
            yield details(f"DeepSpeed JSON of {escape(run.name)}", _code(json.dumps(run.deepspeed, indent=2)))


def _code(text: str) -> str:
    return f'<pre class="scroll"><code>{escape(text)}</code></pre>'


def _environment(runs: Sequence[RunRecord]) -> str:
    """What each run says of its latest life, its layout as the newest checkpoint names it, and versions side by side."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [(name, *(one.get(name, "unknown") for one in facts)) for name in names]
    if not rows:
        return '<p class="muted">The run says nothing about where it trained.</p>'
    return table(("", *(run.name for run in runs)), rows, num_text_columns=1 + len(runs))


def _facts(run: RunRecord) -> dict[str, str]:
    environment = run.environment
    facts = {name.replace("_", " "): str(value) for name, value in run.topology.items()}
    hosts = environment.get("hosts")
    if isinstance(hosts, dict):
        facts["hosts"] = ", ".join(f"{host} ({counted(ranks, 'rank')})" for host, ranks in hosts.items())
    devices, command = environment.get("devices"), environment.get("command")
    if isinstance(devices, list):
        facts["devices"] = ", ".join(map(str, devices))
    for name in ("started", "platform"):
        if name in environment:
            facts[name] = str(environment[name])
    if isinstance(command, list):
        facts["command"] = " ".join(map(str, command))
    versions = environment.get("versions")
    return facts | ({name: str(value) for name, value in versions.items()} if isinstance(versions, dict) else {})
