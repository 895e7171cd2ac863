"""Going back to a checkpoint in the middle of a run, and passing over the samples that made it necessary."""

from __future__ import annotations

from pathlib import Path

from lumina_ds.checkpoint.format import newest_valid, set_aside_later_steps
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.engine.world import World, on_rank_0
from lumina_ds.errors import UnstableError
from lumina_ds.monitor.writers import append_record
from lumina_ds.text import counted
from lumina_ds.train.health import Verdict

_NAMED = 4


def refuse_to_go_back_again(verdict: Verdict, rollbacks: int, most: int) -> None:
    """Raise UnstableError when a run has gone back `most` times already."""
    if rollbacks >= most:
        raise UnstableError(
            f"{verdict.message}; the run has gone back {counted(rollbacks, 'time')} already (health.max_rollbacks), so it ends; "
            "lower --learning-rate"
        )


def checkpoint_before(checkpoints: Path, first_bad_step: int, world: World) -> Path:
    """The newest sound checkpoint that holds no update of `first_bad_step` or later. A collective.

    Later ones, if any, are set aside: they hold updates from the samples that are now passed over. Raises UnstableError
    when there is nothing to go back to.
    """

    def choose() -> Path:
        set_aside_later_steps(checkpoints, first_bad_step - 1)
        found = newest_valid(checkpoints)
        if found is None:
            raise UnstableError(
                f"step {first_bad_step} calls for going back, and there is no checkpoint before it; "
                "set --save-every-n-batches"
            )
        return found

    return on_rank_0(world, choose)


def pass_over_samples(
    order: TrainingOrder, rows: PackedRows | MixedRows, steps: tuple[int, int], rows_per_step: int, record: Path | None
) -> str:
    """Take the rows of steps first..last (counted from 1) out of the order; returns a line that names them.

    All of them go to the file `record`, if given, with row, source and line of every conversation.
    """
    first, end = (steps[0] - 1) * rows_per_step, steps[1] * rows_per_step
    passed = order.pass_over(first, end - first)
    origins = [(row, origin) for row in passed for origin in rows.origins(row)]
    if record is not None:
        for row, origin in origins:
            append_record(record, {"steps": list(steps), "row": row, "source": origin.source, "line": origin.line})
    named = ", ".join(f"{origin.source}:{origin.line}" for _, origin in origins[:_NAMED])
    more = f" and {len(origins) - _NAMED} more in passed_over.jsonl" if len(origins) > _NAMED else ""
    return f"passed over from now on: {counted(len(passed), 'row')} of {counted(len(origins), 'conversation')}, {named}{more}"
