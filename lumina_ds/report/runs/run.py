"""What a run folder says about its run, read once, line by line, and forgiving: a crash may have cut any file short.

The report's pages and its JSON are made from RunRecord alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lumina_ds.checkpoint.format import StepSummary, step_folders, step_summaries
from lumina_ds.config.yaml_file import read_yaml
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.monitor.layouts import LayoutRecord
from lumina_ds.monitor.metrics import is_per_layer
from lumina_ds.monitor.reading import read_lines
from lumina_ds.monitor.records import METRICS, EvaluationRecord, StepRecord
from lumina_ds.report.runs.preprocessing import PREPROCESSING
from lumina_ds.report.runs.series import ExpertUsage, Series
from lumina_ds.report.runs.sources import SourceCurves, judged_points
from lumina_ds.report.scale import Point

STEPS, EVALUATIONS, CONFIG, DEEPSPEED = "metrics.jsonl", "evaluations.jsonl", "config.yaml", "ds_config.json"
ENVIRONMENT, LAYOUTS = "environment.json", "logs/layouts.jsonl"
_NUM_FAULTS_SHOWN = 5
_LAYERS = [name for name, metric in METRICS.items() if metric.layers]
_Record = TypeVar("_Record")


@dataclass
class RunRecord:
    """One run. `series` has every metric that is plotted, and `layers` the last values of those with one per MoE
    layer. `evaluations` are those by which the best checkpoint is chosen, `evaluation_sets` those of sets with a name.
    `faults` are what could not be read, in words."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(
        default_factory=lambda: {name: Series() for name, metric in METRICS.items() if metric.plot}
    )
    experts: ExpertUsage = field(default_factory=ExpertUsage)
    layers: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[Point] = field(default_factory=list)
    evaluation_sets: dict[str, list[Point]] = field(default_factory=dict)
    sources: SourceCurves = field(default_factory=SourceCurves)
    checkpoints: list[StepSummary] = field(default_factory=list)
    layouts: list[LayoutRecord] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_records: int = 0
    last_step: int = 0
    tokens: int = 0
    skipped: int = 0
    first_time: float | None = None
    last_time: float | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, as its latest life or its configuration says; None for an old run by epochs."""
        steps = self.environment.get("num_steps", self.setting("train", "max_steps"))
        return steps if isinstance(steps, int) else None

    @property
    def best_evaluation(self) -> Point | None:
        return min(self.evaluations, key=lambda point: point.mean, default=None)

    @property
    def topology(self) -> dict[str, Any]:
        """Ranks, ZeRO stage, expert-parallel size and precision, as the newest readable checkpoint names them."""
        return next((c.topology for c in reversed(self.checkpoints) if c.topology), {})

    def setting(self, section: str, name: str) -> Any:
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    def summary(self) -> dict[str, Any]:
        """The figures that stand on top of the page, for JSON."""
        best = self.best_evaluation
        return {
            "run": str(self.path),
            "preset": self.config.get("preset"),
            "records": self.num_records,
            "steps": self.last_step,
            "planned_steps": self.planned_steps,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "loss": self.series["loss"].last,
            "best_eval_loss": best.mean if best else None,
            "best_eval_step": best.first if best else None,
            "tokens_per_second": self.series["tokens_per_second"].mean,
            "peak_memory_bytes": self.series["memory_bytes"].high,
            "checkpoints": [c.name for c in self.checkpoints],
            "faults": self.faults,
        }


def is_run(path: Path) -> bool:
    return (path / STEPS).is_file() or (path / CONFIG).is_file()


def runs_below(folder: Path) -> list[Path]:
    """The run folders directly in `folder`, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def read_run(path: Path) -> RunRecord:
    """Read a run folder, finished or not. Raises DataError when it is none."""
    if not is_run(path):
        raise DataError(f"{path} is no run folder: it holds neither {STEPS} nor {CONFIG}; give runs/NAME or runs")
    run = RunRecord(path)
    run.config = _config(path / CONFIG, run.faults)
    run.deepspeed = _json_object(path / DEEPSPEED, run.faults)
    if (path / ENVIRONMENT).exists():  # runs of earlier versions have none
        run.environment = _json_object(path / ENVIRONMENT, run.faults)
    if (path / PREPROCESSING).exists():  # of runs that made their shards themselves
        run.preprocessing = _json_object(path / PREPROCESSING, run.faults)
    for record in _records(path / STEPS, StepRecord.read, run.faults):
        _take(run, record)
    sets: dict[str | None, list[Point]] = {}
    for measured in _records(path / EVALUATIONS, EvaluationRecord.read, run.faults):
        if math.isfinite(measured.loss):
            point = Point(measured.step, measured.step, measured.loss, measured.loss, measured.loss)
            sets.setdefault(measured.name, []).append(point)
    run.evaluations = list(judged_points(sets, run.setting("train", "best_by")))
    run.evaluation_sets = {name: points for name, points in sets.items() if name is not None}
    run.layouts = list(_records(path / LAYOUTS, LayoutRecord.read, run.faults))
    run.checkpoints = step_summaries(step_folders(path / "checkpoints"))
    return run


def _take(run: RunRecord, record: StepRecord) -> None:
    run.num_records += 1
    for name, series in run.series.items():
        value = record.value(name)
        if name == "expert_usage":
            value = run.experts.add(record.step, value) if value else None
        elif value is not None:
            value = METRICS[name].curve_value(value)
        if value is not None:
            series.add(record.step, value)
    run.sources.take(record)
    for name in _LAYERS:
        if is_per_layer(values := record.value(name)):
            run.layers[name] = values
    run.last_step = max(run.last_step, record.step)
    run.tokens = max(run.tokens, _count(record.tokens))
    run.skipped = max(run.skipped, _count(record.skipped))
    if record.time is not None and math.isfinite(record.time):
        run.first_time = record.time if run.first_time is None else run.first_time
        run.last_time = record.time


def _records(path: Path, read: Callable[[Any], _Record | None], faults: list[str]) -> Iterator[_Record]:
    """The whole records of a file; other lines are named in `faults`."""
    bad: list[int] = []
    try:
        yield from read_lines(path, read, bad)
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
    if bad:
        shown = ", ".join(str(number) for number in bad[:_NUM_FAULTS_SHOWN])
        more = ", ..." if len(bad) > _NUM_FAULTS_SHOWN else ""
        what = (
            f"1 line of {path.name} is no record and was"
            if len(bad) == 1
            else f"{len(bad):,} lines of {path.name} are no records and were"
        )
        faults.append(f"{what} left out: {shown}{more}")


def _config(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ConfigError as error:
        faults.append(str(error))
        return {}


def _json_object(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}")
        return {}
    return value if isinstance(value, dict) else {}


def _count(value: float | None) -> int:
    return int(value) if value is not None and math.isfinite(value) else 0


def moment(seconds: float | None) -> str:
    """A time of day in UTC, as the page writes it."""
    if seconds is None:
        return "unknown"
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"
