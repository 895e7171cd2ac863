"""On two ranks: a dense model whose rows are shared, under several ZeRO stages; and the plain model on whole rows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from parity_worker import ACCUMULATION, LENGTH, ROWS, micro_batch

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine, set_learning_rate
from lumina_ds.engine.world import start, stop
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM
from lumina_ds.train.step import agree, model_inputs, run_step

NUM_STEPS = 8


def configuration(stage: int, sharing: int, checkpointing: str = "none", backend: str = "auto") -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "intermediate_size": 40, "qk_norm": True,
                "initializer_range": 0.1,
            },
            "train": {
                "micro_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATION, "max_grad_norm": 1.0,
                "activation_checkpointing": checkpointing, "attention_backend": backend,
            },
            "deepspeed": {"zero_stage": stage, "sequence_parallel_size": sharing},
        }
    )  # fmt: skip


def train_shared(config: RunConfig, world):
    world = replace(world, sequence_parallel_size=config.deepspeed.sequence_parallel_size)
    engine = build_engine(config, world, "fp32", compose_deepspeed(config, world.size, "fp32"))
    losses, norms = [], []
    for step in range(NUM_STEPS):
        whole = [micro_batch(step, index, world.share.rank) for index in range(ACCUMULATION)]
        batches = [world.share.cut(batch) for batch in whole]
        assert all(batch.input_ids.shape == (ROWS, LENGTH // world.share.num_parts) for batch in batches)
        set_learning_rate(engine, 3e-3)
        outcome = run_step(engine, batches, agree(batches, False, world), config.model, 1.0, world)
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
    engine.destroy()
    return {"losses": losses, "norms": norms}


def train_plain(config: RunConfig):
    model = CausalLM(config.model)
    initialize(model, config.model, config.train.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    train = config.train
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(NUM_STEPS):
        units = [micro_batch(step, index, 0) for index in range(ACCUMULATION)]
        trained = sum(unit.num_trained_tokens for unit in units)
        loss = 0.0
        for unit in units:
            part = model(**model_inputs(unit, torch.device("cpu")))[0] / trained
            part.backward()
            loss += float(part)
        losses.append(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms}


def main(result: Path) -> None:
    world = start()
    cases = {
        "zero0": configuration(0, 2), "zero1": configuration(1, 2), "zero2 recomputed": configuration(2, 2, "full"),
        "zero3 reference kernel": configuration(3, 2, "none", "reference"),
    }  # fmt: skip
    found = {name: train_shared(config, world) for name, config in cases.items()}
    if world.rank == 0:
        found["plain"] = train_plain(configuration(0, 1))
        result.write_text(json.dumps(found))
    stop(0, clean=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
