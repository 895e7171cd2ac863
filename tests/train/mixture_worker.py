"""Runs on two sources: whole, stopped and resumed as it was or with other weights; on as many ranks as there are."""

import json
import sys
from pathlib import Path

from tiny_run import configuration

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import start, stop
from lumina_ds.errors import LuminaError
from lumina_ds.train.start import train

result, runs_dir, sums, few, *lives = sys.argv[1:]
WEIGHTS = {"sums": 1.0, "few": 1.0}


def run(world, name, weights=None, caps=None, **fields):
    """A run of 8 rows a step on any number of ranks."""
    fields = {"micro_batch_size": 4 // world.size, "max_steps": 8, "save_every_n_batches": 2, **fields}
    values = configuration(name, 2, "fp32", runs_dir, eval_every_n_batches=4, eval_max_rows=8, **fields).model_dump()
    entries = [
        {"name": each, "shards": folder, "weight": (weights or WEIGHTS)[each], "cap": (caps or {}).get(each)}
        for each, folder in (("sums", sums), ("few", few))
        if each in (weights or WEIGHTS)
    ]
    sets = [{"name": "a", "shards": sums}, {"name": "b", "shards": few, "weight": 3}]
    values["data"] |= {"sources": entries, "eval_sets": sets}
    values["deepspeed"]["expert_parallel_size"] = 1
    try:
        train(RunConfig.model_validate(values), None, None, world)
    except LuminaError as error:
        return str(error)
    return None


LIVES = {
    "whole": lambda world: run(world, "whole", best_by="b"),
    "half": lambda world: run(world, "half", stop_at_step=4),
    "rest": lambda world: run(world, "half"),
    "half of another": lambda world: run(world, "changed", stop_at_step=4),
    "rest by other weights": lambda world: run(world, "changed", {"sums": 3.0, "few": 1.0}),
    "after a kill": lambda world: run(world, "killed", best_by="b"),
    "capped": lambda world: run(world, "capped", caps={"sums": 0.1, "few": 1}),
    "one source less": lambda world: run(world, "changed", {"sums": 3.0}),
    "no such set": lambda world: run(world, "refused", best_by="c"),
}


if __name__ == "__main__":
    world = start()
    said = {life: LIVES[life](world) for life in lives}
    if world.rank == 0:
        Path(result).write_text(json.dumps(said))
    stop(0, clean=True)
