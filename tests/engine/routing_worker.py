"""On two ranks: every routing policy under ZeRO 0-3 and expert parallel size 1 and 2, and in the plain model."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from parity_worker import configuration, plain_model, train_engine, train_plain
from safetensors.torch import save_file

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.world import start, stop
from lumina_ds.model.balancing import selection_biases

NUM_STEPS = 6
# Few tokens for the capacity, so that choices really overflow.
DROP = {"overflow_policy": "drop", "capacity_factor": 1.0}
REROUTE = {"overflow_policy": "reroute", "capacity_factor": 1.0}
BIAS = {
    "scoring_func": "sigmoid", "router_bias_update_rate": 0.05, "router_aux_loss_coef": 1e-3,
    "router_aux_loss_scope": "sequence",
}  # fmt: skip
POLICIES = {
    "drop": DROP,
    "reroute": REROUTE | {"num_experts_per_tok": 3},
    "noise": {"router_jitter_noise": 0.3, "expert_dropout": 0.2},
    "bias": BIAS,
    "global": {"router_aux_loss_coef": 0.5},
    "micro-batch": {"router_aux_loss_coef": 0.5, "router_aux_loss_scope": "micro_batch", "norm_topk_prob": False},
    "dynamic": REROUTE | {"min_capacity_factor": 0.5, "max_capacity_factor": 1.5},
    "all": BIAS
    | DROP
    | {"router_jitter_noise": 0.3, "expert_dropout": 0.2, "num_experts_per_tok": 1}
    | {"min_capacity_factor": 0.5, "max_capacity_factor": 1.5},
}
# Every stage and size, the kinds of recomputation in turn; the last policy under all of them.
LAYOUTS = [(stage, size, ("none", "full", "experts")[(stage + size) % 3]) for stage in (0, 1, 2, 3) for size in (1, 2)]


def chosen_layouts(number, name):
    return LAYOUTS if name == "all" else (LAYOUTS[number % 8], LAYOUTS[(5 * number + 3) % 8])


def bias_after_starting_from(folder, world):
    """The selection biases of an engine whose init_from holds some, which bf16 could not hold."""
    config = configuration(2, 2, **BIAS)
    plain = plain_model(config, seed=7)
    for bias in selection_biases(plain).values():
        bias.copy_(torch.linspace(0.1234567, 0.7654321, len(bias)))
    if world.rank == 0:
        tensors = {name: tensor.detach() for name, tensor in plain.named_parameters()} | selection_biases(plain)
        save_file(tensors, folder / "a.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.distributed.barrier()
    config.train.init_from = str(folder)
    engine = build_engine(config, world, "bf16", compose_deepspeed(config, world.size, "bf16"))
    found = [
        {name: bias.tolist() for name, bias in selection_biases(module).items()} for module in (plain, engine.module)
    ]
    engine.destroy()
    return found


if __name__ == "__main__":
    world = start()
    found = {}
    for number, (name, model) in enumerate(POLICIES.items()):
        curves = {"plain": train_plain(configuration(0, 1, **model), NUM_STEPS)}
        for stage, size, checkpointing in chosen_layouts(number, name):
            config = configuration(stage, size, checkpointing, **model)
            curves[f"zero{stage} ep{size} {checkpointing}"] = train_engine(config, world, num_steps=NUM_STEPS)
        found[name] = curves
    found["started"] = bias_after_starting_from(Path(sys.argv[1]).parent, world)
    if world.rank == 0:
        with open(sys.argv[1], "w") as stream:
            json.dump(found, stream)
    stop(0, clean=True)
