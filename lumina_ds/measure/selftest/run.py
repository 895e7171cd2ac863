"""The self-test from start to end: corpus, ranks by the deepspeed runner, comparisons."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import LuminaError, StalledError
from lumina_ds.measure.selftest.curves import Comparison, Curve, compare
from lumina_ds.measure.selftest.layouts import Layout, Pair, layouts_of, pairs_for
from lumina_ds.measure.selftest.shape import tiny_run
from lumina_ds.measure.selftest.task import PROGRESS_FILE, Task, curve_path
from lumina_ds.ranks.ask import MODULE, Question, question_words
from lumina_ds.ranks.runner import complete_runner_arguments, rank_environment, runner_command
from lumina_ds.ranks.supervise import end_marked
from lumina_ds.train.watch.orphans import start_variables

_LOG_CHARACTERS = 4000


class SelfTest:
    """What is going to be trained and compared; `run` does it."""

    def __init__(
        self, num_ranks: int, precisions: Sequence[str], num_steps: int, given: RunConfig | None = None
    ) -> None:
        self.num_ranks, self.num_steps = num_ranks, num_steps
        self.config, self.set_aside = tiny_run(num_ranks, given)
        num_experts: int = self.config["model"]["num_experts"]
        self.pairs = [pair for name in precisions for pair in pairs_for(num_ranks, num_experts, name)]

    def run(
        self, folder: Path, case_seconds: float, show: Callable[[str], None] = lambda line: None
    ) -> list[Comparison]:
        """Train everything with `folder` as workplace. `show` gets a line as each layout begins.

        Raises StalledError when no layout ends for `case_seconds`, and LuminaError when the ranks end with a failure.
        """
        from lumina_ds.measure.selftest.corpus import write_corpus

        write_corpus(folder)
        for num_ranks, layouts in self.starts().items():
            task = Task(self.config, layouts, self.num_steps, self.num_ranks)
            _run_ranks(task, folder, num_ranks, case_seconds, show)
        return compare_pairs(self.pairs, folder)

    def starts(self) -> dict[int, list[Layout]]:
        """Layouts by the number of ranks to start; plain PyTorch stays with the largest number."""
        found: dict[int, list[Layout]] = {}
        for layout in layouts_of(self.pairs):
            num_ranks = self.num_ranks if layout.zero is None else layout.num_ranks
            found.setdefault(num_ranks, []).append(layout)
        return found


def compare_pairs(pairs: Sequence[Pair], folder: Path) -> list[Comparison]:
    """The comparisons of stored curves."""
    curves = {layout: Curve.load(curve_path(folder, layout)) for layout in layouts_of(pairs)}
    return [compare(pair, curves[pair.left], curves[pair.right]) for pair in pairs]


def _run_ranks(task: Task, folder: Path, num_ranks: int, case_seconds: float, show: Callable[[str], None]) -> None:
    """One start of the deepspeed runner, ended with everything it started when it stalls or we are told to stop."""
    log, mark = folder / f"ranks-{num_ranks}.log", uuid.uuid4().hex
    question = Question("lumina_ds.measure.selftest.worker.answer", {"task": asdict(task), "folder": str(folder)})
    words, _ = question_words(question, folder)
    command = runner_command(complete_runner_arguments(["--num_gpus", str(num_ranks)]), words, MODULE)
    environment = {**rank_environment(), **start_variables(mark)}
    with open(log, "wb") as stream, _ended_by_signals():
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        try:
            _watch(process, folder / PROGRESS_FILE, case_seconds, show)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            end_marked(mark)
    if process.returncode:
        raise _failure(process.returncode % 256, log, folder / PROGRESS_FILE)


def _watch(process: subprocess.Popen[bytes], progress: Path, case_seconds: float, show: Callable[[str], None]) -> None:
    """Wait for the end; StalledError when no line is added to `progress` for `case_seconds`."""
    seen, since = len(_events(progress)), time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        events = _events(progress)
        for event in events[seen:]:
            since = time.monotonic()
            if event["event"] == "begins":
                show(event["layout"])
        seen = len(events)
        if time.monotonic() - since > case_seconds:
            at = f"at {events[-1]['layout']}" if events and events[-1]["event"] == "begins" else "between two layouts"
            raise StalledError(
                f"the self-test made no progress for {case_seconds:g} s, {at}; if the machine is only slow, raise "
                "--case-seconds"
            )


def _failure(code: int, log: Path, progress: Path) -> LuminaError:
    events = _events(progress)
    at = f" at {events[-1]['layout']}" if events and events[-1]["event"] == "begins" else ""
    tail = log.read_text(errors="replace")[-_LOG_CHARACTERS:]
    error = LuminaError(f"the ranks of the self-test ended with {code}{at}; the end of their output:\n{tail}")
    error.exit_code = code
    return error


def _events(progress: Path) -> list[dict[str, str]]:
    if not progress.exists():
        return []
    # The last line may still be half written.
    return [json.loads(line) for line in progress.read_text().split("\n")[:-1]]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end us like Ctrl-C does: through the code that ends the ranks."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
