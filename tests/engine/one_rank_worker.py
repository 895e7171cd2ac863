"""Trains alone, as we change DeepSpeed's engine and as it is, and prints whether weights are the same to the bit.

Changed are the reduction, and the norm of the gradients, which is taken block by block. And what is said where DeepSpeed
lacks the function that a gate of the norm needs, has an optimizer that no gate can judge, or refuses to build."""

import json
import sys

import torch
from deepspeed.utils import logger

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine import build
from lumina_ds.engine.deepspeed import gradient_norm
from lumina_ds.engine.deepspeed.gradient_norm import measure_in_blocks
from lumina_ds.engine.deepspeed.one_rank import skip_reduction
from lumina_ds.engine.world import start, stop
from lumina_ds.errors import LuminaError

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


def configured(stage, accumulation=1):
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": accumulation}
    return RunConfig.model_validate({"model": MODEL, "train": settings, "deepspeed": {"zero_stage": stage}})


def train(precision, stage, accumulation, skip, measure):
    config = configured(stage, accumulation)
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


def said_by_a_gate(stage, precision="fp32", gradients=None, missing=None):
    """The error of a NormGate, or None; `missing` is a function that its optimizer's class then lacks."""
    config = configured(stage)
    composed = compose_deepspeed(config, 1, precision)
    if gradients:
        composed["data_types"] = {"grad_accum_dtype": gradients}
    engine = build.build_engine(config, world, precision, composed)
    owner = type(engine.optimizer)
    function = vars(owner)[missing] if missing else None
    if missing:
        delattr(owner, missing)
    try:
        gradient_norm.NormGate(engine, lambda norm: False)
        return None
    except LuminaError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if missing:
            setattr(owner, missing, function)
        engine.destroy()


def levels_around_a_refusal():
    """The level of DeepSpeed's logger before and after it has refused to build an engine."""
    config = configured(1)
    composed = compose_deepspeed(config, 1, "fp32")
    composed["optimizer"]["type"] = "NoSuchOptimizer"
    before = logger.level
    try:
        build.build_engine(config, world, "fp32", composed)
    except AssertionError:
        return [before, logger.level]
    raise RuntimeError("it was built")


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
build.skip_reduction, build.measure_in_blocks = skip_reduction, measure_in_blocks
print(
    json.dumps(
        {
            "same": results,
            "gates": [said_by_a_gate(stage) for stage in (0, 1, 2, 3)],
            "missing": [
                said_by_a_gate(stage, missing=name)
                for stage, name in ((1, "scaled_global_norm"), (2, "scaled_global_norm"), (3, "_get_norm_groups"))
            ],
            "of its own": said_by_a_gate(1, "bf16", "fp32"),
            "levels": levels_around_a_refusal(),
        }
    )
)
sys.stdout.flush()
stop(0, clean=False)
