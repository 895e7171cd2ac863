"""The checks at the end of the quickstart: a sound run passes, and each fault is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "quickstart_report.py"

Records = list[dict[str, Any]]


class Quickstart:
    """What a sound quickstart of four steps, stopped at two, leaves behind."""

    def __init__(self) -> None:
        self.metrics: Records = [
            {"step": step, "loss": 8 - step, "tokens": 100 * step, "tokens_per_second": 1000.0 * step}
            for step in (1, 2, 3, 4)
        ]
        self.evaluations: Records = [
            {"step": step, "perplexity": perplexity} for step, perplexity in ((0, 1000.0), (2, 700.0), (4, 500.0))
        ]
        self.checkpoints = ["step-00000002", "step-00000004"]
        self.reply = "fine,\nthanks"

    def report(self, folder: Path) -> subprocess.CompletedProcess[str]:
        run = folder / "run"
        for name in self.checkpoints:
            (run / "checkpoints" / name).mkdir(parents=True)
        run.mkdir(exist_ok=True)
        for name, records in (("metrics.jsonl", self.metrics), ("evaluations.jsonl", self.evaluations)):
            (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "reply.json").write_text(
            json.dumps({"prompt": "How are you?", "reply": self.reply, "step": 4}) + "\n"
        )
        (folder / "times.txt").write_text("61 environment\n7 training, first half\n")
        options = ["--steps", "4", "--stopped-at", "2", "--reply", "reply.json", "--times", "times.txt"]
        return subprocess.run(
            [sys.executable, str(SCRIPT), "run", *options], cwd=folder, capture_output=True, text=True
        )


def test_a_sound_quickstart_is_summed_up(tmp_path: Path) -> None:
    done = Quickstart().report(tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "4, stopped and resumed at 2",
        "1000.0 before, 700.0 at the stop, 500.0 after",
        "7.000 at first, 4.000 at last",
        "2,500 tokens per second (median of the steps), 400 tokens in all",
        "fine, thanks",
        "lumina chat run",
    ):
        assert text in done.stdout
    assert [line.split() for line in done.stdout.splitlines() if line.endswith(" s")] == [
        ["environment", "61", "s"],
        ["training,", "first", "half", "7", "s"],
        ["total", "68", "s"],
    ]


FAULTS: dict[str, tuple[Callable[[Quickstart], Any], str]] = {
    "lost step": (lambda left: left.metrics.pop(2), "metrics.jsonl lacks step 3"),
    "repeated step": (lambda left: left.metrics.append(left.metrics[1]), "metrics.jsonl repeats step 2"),
    "step too far": (lambda left: left.metrics.append({"step": 5}), "goes beyond the end with step 5"),
    "no evaluation before": (lambda left: left.evaluations.pop(0), "evaluations.jsonl lacks step 0"),
    "perplexity": (lambda left: left.evaluations[2].update(perplexity=500.1), "from 1000.0 to 500.1 and did not halve"),
    "infinite": (lambda left: left.evaluations[2].update(perplexity=None), "to None and did not halve"),
    "checkpoint": (lambda left: left.checkpoints.pop(0), "step-00000002 does not exist"),
    "reply": (lambda left: setattr(left, "reply", " \n"), "the reply is empty"),
    "empty metrics": (lambda left: left.metrics.clear(), "metrics.jsonl is empty"),
}


@pytest.mark.parametrize(("harm", "says"), FAULTS.values(), ids=FAULTS)
def test_every_fault_ends_the_quickstart(tmp_path: Path, harm: Callable[[Quickstart], Any], says: str) -> None:
    left = Quickstart()
    harm(left)
    done = left.report(tmp_path)
    assert done.returncode == 1
    assert says in done.stderr
    assert "is done" not in done.stdout
    assert "Traceback" not in done.stderr
