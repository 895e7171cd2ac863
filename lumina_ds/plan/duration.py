"""How long a run takes, what its checkpoints weigh, and what it costs, from FLOPs and an assumed utilization.

Model FLOPs utilization (MFU) is an assumption, not a result: published figures are its anchors, and communication
and data loading are inside it. Checkpoint sizes follow the files that training writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from lumina_ds.config.checks import world_faults
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.activations import recomputed_layers
from lumina_ds.plan.flops import flops_by_part
from lumina_ds.plan.hardware import Gpu
from lumina_ds.plan.memory import PARAMETER_BYTES
from lumina_ds.plan.parameters import count_parameters

# (utilization, where it was published), all on H100: the lower ends, since none was measured with this program.
MFU_DENSE = (0.35, "torchtitan reports 33 to 39 % for Llama 3 8B on 8 H100")
MFU_EXPERTS = (0.25, "NeMo AutoModel reports 28 % for Qwen3 30B-A3B on H100, Megatron-Bridge 20 to 30 %")
_RECOMPUTED_PARTS = {
    "none": (),
    "full": ("attention projections", "attention scores", "dense feed-forward", "router", "experts"),
    "attention": ("attention projections", "attention scores"),
    "experts": ("dense feed-forward", "router", "experts"),
}


@dataclass(frozen=True)
class CheckpointBytes:
    """Files of one checkpoint, over all ranks: fp32 weights with the optimizer's moments, and the whole weights."""

    optimizer_states: int
    weights: int

    @property
    def total(self) -> int:
        return self.optimizer_states + self.weights


@dataclass(frozen=True)
class TimePlan:
    """`flops` are per token and part; `tokens` what is trained in `steps` whole steps; `cost` is None without a
    price; `disk_bytes` the most that the run's checkpoints take at once."""

    name: str
    gpu: str
    world_size: int
    precision: str
    mfu: float
    mfu_source: str
    flops: Mapping[str, int]
    tokens_per_step: int
    steps: int
    tokens: int
    step_seconds: float
    total_seconds: float
    checkpoint: CheckpointBytes
    num_checkpoints: int
    disk_bytes: int
    cost: float | None

    @property
    def flops_per_token(self) -> int:
        return sum(self.flops.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.tokens_per_step / self.step_seconds

    @property
    def gpu_hours(self) -> float:
        return self.total_seconds * self.world_size / 3600


def plan_time(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    precision: str,
    tokens: int | None = None,
    mfu: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> TimePlan:
    """Time, disk and cost of training `tokens` (all epochs together), or `train.max_steps` where that is set.

    Raises ConfigError for a layout that cannot run, for fp32, whose rate is not tabulated, and without an end.
    """
    faults = world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    if precision not in ("bf16", "mixed_bf16", "fp16"):
        raise ConfigError(f"precision {precision} cannot be timed: the cards' rates are those of 16 bits; use bf16")
    train = config.train
    tokens_per_step = train.micro_batch_size * train.gradient_accumulation_steps * world_size * config.seq_length
    if train.max_steps is None and tokens is None:
        raise ConfigError("the length of the run is open; give --tokens, --data, or a configuration with max_steps")
    steps = train.max_steps or ceil((tokens or 0) / tokens_per_step)
    assumed, source = MFU_EXPERTS if config.model.num_experts else MFU_DENSE
    if mfu is not None:
        assumed, source = mfu, "as given"
    flops = flops_by_part(config.model, config.seq_length)
    performed = sum(flops.values()) + _recomputed_flops(config, flops)
    step_seconds = performed * tokens_per_step / (world_size * gpu.tflops * 1e12 * assumed)
    total = steps * step_seconds
    checkpoint = checkpoint_bytes(config, precision)
    saves = 1 + ((steps - 1) // train.save_every_n_batches if train.save_every_n_batches else 0)
    # The newest ones, the best one, and the one being written before an older one goes.
    kept = min(saves, train.keep_checkpoints + 2)
    return TimePlan(
        name=config.run_name,
        gpu=gpu.name,
        world_size=world_size,
        precision=precision,
        mfu=assumed,
        mfu_source=source,
        flops=flops,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        step_seconds=step_seconds,
        total_seconds=total,
        checkpoint=checkpoint,
        num_checkpoints=saves,
        disk_bytes=kept * checkpoint.total,
        cost=None if price_per_gpu_hour is None else total * world_size / 3600 * price_per_gpu_hour,
    )


def _recomputed_flops(config: RunConfig, flops: Mapping[str, int]) -> float:
    """Recomputing repeats the forward pass, a third of the counted work, of its parts of its blocks; never the head."""
    mode = config.train.activation_checkpointing
    layers = recomputed_layers(config.model, mode, config.train.checkpoint_interval)
    share = len(layers) / config.model.num_hidden_layers
    return share * sum(flops[part] for part in _RECOMPUTED_PARTS[mode]) / 3


def checkpoint_bytes(config: RunConfig, precision: str) -> CheckpointBytes:
    """Sizes of a checkpoint's files but for headers and random states, a few kilobytes each.

    They depend on no layout: every parameter is written once as fp32 with two moments, and once whole.
    """
    total = count_parameters(config.model).total
    return CheckpointBytes(optimizer_states=12 * total, weights=PARAMETER_BYTES[precision] * total)
