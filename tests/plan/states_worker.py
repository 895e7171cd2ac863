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
    master_tensors,
    moment_tensors,
    num_bytes,
    parameter_tensors,
)
from lumina_ds.model.attention_backends import DocumentLayout

LENGTH = 8


def host_tensors(engine):
    """What offloading keeps in host memory; nothing without it. On a CPU, where all memory is that, what it would."""
    optimizer = engine.optimizer
    sections = engine.config.get("zero_optimization", {})
    if sections.get("offload_optimizer", {}).get("device", "none") == "none":
        return
    masters = master_tensors(optimizer)
    yield from masters
    yield from (master.grad for master in masters if master.grad is not None)
    yield from moment_tensors(optimizer)
    # Stages 1 and 2: 16-bit copies on their way back, one gradient on its way out, and what accumulates.
    yield from getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    yield from getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    if hasattr(optimizer, "temp_grad_buffer_for_cpu_offload"):
        yield optimizer.temp_grad_buffer_for_cpu_offload
    # Stage 3: gradients, and the parameters where they are offloaded.
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        yield optimizer.grad_partitions_flat_buffer
    if sections.get("offload_param", {}).get("device", "none") != "none":
        yield from (p.ds_tensor for p in engine.module.parameters())


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
