"""On two ranks: a batch that is chosen, trained with and kept on resume; and one that rank 1 has no memory for."""

import json
import resource
import sys
from pathlib import Path

import psutil
import torch.distributed as dist
from tiny_run import configuration

from lumina_ds.engine.world import start, stop
from lumina_ds.measure.batch_size import settle_batch
from lumina_ds.plan import plan_memory
from lumina_ds.plan.batch import with_batch
from lumina_ds.train.start import train

# Of one micro-batch; large beside what a process takes without it.
MANY = 2048


def automatic(name, runs_dir, **fields):
    config = configuration(name, 1, "fp32", runs_dir, **fields)
    config.train.auto_micro_batch = True
    return config


def settle_with_little_memory(config, world):
    """Rank 1 may take half of what the plan says the first choice needs, by a limit of the kernel's.

    The limit is of address space, of which the allocator takes more than the plan counts, by how much is the
    machine's: the first choice of 4096 rows was seen to take 2.4 GB, half of it 2.2 to 2.4, a quarter 1.4 to 1.6.
    """
    plan = plan_memory(with_batch(config, MANY, 1), world.size, "fp32", "cpu")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if world.rank == 1:
        limit = psutil.Process().memory_full_info().data + plan.peak_bytes // 2
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    chosen = settle_batch(config, world)
    resource.setrlimit(resource.RLIMIT_DATA, before)
    return chosen, plan.peak_bytes


if __name__ == "__main__":
    result, runs_dir, shards = sys.argv[1:]
    world = start()
    # 2 x 2 x 2 ranks: eight rows a step, of which four are a rank's.
    for stop_at in (2, None):
        train(automatic("auto", runs_dir, max_steps=4, stop_at_step=stop_at), Path(shards), None, world, settle_batch)
    train(configuration("given", 1, "fp32", runs_dir, max_steps=4), Path(shards), None, world)
    scarce = automatic("scarce", runs_dir, micro_batch_size=MANY, gradient_accumulation_steps=1)
    chosen, planned = settle_with_little_memory(scarce, world)
    batches = [None, None]
    dist.all_gather_object(batches, [chosen.train.micro_batch_size, chosen.train.gradient_accumulation_steps])
    if world.rank == 0:
        Path(result).write_text(json.dumps({"batches": batches, "planned": planned}))
    stop(0, clean=True)
