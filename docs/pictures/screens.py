"""Two screens of a real run: its live line on a terminal, and the plots of its report.

quickstart.jsonl holds records of one `bash launch/quickstart.sh` on two CPU cores: every fourth step, and evaluations.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from lumina_ds.monitor.console import TrainingConsole, first_that_fit, training_figures
from lumina_ds.monitor.records import StepRecord
from lumina_ds.report.line_plot import LINE_STYLE, Line, LinePlot, line_svg
from lumina_ds.report.page import page
from lumina_ds.report.plot import NARROW
from lumina_ds.report.scale import Point

RECORDS = Path(__file__).with_name("quickstart.jsonl")
STRATEGY, NUM_STEPS, WORKERS = "ZeRO-2 EP2 fp32", 400, 2
COLUMNS = 62
SHOWN_STEPS = (1, 101, 181)
PLOTS = (
    ("loss", "Training and evaluation loss"),
    ("learning_rate", "Learning rate"),
    ("grad_norm", "Gradient norm"),
)


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def step_records() -> dict[int, StepRecord]:
    """The records of steps, as the run's own reader has them."""
    found = (StepRecord.read(record) for record in records() if "grad_norm" in record)
    return {record.step: record for record in found if record is not None}


def live_line() -> str:
    """What a terminal of COLUMNS shows at the last of SHOWN_STEPS: two lines of history, the bar, the figures."""
    shown = step_records()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for step in SHOWN_STEPS[:-1]:
        figures = training_figures(shown[step], NUM_STEPS, STRATEGY, WORKERS)
        console.print(first_that_fit(figures, COLUMNS), highlight=False, markup=False)
    console.print(_live_block(shown))
    return console.export_svg(
        title="lumina train", unique_id="live", code_format=_without_fonts(CONSOLE_SVG_FORMAT), theme=None
    )


def _live_block(shown: dict[int, StepRecord]) -> Any:
    """The bar and figures of the real console, with the run's clock in place of this machine's."""
    live = TrainingConsole(NUM_STEPS, NUM_STEPS, STRATEGY, WORKERS)
    live._console = Console(file=io.StringIO(), width=COLUMNS, force_terminal=True)
    live.start(0)
    assert live._progress is not None
    progress, start = live._progress, _seconds(shown[1])
    live._live.stop()
    [task] = progress.tasks
    # The task keeps a clock of its own.
    progress.get_time = task._get_time = lambda: clock  # type: ignore[method-assign]
    clock = start
    progress.reset(live._task, total=NUM_STEPS)
    for step, record in shown.items():
        if step <= SHOWN_STEPS[-1]:
            clock = _seconds(record)
            live.show(record)
    assert task.elapsed == clock - start
    return live._live.renderable


def _seconds(record: StepRecord) -> float:
    assert record.time is not None
    return record.time


def _without_fonts(template: str) -> str:
    """rich's template asks a server for fonts; the reader's own will do."""
    return re.sub(r"@font-face \{\{.*?\}\}\s*", "", template, flags=re.DOTALL)


def report() -> str:
    """Three plots of the run's report, one below the other, with the report's own colours."""
    found = records()
    style = "".join(re.findall(r"<style>(.*?)</style>", page("", "", [], LINE_STYLE), re.DOTALL))
    variables = "".join(
        re.findall(r":root \{[^}]*\}", style.partition("@media")[0] + LINE_STYLE.partition("@media")[0])
    )
    rules = re.findall(r"^\s*(svg [^{]*\{[^}]*\})", style.replace("} svg", "}\nsvg"), re.MULTILINE)
    parts, y = [], 0
    for series, title in PLOTS:
        plot = line_svg(LinePlot(title, _lines(found, series)), NARROW)
        plot = re.sub(r'<rect class="strip".*?</rect>', "", plot)
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', plot).groups())  # type: ignore[union-attr]
        parts.append(f'<text x="12" y="{y + 24}" class="title">{title}</text>')
        parts.append(plot.replace("<svg ", f'<svg x="0" y="{y + 30}" width="{width}" height="{height}" ', 1))
        y += height + 36
    own = "svg text{font-family:DejaVu Sans,Verdana,Arial,sans-serif} svg text.title{font-size:14px;fill:#1c2128}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" role="img">'
        f"<title>Plots of a run's report</title><style>{variables}{''.join(rules)}{own}</style>"
        f'<rect width="{width}" height="{y}" rx="8" fill="#ffffff"/>' + "\n".join(parts) + "</svg>\n"
    )


def _lines(found: list[dict[str, Any]], series: str) -> list[Line]:
    training = [record for record in found if "grad_norm" in record]
    lines = [Line("training", [_point(record, series) for record in training])]
    if series == "loss":
        evaluations = [record for record in found if "grad_norm" not in record]
        lines.append(Line("evaluation", [_point(record, series) for record in evaluations], 1, dots=True))
    return lines


def _point(record: dict[str, Any], series: str) -> Point:
    value = record[series]
    return Point(record["step"], record["step"], value, value, value)
