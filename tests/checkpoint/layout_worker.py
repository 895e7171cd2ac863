"""On one rank or two: load a checkpoint into engines of other layouts, and save each again."""

import json
import sys
import weakref
from pathlib import Path

from tiny_run import configuration

from lumina_ds.checkpoint.format import find_checkpoint, step_folders
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.checkpoint.saver import CheckpointSaver
from lumina_ds.checkpoint.state import restore_engine
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.engine.build import build_engine, release
from lumina_ds.engine.world import start, stop
from lumina_ds.train.start import train


def layout(runs_dir, name, stage, expert_parallel, world_size, **train_fields):
    config = configuration(name, 2, "fp32", runs_dir, **train_fields)  # one model for all stages
    config.deepspeed.zero_stage = stage
    config.deepspeed.expert_parallel_size = expert_parallel
    config.train.gradient_accumulation_steps = 4 // world_size  # the same rows in a step
    config.run.name = name
    return config


def copy_through(config, world, precision, source, target):
    """Load `source` into an engine of this layout and save it from there."""
    engine = build_engine(config, world, precision, compose_deepspeed(config, world.size, precision), fresh=False)
    manifest = read_manifest(source)
    restore_engine(engine, source, manifest)
    saver = CheckpointSaver(target, source / "tokenizer.model", world, keep=1, num_bytes=0, background=False)
    saver.save(engine, manifest)
    outcome = saver.finish()
    assert outcome.error is None, outcome
    saver.close()
    weight = weakref.ref(next(engine.module.parameters()))
    release(engine)
    held_elsewhere = config.deepspeed.zero_stage == 3  # engine/build.py
    assert weight() is None or held_elsewhere, "a released engine still holds its parameters"


if __name__ == "__main__":
    result, tasks, shards, eval_shards = sys.argv[1:]
    world = start()
    for task in json.loads(tasks):
        runs_dir = task.pop("runs_dir")
        if "copy" in task:
            source, target = find_checkpoint(step_folders(Path(task.pop("copy")))[-1]), Path(task.pop("into"))
            target.mkdir(parents=True, exist_ok=True)
            copy_through(layout(runs_dir, "copy", world_size=world.size, **task), world, "fp32", source, target)
        else:
            train(layout(runs_dir, world_size=world.size, **task), Path(shards), Path(eval_shards), world)
    if world.rank == 0:
        Path(result).write_text(json.dumps({"world": world.size}))
    stop(0, clean=True)
