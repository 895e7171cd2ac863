"""On two ranks: two steps of engines whose optimizer, attention, router score and schedule are the toys added_entries.py.

Writes, for each ZeRO stage, the losses and rates, the bytes and names of the optimizer's states, and the plan's bytes."""

import json
import sys

import added_entries
import torch
import torch.distributed as dist
from parity_worker import configuration, rank_batches

from lumina_ds.checkpoint.pieces import pieces_of_rank
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine, set_learning_rate
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.engine.world import start, stop
from lumina_ds.measure.live_tensors import moment_tensors, num_bytes
from lumina_ds.plan import plan_memory
from lumina_ds.train.step import agree, run_step

NUM_STEPS = 2


def with_toys(stage):
    values = configuration(stage, 1 + (stage > 1)).model_dump()
    for field, name in added_entries.NAMES.items():
        section, _, key = field.partition(".")
        values[section][key] = name
    values["train"]["warmup_ratio"] = 0.0
    return RunConfig.model_validate(values)


def train(stage, world):
    config = with_toys(stage)
    composed = compose_deepspeed(config, world.size, "fp32")
    engine = build_engine(config, world, "fp32", composed)
    losses, rates = [], []
    for step in range(NUM_STEPS):
        batches = rank_batches(step, world.rank, config)
        rates.append(learning_rate(step, NUM_STEPS, config.train))
        set_learning_rate(engine, rates[-1])
        counts = agree(batches, False, world)
        losses.append(run_step(engine, batches, counts, config.model, 1.0, world).loss)
    held = torch.tensor(num_bytes(moment_tensors(engine.optimizer)))
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    keys = sorted({key for piece in pieces_of_rank(engine, divided=True) for key in piece.tensors()})
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    engine.destroy()
    return {
        "losses": losses,
        "rates": rates,
        "optimizer": type(inner).__name__,
        "untested": composed.get("zero_allow_untested_optimizer"),
        "keys": keys,
        "held": int(held),
        "planned": plan_memory(config, world.size, "fp32", "cpu", composed).states["moments"],
    }


if __name__ == "__main__":
    added_entries.add()
    world = start()
    found = {stage: train(stage, world) for stage in (0, 1, 2, 3)}
    found["attention calls"] = len(added_entries.CALLS)
    if world.rank == 0:
        with open(sys.argv[1], "w") as stream:
            json.dump(found, stream)
    stop(0, clean=True)
