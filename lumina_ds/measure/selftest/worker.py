"""What a rank of `lumina selftest` runs: its share of every layout that has as many ranks as were started.

Rank 0 leaves a curve per layout in the work folder, and a line per layout that begins or ends, from which the parent
sees where a hang or a failure was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.world import World
from lumina_ds.measure.selftest.corpus import Corpus
from lumina_ds.measure.selftest.curves import Curve
from lumina_ds.measure.selftest.layouts import Layout
from lumina_ds.measure.selftest.task import PROGRESS_FILE, Task, configuration, curve_path
from lumina_ds.measure.selftest.training import starve, train_engine, train_plain
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM
from lumina_ds.monitor.writers import append_record


def answer(task: Mapping[str, Any], folder: str, world: World) -> None:
    """`run_layouts`, asked for by the parent. A collective."""
    run_layouts(Task.of(task), Path(folder), world)


def run_layouts(task: Task, folder: Path, world: World) -> None:
    """Train every layout of the task and store its curve. A collective."""
    corpus = Corpus(folder, task.max_ranks)
    for layout in task.layouts:
        config = configuration(task.config, layout, corpus.rows_per_step)
        _tell(folder, world, layout, "begins")
        curve = _train(config, layout, corpus, task.num_steps, world)
        if world.rank == 0:
            curve.save(curve_path(folder, layout))
        _tell(folder, world, layout, "ends")


def _train(config: RunConfig, layout: Layout, corpus: Corpus, num_steps: int, world: World) -> Curve:
    """What rank 0 returns is the layout's curve; plain PyTorch trains there alone."""

    def batches_of(step: int) -> list[MicroBatch]:
        return corpus.batches(layout, step, world.rank)

    if layout.zero is None:
        if world.rank:
            return Curve()
        model = CausalLM(config.model, loss_chunk_tokens=0)
        initialize(model, config.model, config.train.seed)
        if layout.starved:
            starve(model)
        return train_plain(model, config, batches_of, num_steps)
    engine = build_engine(config, world, layout.precision, compose_deepspeed(config, world.size, layout.precision))
    if layout.starved:
        starve(engine.module)
    curve = train_engine(engine, config, batches_of, num_steps, world)
    engine.destroy()
    return curve


def _tell(folder: Path, world: World, layout: Layout, event: str) -> None:
    if world.rank == 0:
        append_record(folder / PROGRESS_FILE, {"event": event, "layout": f"{layout} in {layout.precision}"})
