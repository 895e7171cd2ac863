"""On two ranks: one real step of every case, and what its live tensors weigh per component, the fullest rank's."""

import json
import sys

import torch
import torch.distributed as dist

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.world import start, stop
from lumina_ds.measure.live_tensors import (
    gradient_tensors,
    host_tensors,
    master_tensors,
    moment_tensors,
    num_bytes,
    parameter_tensors,
)
from lumina_ds.model.attention_backends import DocumentLayout

LENGTH = 8


def measure(case, world):
    config = RunConfig.model_validate(case["config"])
    composed = compose_deepspeed(config, world.size, case["precision"])
    if case["gradients"]:
        composed["data_types"] = {"grad_accum_dtype": case["gradients"]}
    engine = build_engine(config, world, case["precision"], composed)
    ids = (torch.arange(LENGTH) + world.rank)[None] % 32
    for _ in range(config.train.gradient_accumulation_steps):
        loss, balance, *_ = engine(
            input_ids=ids,
            labels=ids,
            position_ids=torch.arange(LENGTH)[None],
            padding_mask=torch.ones(1, LENGTH, dtype=torch.bool),
            documents=DocumentLayout.from_lengths((LENGTH,)),
        )[:2]
        engine.backward(loss + balance)
        gradients = num_bytes(gradient_tensors(engine))
        engine.step()
    if config.deepspeed.offload:
        # Everything else is offloaded with the same tensors, or, of gradients, passes through.
        found = {"host": num_bytes(host_tensors(engine))}
        if config.deepspeed.zero_stage < 3:
            found["parameters"] = num_bytes(parameter_tensors(engine))
        engine.destroy()
        return _of_the_fullest(found)
    found = {
        "parameters": num_bytes(parameter_tensors(engine)),
        "master weights": num_bytes(master_tensors(engine.optimizer)),
        "moments": num_bytes(moment_tensors(engine.optimizer)),
        "gradients": gradients,
    }
    engine.destroy()
    return _of_the_fullest(found)


def _of_the_fullest(found):
    fullest = torch.tensor(list(found.values()))
    dist.all_reduce(fullest, op=dist.ReduceOp.MAX)
    return dict(zip(found, fullest.tolist(), strict=True))


if __name__ == "__main__":
    world = start()
    measured = [measure(case, world) for case in json.loads(open(sys.argv[2]).read())]
    if world.rank == 0:
        with open(sys.argv[1], "w") as stream:
            json.dump(measured, stream)
    stop(0, clean=True)
