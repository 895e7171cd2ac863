"""What rank 0 shows and writes of a run: the console, the metrics files, the trackers. The other ranks' does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumina_ds.config.schema import RunSection
from lumina_ds.monitor.console import TrainingConsole
from lumina_ds.monitor.records import EvaluationRecord, StepRecord
from lumina_ds.monitor.trackers import open_trackers
from lumina_ds.monitor.writers import MetricsWriter, set_records_aside


class Outputs:
    """Lines may be said at once; records need `open` first."""

    def __init__(self, console: TrainingConsole, leads: bool) -> None:
        """`leads`: whether this is rank 0."""
        self.leads = leads
        self._console = console
        self._metrics: MetricsWriter | None = None

    def say(self, text: str) -> None:
        """A line above the bar and in the log."""
        if self.leads:
            self._console.say(text)

    def set_length(self, num_steps: int, last_step: int) -> None:
        """The steps of the run, and where this process ends; before a bar is shown."""
        self._console.num_steps, self._console.last_step = num_steps, last_step

    def start_anew(self, folder: Path) -> None:
        """Before `open`, where a run begins without a checkpoint: keep what an earlier life recorded, and say so."""
        last_step, kept = set_records_aside(folder) if self.leads else (0, [])
        if kept:
            self.say(
                f"no checkpoint to resume from: training starts anew at step 1; what an earlier life recorded, to step "
                f"{last_step}, is kept as {', '.join(kept)}"
            )

    def open(self, settings: RunSection, config: Mapping[str, Any], folder: Path, step: int) -> None:
        """Begin to write to the run folder, after `step`. Raises MachineError when a tracker cannot start."""
        if self.leads:
            self._metrics = MetricsWriter(folder, step, open_trackers(settings, folder, config, step))

    def show_progress(self, step: int) -> None:
        """From now on a bar stands on a terminal."""
        if self.leads:
            self._console.start(step)

    def record(self, record: StepRecord) -> None:
        """Write and show a step's record."""
        if self._metrics is not None:
            self._metrics.write(record)
            self._console.show(record)

    def evaluations(self, step: int, results: Mapping[str | None, Mapping[str, float]]) -> None:
        """Write and show evaluations, each under the name of its set, if it has one."""
        if self._metrics is None:
            return
        for name, result in results.items():
            counted = int(result["trained_tokens"])
            self._metrics.write_evaluation(EvaluationRecord(step, result["loss"], result["perplexity"], counted, name))
            of = "" if name is None else f" of {name}"
            self.say(f"evaluation{of} at step {step}: loss {result['loss']:.4f}, PPL {result['perplexity']:.2f}")

    def go_back(self, step: int) -> None:
        """Take out what was recorded after `step`."""
        if self._metrics is not None:
            self._metrics.go_back(step)

    def close(self) -> None:
        """Write what is held back, and finish the files."""
        if self._metrics is not None:
            self._metrics.close()

    def stop(self) -> None:
        """Take the bar away."""
        self._console.stop()

    def end_at_once(self) -> None:
        """What can still be written before the process ends, whatever comes of it."""
        self.stop()
        with contextlib.suppress(Exception):
            self.close()
