"""On two ranks: one real step of every case, and what its live tensors weigh per component, the fullest rank's."""

import json
import sys

import torch
import torch.distributed as dist

from lumina_ds.config.deepspeed import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.distributed import start, stop
from lumina_ds.model.attention_backends import DocumentLayout

LENGTH = 8


def num_bytes(tensors):
    """Memory that the tensors keep alive: each storage once, whatever views there are."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def parameter_tensors(engine):
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def master_tensors(optimizer):
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return []


def moment_tensors(optimizer):
    inner = getattr(optimizer, "optimizer", optimizer)
    return [state[key] for state in inner.state.values() for key in ("exp_avg", "exp_avg_sq")]


def gradient_tensors(engine):
    optimizer = engine.optimizer
    yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        yield optimizer.grad_partitions_flat_buffer
    for tensors in getattr(optimizer, "averaged_gradients", {}).values():
        yield from tensors or []
    yield from getattr(optimizer, "fp32_groups_gradients_flat", [])


def measure(case, world):
    config = RunConfig.model_validate(case["config"])
    composed = compose_deepspeed(config, world.size, case["precision"])
    if case["gradients"]:
        composed["data_types"] = {"grad_accum_dtype": case["gradients"]}
    engine = build_engine(config, world, case["precision"], composed)
    ids = (torch.arange(LENGTH) + world.rank)[None] % 32
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
    found = {
        "parameters": num_bytes(parameter_tensors(engine)),
        "master weights": num_bytes(master_tensors(engine.optimizer)),
        "moments": num_bytes(moment_tensors(engine.optimizer)),
        "gradients": gradients,
    }
    engine.destroy()
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
