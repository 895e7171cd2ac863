"""On two ranks: Muon at ZeRO-1 and 2, and offloaded AdamW, beside one process with whole gradients."""

import copy
import json
import sys

import torch
from deepspeed.runtime.zero.muon import original_muon
from parity_worker import ACCUMULATION, NUM_STEPS, WORLD, configuration, micro_batch, plain_model, train_engine

from lumina_ds.engine.deepspeed.muon import muon_groups, use_plain_kernels
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.engine.world import start, stop
from lumina_ds.train.step import model_inputs


def train_muon_plain(config):
    """Muon's update of every whole matrix, and of each expert, from whole gradients; AdamW for the rest."""
    use_plain_kernels("cpu")
    model, train = plain_model(config, config.train.seed), config.train
    groups = muon_groups(model, train)
    matrices = groups[0]["params"]
    momenta = [torch.zeros_like(p) for p in matrices]
    adamw = torch.optim.AdamW(groups[1:], lr=1.0, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon)
    losses = []
    for step in range(NUM_STEPS):
        units = [micro_batch(step, index, rank) for index in range(ACCUMULATION) for rank in range(WORLD)]
        num_trained, num_tokens = sum(u.num_trained_tokens for u in units), sum(u.num_tokens for u in units)
        loss = 0.0
        for unit in units:
            nll, balance, z_loss, _ = model(**model_inputs(unit, torch.device("cpu")))
            router = config.model.router_aux_loss_coef * balance + config.model.router_z_loss_coef * z_loss
            (nll / num_trained + router / num_tokens).backward()
            loss += nll.item() / num_trained
        rate = learning_rate(step, NUM_STEPS, train)
        with torch.no_grad():
            for matrix, momentum in zip(matrices, momenta, strict=True):
                update = original_muon.muon_update(
                    matrix.grad, momentum, beta=train.muon_momentum, is_expert_group=matrix.dim() == 3
                )
                matrix.mul_(1 - rate * train.muon_rate_factor * groups[0]["weight_decay"])
                matrix.sub_(rate * train.muon_rate_factor * update)
                matrix.grad = None
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        losses.append(loss)
    return losses


def changed(config, **train):
    config = copy.deepcopy(config)
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


if __name__ == "__main__":
    world = start()
    muon = {"optimizer": "muon", "muon_learning_rate": 0.01}
    curves = {"muon": {"plain": train_muon_plain(changed(configuration(1, 1), **muon))}}
    for stage, expert_parallel in ((1, 1), (1, 2), (2, 1), (2, 2)):
        config = changed(configuration(stage, expert_parallel), **muon)
        curves["muon"][f"zero{stage} ep{expert_parallel}"] = train_engine(config, world)["losses"]
    config = changed(configuration(2, 2), **muon)
    curves["muon bf16"] = train_engine(config, world, "bf16")["losses"]
    curves["adamw"] = {"zero1": train_engine(configuration(1, 2), world)["losses"]}
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "optimizer+params")):
        config = configuration(stage, 2)
        config.deepspeed.offload = offload
        curves["adamw"][f"zero{stage} offload {offload}"] = train_engine(config, world)["losses"]
    if world.rank == 0:
        with open(sys.argv[1], "w") as stream:
            json.dump(curves, stream)
    stop(0, clean=True)
