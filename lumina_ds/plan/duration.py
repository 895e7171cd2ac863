"""How long a run takes, what its checkpoints weigh, and what it costs: from FLOPs and a utilization or a calibration.

Model FLOPs utilization (MFU) is an assumption, not a result, unless it was measured (plan/calibration.py): published
figures are its anchors, and communication and data loading are inside it. Checkpoint sizes follow the files that
training writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from lumina_ds.config.checks import world_faults
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.schema import RunConfig, TrainConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.calibration import Calibration
from lumina_ds.plan.flops import flops_by_part, performed_flops_per_token
from lumina_ds.plan.hardware import Gpu
from lumina_ds.plan.parameters import count_parameters
from lumina_ds.plan.shape import PARAMETER_BYTES
from lumina_ds.text import counted, format_bytes

# (utilization, where it was published), all on H100: the lower ends, since none was measured with this program.
MFU_DENSE = (0.35, "torchtitan reports 33 to 39 % for Llama 3 8B on 8 H100")
MFU_EXPERTS = (0.25, "NeMo AutoModel reports 28 % for Qwen3 30B-A3B on H100, Megatron-Bridge 20 to 30 %")
# What is written to the storage of checkpoints in a second, by all machines: one network file system, no local disks.
WRITE_BYTES_PER_SECOND = 1e9


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
    price; `disk_bytes` the most that the run's checkpoints take at once. `basis` is assumed or calibrated; `mfu` is
    None on a device whose peak is not known. `save_seconds` is the writing of one checkpoint, which training does
    not wait for where its copies fit the memory."""

    name: str
    gpu: str | None
    world_size: int
    precision: str
    basis: str
    mfu: float | None
    mfu_source: str
    flops: Mapping[str, int]
    tokens_per_step: int
    steps: int
    tokens: int
    step_seconds: float
    total_seconds: float
    checkpoint: CheckpointBytes
    num_checkpoints: int
    write_bytes_per_second: float
    save_seconds: float
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
    gpu: Gpu | None,
    precision: str,
    tokens: int | None = None,
    mfu: float | None = None,
    price_per_gpu_hour: float | None = None,
    calibration: Calibration | None = None,
) -> TimePlan:
    """Time, disk and cost of training `tokens` (all epochs together), or `train.max_steps` where that is set.

    With a `calibration` the measured rates of its machine take the place of the assumed ones, unless `mfu` is given;
    `gpu` may then be None, a device without a tabulated rate. Raises ConfigError for a layout that cannot run, for
    a rate that is not tabulated, as fp32's, and without an end.
    """
    faults = world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    train = config.train
    readers = world_size // config.deepspeed.sequence_parallel_size
    tokens_per_step = train.micro_batch_size * train.gradient_accumulation_steps * readers * config.seq_length
    if train.max_steps is None and tokens is None:
        raise ConfigError("the length of the run is open; give --tokens, --data, or a configuration with max_steps")
    steps = train.max_steps or ceil((tokens or 0) / tokens_per_step)
    flops = flops_by_part(config.model, config.seq_length)
    if calibration is not None and mfu is None:
        basis, source = "calibrated", f"measured on {calibration.host}, {calibration.date}"
        step_seconds = calibration.step_seconds(config)
        used = _utilization(sum(flops.values()) * tokens_per_step / world_size / step_seconds, gpu)
    else:
        basis = "assumed"
        step_seconds, used, source = _assumed(config, gpu, precision, mfu, tokens_per_step / world_size)
    total = steps * step_seconds
    checkpoint = checkpoint_bytes(config, precision)
    saves = num_saves(train, steps, step_seconds)
    # The newest ones, the best one, and the one being written before an older one goes.
    kept = min(saves, train.keep_checkpoints + 2)
    bandwidth = WRITE_BYTES_PER_SECOND if calibration is None else calibration.write_bytes_per_second
    return TimePlan(
        name=config.run_name,
        gpu=gpu.name if gpu else calibration.device if calibration else None,
        world_size=world_size,
        precision=precision,
        basis=basis,
        mfu=used,
        mfu_source=source,
        flops=flops,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        step_seconds=step_seconds,
        total_seconds=total,
        checkpoint=checkpoint,
        num_checkpoints=saves,
        write_bytes_per_second=bandwidth,
        save_seconds=checkpoint.total / bandwidth,
        disk_bytes=kept * checkpoint.total,
        cost=None if price_per_gpu_hour is None else total * world_size / 3600 * price_per_gpu_hour,
    )


def num_saves(train: TrainConfig, steps: int, step_seconds: float) -> int:
    """Checkpoints of a run of `steps`: by steps, by minutes since the last one, and at the end."""
    before_end = steps - 1
    by_steps = train.save_every_n_batches or before_end + 1
    by_minutes = ceil(60 * train.save_every_minutes / step_seconds) if train.save_every_minutes else before_end + 1
    blocks, rest = divmod(before_end, by_steps)
    return 1 + blocks * (1 + (by_steps - 1) // by_minutes) + rest // by_minutes


def describe_saves(train: TrainConfig, num_bytes: int) -> str:
    """One sentence on when a run saves, how much, and what stays."""
    when = [f"every {counted(train.save_every_n_batches, 'step')}"] if train.save_every_n_batches else []
    when += [f"every {train.save_every_minutes:g} minutes"] if train.save_every_minutes else []
    return (
        f"saves {', '.join(when)} and at the end" if when else "saves at the end only"
    ) + f", {format_bytes(num_bytes)} each; the newest {train.keep_checkpoints} and the best stay"


def _assumed(
    config: RunConfig, gpu: Gpu | None, precision: str, mfu: float | None, tokens_per_gpu: float
) -> tuple[float, float, str]:
    """Seconds of a step, the utilization they come from, and where that was published."""
    if gpu is None:
        raise ConfigError("an assumed utilization needs a card's rate; give --gpu, or --calibrate on this machine")
    if precision not in ("bf16", "mixed_bf16", "fp16"):
        raise ConfigError(
            f"precision {precision} cannot be timed: the cards' rates are those of 16 bits; use bf16, or --calibrate"
        )
    assumed, source = MFU_EXPERTS if config.model.num_experts else MFU_DENSE
    if mfu is not None:
        assumed, source = mfu, "as given"
    return performed_flops_per_token(config) * tokens_per_gpu / (gpu.tflops * 1e12 * assumed), assumed, source


def _utilization(flops_per_second: float, gpu: Gpu | None) -> float | None:
    return flops_per_second / (gpu.tflops * 1e12) if gpu else None


def checkpoint_bytes(config: RunConfig, precision: str) -> CheckpointBytes:
    """Sizes of a checkpoint's files but for headers and random states, a few kilobytes each.

    They depend on no layout: every parameter is written once as fp32 with the optimizer's states, and once whole.
    """
    total = count_parameters(config.model).total
    states = 4 + OPTIMIZERS[config.train.optimizer].moment_bytes
    return CheckpointBytes(optimizer_states=states * total, weights=PARAMETER_BYTES[precision] * total)
