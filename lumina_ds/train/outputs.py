"""What a run says of itself: its effective configuration, its first lines, and a record of every step.

Rank 0 writes and prints; the others only take part where something is asked of all of them.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.distributed import World
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.errors import ConfigError
from lumina_ds.monitor.trackers import open_trackers
from lumina_ds.monitor.writers import MetricsWriter
from lumina_ds.train.evaluate import perplexity
from lumina_ds.train.step import StepCounts, StepOutcome

if TYPE_CHECKING:
    from lumina_ds.train.loop import TrainingRun


def effective_config(run: TrainingRun) -> dict[str, Any]:
    """The configuration with the data as it really is, so that config.yaml starts the same run again."""
    made = run.rows.folder.manifest.settings
    shards = {"train_data": [], "eval_data": [], "eval_fraction": 0.0, "shards": str(run.rows.folder.path)}
    if run.eval_rows is not None:
        shards["eval_shards"] = str(run.eval_rows.folder.path)
    values = run.config.model_dump()
    return {**values, "data": {**values["data"], **shards, "packing": made.packing, "overlong": made.overlong}}


def open_outputs(run: TrainingRun, resumed_from: Path | None) -> None:
    """Rank 0: the files and trackers of the metrics, without records of later steps, and the run's first lines."""
    if not run.leads:
        return
    trackers = open_trackers(run.config.run, run.folder.path, effective_config(run), run.progress.step)
    run.metrics = MetricsWriter(run.folder.path, run.progress.step, trackers)
    run.outputs.callback(run.metrics.close)
    run.console.say(
        f"{run.config.run_name}: {run.num_steps} steps of {run.batch_rows} rows x {run.config.seq_length} "
        f"tokens, {run.console.strategy} ({run.precision_reason}), {run.world.size} "
        f"rank{'s' if run.world.size > 1 else ''} on {run.world.device}"
    )
    losses = run.rows.describe_losses()
    if losses:
        run.console.say(losses)
    if resumed_from is not None:
        run.console.say(f"resumed from {resumed_from}")
    run.console.start(run.progress.step)


def record_step(
    run: TrainingRun,
    outcome: StepOutcome,
    counts: StepCounts,
    seconds: float,
    data_seconds: float,
    anomaly_score: float,
) -> None:
    """Write and show what the step just done gave, where a record is due; every rank computes the samples' rows."""
    train, step = run.config.train, run.progress.step
    samples = step_samples(run) if run.config.run.record_samples else None
    if not run.leads or step % train.log_every_n_batches:
        return
    record: dict[str, Any] = {
        "step": step,
        "time": time.time(),
        "epoch": run.order.epoch_at(min(step * run.batch_rows, run.order.num_positions or sys.maxsize)),
        "loss": outcome.loss,
        "perplexity": perplexity(outcome.loss),
        "learning_rate": learning_rate(step - 1, run.num_steps, train),
        "grad_norm": outcome.grad_norm,
        "load_balancing_loss": outcome.load_balancing_loss,
        "router_z_loss": outcome.router_z_loss,
        "tokens": run.progress.tokens,
        "trained_tokens": counts.trained_tokens,
        "step_seconds": seconds,
        "tokens_per_second": counts.tokens / seconds,
        "data_seconds": data_seconds,
        "memory_bytes": memory_bytes(run.world),
        "skipped": run.progress.skipped,
        "anomaly_score": anomaly_score,
        **run.watchdog.metrics,
        **outcome.routing.record(overflows=run.config.model.overflow_policy != "dropless"),
    }
    if samples is not None:
        record["samples"] = samples
    run.metrics.write(record)
    run.console.show(record)


def step_samples(run: TrainingRun) -> list[int]:
    """Packed rows of the step just done, all ranks together; a pure function of the step, so nothing is sent."""
    first = (run.progress.step - 1) * run.batch_rows
    return [run.order.row_at(position) for position in range(first, first + run.batch_rows)]


def planned_length(config: RunConfig, num_rows: int, batch_rows: int) -> tuple[int, int | None]:
    """(steps of the whole run, rows after which only empty filler follows).

    With epochs, the last batch is filled up with empty rows, so that every row is seen exactly `epochs` times.
    """
    train = config.train
    if train.max_steps is not None:
        return train.max_steps, None
    total_rows = round(train.epochs * num_rows)
    if total_rows == 0:
        raise ConfigError(f"train.epochs {train.epochs} of {num_rows} rows is no row at all; raise --epochs")
    return math.ceil(total_rows / batch_rows), total_rows


def memory_bytes(world: World) -> int:
    """Peak memory allocated on the card, or the resident memory of this process on a CPU."""
    if world.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
