"""The page of `lumina report RUN`, alone or with a second run drawn over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lumina_ds.monitor.metrics import Plot, Section
from lumina_ds.monitor.records import METRICS
from lumina_ds.report.heat_map import HEAT_STYLE
from lumina_ds.report.line_plot import LINE_STYLE, Line, LinePlot, line_figure
from lumina_ds.report.page import escape, page, section, table, tiles
from lumina_ds.report.runs.config import configuration, environment
from lumina_ds.report.runs.experts import expert_loads
from lumina_ds.report.runs.layouts import layout_section
from lumina_ds.report.runs.preprocessing import data_section
from lumina_ds.report.runs.run import RunRecord, moment
from lumina_ds.report.runs.sources import evaluation_plots, source_section
from lumina_ds.report.scale import Point
from lumina_ds.text import format_bytes


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
    yield section("Loss", _loss(runs), *(evaluation_plots(run.evaluation_sets) for run in runs))
    if sources := [part for run in runs if (part := source_section(run.sources, run.name))]:
        yield section("Sources", *sources)
    yield section("Course", _plots("course", runs), _skips(runs))
    if health := _plots("health", runs):
        yield section("Health", health)
    if any(run.experts.num_layers for run in runs):
        yield section("Experts", _plots("experts", runs), *map(expert_loads, runs))
    if data := [part for run in runs if (part := data_section(run.preprocessing))]:
        yield section("Data", *data)
    if layouts := [part for run in runs if (part := layout_section(run.layouts, run.name))]:
        yield section("Ranks", *layouts)
    yield section("Checkpoints", *(_checkpoints(run, len(runs) > 1) for run in runs))
    yield section("Configuration", *configuration(runs))
    yield section("Environment", environment(runs))


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
    loss = METRICS["loss"].plot
    assert loss is not None
    if len(runs) == 1:
        [run] = runs
        training = Line("training", run.series["loss"].points, 0)
        evaluation = Line("evaluation", run.evaluations, 1, dots=True)
        ticks = tuple((c.step, f"checkpoint of step {c.step:,}") for c in run.checkpoints)
        bad = tuple((step, f"not finite near step {step:,}") for step in run.series["loss"].missing_steps)
        title = "Training and evaluation loss"
        return line_figure(LinePlot(title, (training, evaluation), may_be_log=loss.may_be_log, ticks=ticks, bad=bad))
    evaluations = [Line(run.name, run.evaluations, number, dots=True) for number, run in enumerate(runs)]
    return _figure("loss", loss, runs, is_wide=True) + line_figure(
        LinePlot("Evaluation loss", evaluations, may_be_log=loss.may_be_log)
    )


def _plots(part: Section, runs: Sequence[RunRecord]) -> str:
    """The plots of the metrics that belong to a section of the page, beside one another; empty without any."""
    drawn = [(name, metric.plot) for name, metric in METRICS.items() if metric.plot and metric.plot.section == part]
    figures = [_figure(name, plot, runs) for name, plot in drawn if _is_drawn(name, plot, runs)]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _is_drawn(name: str, plot: Plot, runs: Sequence[RunRecord]) -> bool:
    """What only some settings or versions record is left out where no run has it."""
    if plot.drawn == "always":
        return True
    highest = [run.series[name].high for run in runs]
    return any(highest) if plot.drawn == "where not zero" else any(high is not None for high in highest)


def _figure(name: str, plot: Plot, runs: Sequence[RunRecord], is_wide: bool = False) -> str:
    lines = [
        Line(run.name if len(runs) > 1 else plot.title, _scaled(run.series[name].points, plot.divisor), number)
        for number, run in enumerate(runs)
    ]
    bad = [
        (step, f"{run.name}: not finite near step {step:,}") for run in runs for step in run.series[name].missing_steps
    ]
    return line_figure(LinePlot(plot.title, lines, plot.unit, plot.from_zero, plot.may_be_log, is_wide, bad=bad))


def _scaled(points: Sequence[Point], divisor: float) -> Sequence[Point]:
    if divisor == 1.0:
        return points
    return [Point(p.first, p.last, p.mean / divisor, p.low / divisor, p.high / divisor) for p in points]


def _skips(runs: Sequence[RunRecord]) -> str:
    quiet = [run.name for run in runs if not run.skipped]
    where = f" in {escape(' and '.join(quiet))}" if len(runs) > 1 else ""
    return f'<p class="good">No step was skipped{where}.</p>' if quiet else ""


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
        ("folder", "state", "step", "size", "evaluation loss"), rows, run.name if named else "", num_text_columns=2
    )
