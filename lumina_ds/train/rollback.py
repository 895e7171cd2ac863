"""Going back to a checkpoint in the middle of a run, and passing over the samples that made it necessary."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lumina_ds.checkpoint.format import newest_valid, set_aside_later_steps
from lumina_ds.checkpoint.state import load_checkpoint
from lumina_ds.errors import LuminaError, UnstableError
from lumina_ds.monitor.writers import append_record

if TYPE_CHECKING:
    from lumina_ds.train.health import Verdict
    from lumina_ds.train.run import TrainingRun

log = logging.getLogger(__name__)

_NAMED = 4


def go_back(run: TrainingRun, verdict: Verdict) -> None:
    """Restore the checkpoint before the verdict's bad steps and pass over their samples. A collective.

    Raises UnstableError when the run has gone back often enough, or has nothing to go back to.
    """
    step, rollbacks = run.progress.step, run.progress.rollbacks
    if rollbacks >= run.config.health.max_rollbacks:
        raise UnstableError(
            f"{verdict.message}; the run has gone back {rollbacks} times already (health.max_rollbacks), so it ends; "
            "lower --learning-rate"
        )
    first_bad_step = step - verdict.bad_steps + 1
    run.settle_saves()
    run.take(load_checkpoint(run.engine, checkpoint_before(run, first_bad_step)))
    run.progress.rollbacks = rollbacks + 1
    named = pass_over_samples(run, max(run.progress.step + 1, first_bad_step), step)
    run.last_step = run.planned_last_step()
    if run.leads:
        run.metrics.go_back(run.progress.step)
        log.warning("back to step %d after step %d; %s", run.progress.step, step, named)


def checkpoint_before(run: TrainingRun, first_bad_step: int) -> Path:
    """The newest sound checkpoint that holds no update of `first_bad_step` or later. A collective.

    Later ones, if any, are set aside: they hold updates from the samples that are now passed over.
    """
    answer: list[Any] = [None]
    if run.leads:
        try:
            set_aside_later_steps(run.folder.checkpoints, first_bad_step - 1)
            answer[0] = newest_valid(run.folder.checkpoints)
        except LuminaError as error:
            answer[0] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], LuminaError):
        raise answer[0]
    if answer[0] is None:
        raise UnstableError(
            f"step {first_bad_step} calls for going back, and there is no checkpoint before it; "
            "set --save-every-n-batches"
        )
    return answer[0]


def pass_over_samples(run: TrainingRun, first_step: int, last_step: int) -> str:
    """Take the rows of steps first..last (counted from 1) out of the order; returns a line that names them.

    All of them go to passed_over.jsonl in the run folder, with row, source and line of every conversation.
    """
    first, end = (first_step - 1) * run.batch_rows, last_step * run.batch_rows
    rows = [row for row in run.order.pass_over(first, end - first) if row >= 0]
    origins = [(row, origin) for row in rows for origin in run.rows.origins(row)]
    if run.leads:
        for row, origin in origins:
            append_record(
                run.folder.path / "passed_over.jsonl",
                {"steps": [first_step, last_step], "row": row, "source": origin.source, "line": origin.line},
            )
    named = ", ".join(f"{origin.source}:{origin.line}" for _, origin in origins[:_NAMED])
    more = f" and {len(origins) - _NAMED} more in passed_over.jsonl" if len(origins) > _NAMED else ""
    return f"passed over from now on: {len(rows)} rows of {len(origins)} conversations, {named}{more}"
