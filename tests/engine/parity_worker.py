"""On two ranks: train the same tiny MoE under ZeRO 0-3 and expert parallel size 1 and 2, fp32; write the curves."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lumina_ds.checkpoint.consolidate import full_parameters
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.engine import weights
from lumina_ds.engine.build import build_engine, set_learning_rate
from lumina_ds.engine.world import start, stop
from lumina_ds.measure.selftest import training
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM
from lumina_ds.train.routing import noise_seeds
from lumina_ds.train.step import agree, run_step

NUM_STEPS, ROWS, LENGTH, ACCUMULATION, WORLD = 10, 2, 24, 2, 2


def configuration(stage: int, expert_parallel: int, checkpointing: str = "none", **model: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "num_experts": 4,
                "moe_intermediate_size": 24, "num_shared_experts": 1, "first_k_dense_layers": 1,
                "intermediate_size": 40, "qk_norm": True, "tie_word_embeddings": True, "initializer_range": 0.1,
                "router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.001, **model,
            },
            "train": {
                "micro_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 6e-3,
                "warmup_ratio": 0.1, "max_grad_norm": 1.0, "activation_checkpointing": checkpointing,
            },
            "deepspeed": {"zero_stage": stage, "expert_parallel_size": expert_parallel},
        }
    )  # fmt: skip


def micro_batch(step: int, index: int, rank: int, model: ModelConfig | None = None) -> MicroBatch:
    """Two rows of two documents and padding; ranks and steps hold different numbers of trained tokens."""
    rng = np.random.default_rng([step, index, rank])
    ids = np.zeros((ROWS, LENGTH), np.int64)
    labels = np.full((ROWS, LENGTH), -100, np.int64)
    positions = np.zeros((ROWS, LENGTH), np.int64)
    real = np.zeros((ROWS, LENGTH), bool)
    lengths = []
    for row in range(ROWS):
        first, second = rng.integers(4, 11, 2)
        begin = 0
        for length in (first, second):
            span = slice(begin, begin + length)
            # Each token is its predecessor plus the document's stride: learnable, so the loss really falls.
            ids[row, span] = (rng.integers(64) + rng.integers(1, 3) * np.arange(length)) % 64
            labels[row, begin : begin + length - 1] = ids[row, begin + 1 : begin + length]
            positions[row, span] = np.arange(length)
            real[row, span] = True
            begin += length
        labels[row, : rng.integers(1, 5)] = -100
        positions[row, begin:] = np.arange(LENGTH - begin)
        lengths += [int(first), int(second), LENGTH - begin]
    return MicroBatch(
        input_ids=ids, labels=labels, position_ids=positions, document_lengths=tuple(lengths),
        num_trained_tokens=int((labels != -100).sum()), num_tokens=int(real.sum()), row_ids=(0,) * ROWS,
        padding_mask=real,
        row_seeds=None if model is None else noise_seeds(model, 7, step, [8 * index + 4 * rank, 8 * index + 4 * rank + 1]),
    )  # fmt: skip


def plain_model(config, seed):
    plain = CausalLM(config.model)
    initialize(plain, config.model, seed)
    return plain


def starts_like(engine, plain):
    """Whether every parameter, put together from all ranks, has the bits of the plain model."""
    expected = dict(plain.named_parameters())
    found = {name: tensor for name, tensor in full_parameters(engine) if tensor is not None}
    return not found or (
        found.keys() == expected.keys() and all(torch.equal(found[n], expected[n].to(found[n].dtype)) for n in found)
    )


def train_engine(config, world, precision="fp32", num_steps=NUM_STEPS):
    engine = build_engine(config, world, precision, compose_deepspeed(config, world.size, precision))
    exact_start = starts_like(engine, plain_model(config, config.train.seed))
    curve = training.train_engine(engine, config, lambda step: rank_batches(step, world.rank, config), num_steps, world)
    engine.destroy()
    return as_results(curve) | {"exact_start": exact_start, "usage": curve.routing[-1]["expert_usage"]}


def rank_batches(step, rank, config):
    return [micro_batch(step, index, rank, config.model) for index in range(ACCUMULATION)]


def as_results(curve):
    return {name: value for name, value in vars(curve).items() if name != "gradients"}


def skip_a_poisoned_step(config, world, precision):
    """One sound step, one whose loss is not a number on every rank, one sound again: what each did to the weights."""
    engine = build_engine(config, world, precision, compose_deepspeed(config, world.size, precision))
    poisoned = config.model.model_copy(update={"router_aux_loss_coef": float("nan")})
    found = []
    for step, model in enumerate((config.model, poisoned, config.model)):
        before = [tensor for _, tensor in full_parameters(engine)]
        batches = [micro_batch(step, index, world.rank) for index in range(ACCUMULATION)]
        set_learning_rate(engine, 1e-3)
        outcome = run_step(engine, batches, agree(batches, False, world), model, 1.0, world)
        after = [tensor for _, tensor in full_parameters(engine)]
        if world.rank == 0:
            changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            finite = all(torch.isfinite(tensor).all().item() for tensor in after)
            found.append({"skipped": outcome.skipped, "changed": changed, "finite": finite})
    engine.destroy()
    return found


def starts_from_a_folder(world, folder):
    """Engines of several layouts that read their parts of stored weights, by their partitions and by gathering."""
    plain = plain_model(configuration(0, 1), seed=7)
    if world.rank == 0:
        parameters = dict(plain.named_parameters())
        save_file({name: parameter.detach() for name, parameter in parameters.items()}, folder / "a.safetensors")
        index = {"weight_map": dict.fromkeys(parameters, "a.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.distributed.barrier()
    found = {}
    plain_partitions = weights._is_plain_partition
    for stage, expert_parallel, gather in ((0, 2, False), (1, 2, False), (3, 1, False), (3, 2, False), (3, 2, True)):
        config = configuration(stage, expert_parallel)
        config.train.init_from = str(folder)
        weights._is_plain_partition = (lambda parameter: False) if gather else plain_partitions
        engine = build_engine(config, world, "fp32", compose_deepspeed(config, world.size, "fp32"))
        found[f"zero{stage} ep{expert_parallel} gathered={gather}"] = starts_like(engine, plain)
        engine.destroy()
    weights._is_plain_partition = plain_partitions
    return found


def train_plain(config, num_steps=NUM_STEPS):
    def batches_of(step):
        return [batch for rank in range(WORLD) for batch in rank_batches(step, rank, config)]

    model = plain_model(config, config.train.seed)
    return as_results(training.train_plain(model, config, batches_of, num_steps))


if __name__ == "__main__":
    world = start()
    curves = {"plain": train_plain(configuration(0, 1))}
    for stage in (0, 1, 2, 3):
        for expert_parallel in (1, 2):
            curves[f"zero{stage} ep{expert_parallel}"] = train_engine(configuration(stage, expert_parallel), world)
    for stage, mode in ((0, "full"), (3, "full"), (2, "attention"), (3, "experts")):
        recomputing = configuration(stage, 2, mode)
        recomputing.train.loss_chunk_tokens = 7
        curves[f"zero{stage} ep2 checkpointing {mode}"] = train_engine(recomputing, world)
    for precision, stage in (("bf16", 1), ("bf16", 2), ("bf16", 3), ("mixed_bf16", 0), ("mixed_bf16", 2)):
        curves[f"{precision} zero{stage}"] = train_engine(configuration(stage, 2), world, precision)
    skips = (("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 2), ("mixed_bf16", 0))
    curves["poisoned"] = {
        f"{precision} zero{stage}": skip_a_poisoned_step(configuration(stage, 2), world, precision)
        for precision, stage in skips
    }
    curves["from a folder"] = starts_from_a_folder(world, Path(sys.argv[1]).parent)
    odd = configuration(2, 2)
    odd.model.hidden_size, odd.model.head_dim, odd.model.moe_intermediate_size = 30, 8, 21
    curves["odd widths plain"], curves["odd widths"] = train_plain(odd), train_engine(odd, world)
    if world.rank == 0:
        with open(sys.argv[1], "w") as stream:
            json.dump(curves, stream)
    stop(0, clean=True)
