"""On two ranks: runs with NaNs and spikes injected into one rank's loss, at every stage and precision."""

import json
import os
import sys
from pathlib import Path

import fault_injection
import torch
import torch.distributed as dist

from lumina_ds.checkpoint.consolidate import full_parameters
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import on_rank_0, start, stop
from lumina_ds.errors import UnstableError
from lumina_ds.train import start as train_start

NAN = [(0, "fp32"), (0, "mixed_bf16")]
NAN += [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "mixed_bf16", "bf16")]
POLICIES = (0, 1, 2, 3)


def configuration(name, stage, precision, runs_dir, train=None, health=None):
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 64, "num_experts": 4,
                "moe_intermediate_size": 16, "tie_word_embeddings": True,
            },
            "train": {
                "micro_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 4,
                "warmup_ratio": 0.0, "precision": precision, **(train or {}),
            },
            "health": {"spike_warmup_steps": 4, "spike_window_steps": 8, **(health or {})},
            "deepspeed": {"zero_stage": stage, "expert_parallel_size": 2},
            "run": {"name": name, "runs_dir": runs_dir, "record_samples": True},
        }
    )  # fmt: skip


def run(config, faults, shards, world):
    """What the run came to on this rank."""
    os.environ["LUMINA_TEST_FAULTS"] = json.dumps(faults)
    injection.faults = [fault for fault in faults if fault["rank"] in (world.rank, "all")]
    found = {"error": None}
    try:
        train_start.train(config, shards, None, world)
    except UnstableError as error:
        found["error"] = str(error)
    engine = injection.run.engine
    found["finite"] = all(bool(torch.isfinite(p).all()) for _, p in full_parameters(engine) if p is not None)
    state = injection.run.state
    found |= {"step": state.step, "skipped": state.skipped, "rollbacks": state.rollbacks}
    every = [None] * world.size
    dist.all_gather_object(every, found)
    return every


def answers_of_rank_0(world):
    """Per rank: what on_rank_0 gives, and the error that it raises."""

    def refuse():
        raise UnstableError(f"rank {world.rank} refuses")

    found = [on_rank_0(world, lambda: {"rank": world.rank})]
    try:
        on_rank_0(world, refuse)
    except UnstableError as error:
        found.append(str(error))
    every = [None] * world.size
    dist.all_gather_object(every, found)
    return every


if __name__ == "__main__":
    result, runs_dir, shards = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    world = start()
    injection = fault_injection.Injection([])
    found = {"answers of rank 0": answers_of_rank_0(world)}
    for stage, precision in NAN:
        config = configuration(f"nan-{stage}-{precision}", stage, precision, runs_dir)
        found[config.run.name] = run(config, [{"kind": "nan", "rank": 1, "step": 2}], shards, world)
    for stage in POLICIES:
        for kind in ("spike", "gradient spike"):
            name = f"skip-{stage}-{kind.split()[0]}"
            config = configuration(name, stage, "fp32", runs_dir, {"max_steps": 8}, {"spike_policy": "skip"})
            faults = [{"kind": kind, "rank": 1, "step": 7, "times": 50.0}]
            found[name] = run(config, faults, shards, world)
    limit = configuration("limit", 2, "fp32", runs_dir, {"max_steps": 9}, {"max_consecutive_skips": 2})
    found["limit"] = run(limit, [{"kind": "nan", "rank": 0, "step": 3, "until": 9}], shards, world)
    if world.rank == 0:
        Path(result).write_text(json.dumps(found))
    stop(0, clean=True)
