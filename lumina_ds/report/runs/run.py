"""What a run folder says about its run, read once, line by line, and forgiving: a crash may have cut any file short.

The report's pages and its JSON are made from RunRecord alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lumina_ds.config.load import read_yaml
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.report.line_plot import Point
from lumina_ds.report.runs.routing import LAYER_COLUMNS, LAYER_CURVES, layer_values
from lumina_ds.report.runs.series import ExpertUsage, Series

METRICS, EVALUATIONS, CONFIG, DEEPSPEED = "metrics.jsonl", "evaluations.jsonl", "config.yaml", "ds_config.json"
ENVIRONMENT = "environment.json"
# One place to add a series: its key in the metrics record; report_page.PLOTS draws it.
SCALARS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_bytes",
    "data_seconds",
    "step_seconds",
    "load_balancing_loss",
    "router_z_loss",
    "skipped",
    "anomaly_score",
    "straggler_ratio",
    "host_memory_available_bytes",
    "disk_free_bytes",
)
# Not in the records, but made from them: the load of the busiest expert of any layer.
BUSIEST = "busiest_expert"
_STEP_FOLDER = re.compile(r"step-\d{8}")
_NUM_FAULTS_SHOWN = 5
# A damaged line may hold any digits; beyond this it is no step.
_MAX_STEP = 1 << 40


@dataclass(frozen=True)
class Checkpoint:
    """A step folder: `fault` says why its manifest cannot be read. Files are not digested here."""

    name: str
    step: int
    num_bytes: int | None = None
    eval_loss: float | None = None
    marks: tuple[str, ...] = ()
    topology: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass
class RunRecord:
    """One run. `layers`: the last value of every metric that has one per MoE layer. `faults` are what could not be
    read, in words."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(
        default_factory=lambda: {name: Series() for name in (*SCALARS, BUSIEST, *LAYER_CURVES)}
    )
    experts: ExpertUsage = field(default_factory=ExpertUsage)
    layers: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[Point] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
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
    return (path / METRICS).is_file() or (path / CONFIG).is_file()


def runs_below(folder: Path) -> list[Path]:
    """The run folders directly in `folder`, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def read_run(path: Path) -> RunRecord:
    """Read a run folder, finished or not. Raises DataError when it is none."""
    if not is_run(path):
        raise DataError(f"{path} is no run folder: it holds neither {METRICS} nor {CONFIG}; give runs/NAME or runs")
    run = RunRecord(path)
    run.config = _config(path / CONFIG, run.faults)
    run.deepspeed = _json_object(path / DEEPSPEED, run.faults)
    if (path / ENVIRONMENT).exists():  # runs of earlier versions have none
        run.environment = _json_object(path / ENVIRONMENT, run.faults)
    for record in _records(path / METRICS, run.faults):
        _take(run, record)
    run.evaluations = [
        Point(record["step"], record["step"], loss, loss, loss)
        for record in _records(path / EVALUATIONS, run.faults)
        if (loss := _number(record.get("loss"))) is not None
    ]
    run.checkpoints = list(_checkpoints(path / "checkpoints"))
    return run


def _take(run: RunRecord, record: dict[str, Any]) -> None:
    step = record["step"]
    run.num_records += 1
    for name in SCALARS:
        if name in record:
            run.series[name].add(step, record[name])
    if record.get("expert_usage"):
        load = run.experts.add(step, record["expert_usage"])
        if load is not None:
            run.series[BUSIEST].add(step, load)
    for name in LAYER_COLUMNS:
        values = layer_values(record, name)
        if values is not None:
            run.layers[name] = values
            if name in LAYER_CURVES:
                run.series[name].add(step, LAYER_CURVES[name](values))
    run.last_step = max(run.last_step, step)
    run.tokens = max(run.tokens, int(_number(record.get("tokens")) or 0))
    run.skipped = max(run.skipped, int(_number(record.get("skipped")) or 0))
    moment = _number(record.get("time"))
    if moment is not None:
        run.first_time = moment if run.first_time is None else run.first_time
        run.last_time = moment


def _records(path: Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The whole records of a metrics file; other lines are named in `faults`."""
    bad: list[int] = []
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    record = None
                step = record.get("step") if isinstance(record, dict) else None
                if isinstance(record, dict) and type(step) is int and 0 <= step < _MAX_STEP:
                    yield record
                elif line.strip():
                    bad.append(number)
    except FileNotFoundError:
        return
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
    if bad:
        shown = ", ".join(str(number) for number in bad[:_NUM_FAULTS_SHOWN])
        more = ", ..." if len(bad) > _NUM_FAULTS_SHOWN else ""
        faults.append(f"{len(bad):,} lines of {path.name} are no records and were left out: {shown}{more}")


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


def _checkpoints(folder: Path) -> Iterator[Checkpoint]:
    pointers = {name: _pointer(folder / name) for name in ("latest", "best")}
    for path in sorted(folder.glob("step-*")):
        if not (path.is_dir() and _STEP_FOLDER.fullmatch(path.name)):
            continue
        step, marks = int(path.name.removeprefix("step-")), tuple(n for n, t in pointers.items() if t == path.name)
        faults: list[str] = []
        manifest = _json_object(path / "manifest.json", faults)
        try:
            num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
        except (KeyError, TypeError, AttributeError):
            yield Checkpoint(path.name, step, marks=marks, fault=faults[0] if faults else "manifest.json is damaged")
            continue
        topology = manifest.get("topology")
        yield Checkpoint(
            path.name,
            step,
            num_bytes,
            _number(manifest.get("eval_loss")),
            marks,
            topology if isinstance(topology, dict) else {},
        )


def _pointer(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def moment(seconds: float | None) -> str:
    """A time of day in UTC, as the page writes it."""
    if seconds is None:
        return "unknown"
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"
