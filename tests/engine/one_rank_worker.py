"""Trains alone, as we change DeepSpeed's engine and as it is, and prints whether weights are the same to the bit.

Changed are the reduction, and the norm of the gradients, which is taken block by block."""

import json
import sys

import torch

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine import build
from lumina_ds.engine.deepspeed import gradient_norm
from lumina_ds.engine.deepspeed.gradient_norm import measure_in_blocks
from lumina_ds.engine.deepspeed.one_rank import skip_reduction
from lumina_ds.engine.world import start, stop

MODEL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "max_position_embeddings": 32,
}  # fmt: skip
# Precision, stage, micro-batches of a step, and whether the reduction is left out.
CASES = [
    ("fp32", 0, 1, True),
    ("fp32", 0, 2, True),
    ("mixed_bf16", 0, 1, True),
    ("fp32", 1, 2, True),
    ("bf16", 1, 1, True),
    ("bf16", 1, 2, True),
    ("bf16", 2, 2, True),
    ("bf16", 3, 1, False),
]


def train(precision, stage, accumulation, skip, measure):
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": accumulation}
    config = RunConfig.model_validate({"model": MODEL, "train": settings, "deepspeed": {"zero_stage": stage}})
    build.skip_reduction, build.measure_in_blocks = skip, measure
    engine = build.build_engine(config, world, precision, compose_deepspeed(config, 1, precision))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for micro in range(accumulation):
            ids = torch.randint(64, (2, 32), generator=generator)
            engine.backward(engine(ids, labels=ids)[0] / 64, scale_wrt_gas=False)
            if micro == accumulation - 1 and not build.clips_by_itself(engine):
                build.clip_gradients(engine, 1.0)
            engine.step()
    with torch.no_grad():
        logits = engine(ids)
    engine.destroy()
    return logits


def skipped(engine):
    done.append(skip_reduction(engine))


def measured(engine):
    done.append(measure_in_blocks(engine))


gradient_norm._BLOCK = 100
world = start()
results = {}
for precision, stage, accumulation, expected in CASES:
    done = []
    same = torch.equal(
        train(precision, stage, accumulation, skipped, measured),
        train(precision, stage, accumulation, lambda _: 0, lambda _: 0),
    )
    results[f"{precision} ZeRO-{stage} x {accumulation}"] = [same, done == [expected, stage in (1, 2)]]
print(json.dumps(results))
sys.stdout.flush()
stop(0, clean=False)
