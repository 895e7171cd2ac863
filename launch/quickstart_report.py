"""Last step of launch/quickstart.sh: check what the run left behind, and show it on one screen.

Exits 1 with every fault found, so that the quickstart never ends well by accident.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import click

from lumina_ds.checkpoint.manifest import step_name
from lumina_ds.cli.main import run_command
from lumina_ds.errors import LuminaError

Record = dict[str, Any]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=int, required=True, help="steps of the whole run")
@click.option("--stopped-at", type=int, required=True, help="step of the stop in between")
@click.option("--reply", type=click.Path(path_type=Path), required=True, help="output of `lumina generate --json`")
@click.option("--times", type=click.Path(path_type=Path), required=True, help="lines of SECONDS STAGE")
def command(run: Path, steps: int, stopped_at: int, reply: Path, times: Path) -> None:
    """Check RUN, then sum it up."""
    metrics, evaluations = read_records(run / "metrics.jsonl"), read_records(run / "evaluations.jsonl")
    answer = read_records(reply)[-1]
    faults = [
        *step_faults(metrics, steps),
        *evaluation_faults(evaluations, stopped_at, steps),
        *checkpoint_faults(run, stopped_at, steps),
        *([] if answer["reply"].strip() else ["the reply is empty"]),
    ]
    if faults:
        raise LuminaError("the quickstart failed: " + "; ".join(faults))
    click.echo(summary(run, metrics, evaluations, answer, stopped_at))
    click.echo(stage_times(times))
    click.echo(suggestions(run))


def read_records(path: Path) -> list[Record]:
    """One JSON object per line; LuminaError when there is none."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise LuminaError(f"the quickstart failed: cannot read {path} ({error})") from error
    if not records:
        raise LuminaError(f"the quickstart failed: {path} is empty")
    return records


def step_faults(metrics: list[Record], steps: int) -> list[str]:
    """Steps of 1..steps that metrics.jsonl lacks, holds twice, or has too many of: resuming must lose none."""
    counts = Counter(record["step"] for record in metrics)
    wanted = range(1, steps + 1)
    faults = {
        "lacks": [step for step in wanted if not counts[step]],
        "repeats": [step for step, count in counts.items() if count > 1],
        "goes beyond the end with": [step for step in counts if step not in wanted],
    }
    return [f"metrics.jsonl {what} step {_shortened(found)}" for what, found in faults.items() if found]


def evaluation_faults(evaluations: list[Record], stopped_at: int, steps: int) -> list[str]:
    """Evaluations missing at the start, the stop or the end, and a perplexity that did not halve."""
    perplexity = {record["step"]: record["perplexity"] for record in evaluations}
    missing = [step for step in (0, stopped_at, steps) if step not in perplexity]
    if missing:
        return [f"evaluations.jsonl lacks step {_shortened(missing)}"]
    before, after = perplexity[0], perplexity[steps]
    if before is None or after is None or not after <= before / 2:
        return [f"the evaluation perplexity went from {before} to {after} and did not halve"]
    return []


def checkpoint_faults(run: Path, stopped_at: int, steps: int) -> list[str]:
    """Checkpoints missing at the stop or the end; `lumina checkpoint verify` has looked into those that exist."""
    folders = [run / "checkpoints" / step_name(step) for step in (stopped_at, steps)]
    return [f"{folder} does not exist" for folder in folders if not folder.is_dir()]


def summary(run: Path, metrics: list[Record], evaluations: list[Record], answer: Record, stopped_at: int) -> str:
    perplexity = {record["step"]: record["perplexity"] for record in evaluations}
    last = metrics[-1]
    speed = median(record["tokens_per_second"] for record in metrics)
    lines = {
        "run folder": str(run),
        "steps": f"{last['step']}, stopped and resumed at {stopped_at}, none lost or repeated",
        "training loss": f"{metrics[0]['loss']:.3f} at first, {last['loss']:.3f} at last",
        "perplexity": f"{perplexity[0]:.1f} before, {perplexity[stopped_at]:.1f} at the stop, "
        f"{perplexity[last['step']]:.1f} after (held-out conversations)",
        "speed": f"{speed:,.0f} tokens per second (median of the steps), {last['tokens']:,} tokens in all",
        "prompt": answer["prompt"],
        "reply": " ".join(answer["reply"].split()),
    }
    return "\n".join(["", "The quickstart is done.", *(f"  {name:<14} {text}" for name, text in lines.items())])


def stage_times(path: Path) -> str:
    rows = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    total = sum(int(seconds) for seconds, _ in rows)
    return "\n".join(["", *(f"  {name.strip():<24}{seconds:>6} s" for seconds, name in [*rows, [str(total), "total"]])])


def suggestions(run: Path) -> str:
    return f"""
What to try next (the environment first: . .venv/bin/activate):
  lumina chat {run}
  lumina train --config debug --train-data YOUR.jsonl --tokenizer auto --epochs 1 --experiment-name mine
  lumina plan --config b7 --gpus 8 --zero 3 --expert-parallel 8
  lumina presets list"""


def _shortened(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


if __name__ == "__main__":
    sys.exit(run_command(command, prog_name="quickstart_report.py"))
