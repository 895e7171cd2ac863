"""Memory of a training run per rank: which components are alive in which phase, and which phase peaks.

Arithmetic only. The parts come from states.py (exact for DeepSpeed 0.19.8) and activations.py (counted
from what autograd saves); context, NCCL and margin are allowances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lumina_ds.config.checks import world_faults
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.config.tensors import cached_by_model, parameter_tensors
from lumina_ds.errors import ConfigError
from lumina_ds.plan.activations import activation_bytes
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.gathering import Gathered, Limits, Widths, gathered_bytes
from lumina_ds.plan.parameters import ParameterCounts, count_parameters
from lumina_ds.plan.peaks import GrowingGradients, Peak, backward_peaks, decoder_end, forward_peaks
from lumina_ds.plan.shape import PARAMETER_BYTES, ExpertLoad, Shape
from lumina_ds.plan.states import StateBytes, ZeroSettings, optimizer_groups, state_bytes
from lumina_ds.text import GIB

PHASES = ("forward", "backward", "step")
COMPONENTS = (
    "parameters",
    "master weights",
    "moments",
    "gradients",
    "buckets",
    "gathered parameters",
    "activations: attention",
    "activations: feed-forward",
    "activations: other",
    "activations: recomputed",
    "activation gradients",
    "logits and loss",
    "step temporaries",
    "all-to-all buffers",
    "offloaded states",
    "CUDA context and NCCL",
    "margin",
)

# Allowances, not measurements: a CUDA context with cuBLAS, then NCCL's buffers per set of communicators.
CUDA_CONTEXT = GIB // 2
_NCCL_WORLD = GIB // 2
_NCCL_EXPERTS = GIB // 4
# Fragmentation of the caching allocator and what is not modelled, as a share of everything else.
MARGIN = 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank (the fullest) by phase and component, with the layout that they hold for.

    `forward` includes the loss and its gradient; `shape` is what activations depend on; `peaks` are where the phases are highest, `states` the
    model's states as they are when the step begins; `decoder_end` is what the decoder's forward pass leaves behind;
    `host_bytes` is what offloading puts into the node's memory or onto NVMe for this rank.
    """

    name: str
    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str
    device: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    seq_length: int
    activation_checkpointing: str
    parameters: ParameterCounts
    flops_per_token: int
    shape: Shape
    peaks: Mapping[str, Peak]
    phases: Mapping[str, Mapping[str, int]]
    states: Mapping[str, int]
    decoder_end: int
    host_bytes: int

    def phase_bytes(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phase_bytes(self.peak_phase)

    @property
    def breakdown(self) -> Mapping[str, int]:
        """Components of the peak phase; they sum to `peak_bytes`."""
        return self.phases[self.peak_phase]


def plan_memory(
    config: RunConfig,
    world_size: int,
    precision: str,
    device: str = "cuda",
    deepspeed_json: Mapping[str, Any] | None = None,
    product_bytes: int | None = None,
    expert_load: ExpertLoad | None = None,
) -> MemoryPlan:
    """Plan one rank of `world_size` in a resolved `precision` on "cuda" or "cpu".

    `deepspeed_json` is a composed configuration; without it the run's own is composed. `product_bytes` is the width in
    which a CPU multiplies bf16 (model/cpu_products.py), `expert_load` what is assumed of routing. Raises ConfigError for a layout that cannot run.
    """
    if precision not in PARAMETER_BYTES:
        raise ConfigError(f"precision {precision!r} cannot be planned; use one of {', '.join(PARAMETER_BYTES)}")
    faults = world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    json = compose_deepspeed(config, world_size, precision) if deepspeed_json is None else deepspeed_json
    zero = ZeroSettings.from_json(json, PARAMETER_BYTES[precision])
    states = _states(config, zero, world_size, precision)
    shape = shape_of(config, zero, precision, device, product_bytes, expert_load)
    activations = activation_bytes(config.model, shape)
    gathered = _gathered(config, zero, world_size, precision)
    passes = (states, activations, gathered, _growing(config, zero, precision))
    experts = config.deepspeed.expert_parallel_size
    # On a CPU, offloading moves states within the same memory.
    always = {
        "parameters": states.parameters,
        "master weights": states.master_weights,
        "moments": states.moments,
        "offloaded states": states.host if device == "cpu" else 0,
    }
    fixed = _cuda_overhead(world_size, experts) if device == "cuda" else 0
    peaks = {
        "forward": _highest(forward_peaks(*passes), always),
        "backward": _highest(backward_peaks(*passes), always),
        "step": _highest(_step_peaks(states), always),
    }
    return MemoryPlan(
        name=config.run_name,
        world_size=world_size,
        expert_parallel_size=experts,
        zero_stage=zero.stage,
        precision=precision,
        device=device,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        seq_length=config.seq_length,
        activation_checkpointing=config.train.activation_checkpointing,
        parameters=count_parameters(config.model),
        flops_per_token=flops_per_token(config.model, config.seq_length),
        shape=shape,
        peaks=peaks,
        phases={phase: _components(peaks[phase], always, fixed) for phase in PHASES},
        states={
            "parameters": states.parameters,
            "master weights": states.master_weights,
            "moments": states.moments,
            "gradients": states.step_gradients,
        },
        decoder_end=decoder_end(activations, gathered),
        host_bytes=states.host,
    )


def shape_of(
    config: RunConfig,
    zero: ZeroSettings,
    precision: str,
    device: str,
    product_bytes: int | None = None,
    expert_load: ExpertLoad | None = None,
) -> Shape:
    """What the run's activations depend on."""
    train, deepspeed = config.train, config.deepspeed
    return Shape(
        tokens=train.micro_batch_size * config.seq_length // deepspeed.sequence_parallel_size,
        precision=precision,
        checkpointing=train.activation_checkpointing,
        interval=train.checkpoint_interval,
        expert_parallel_size=deepspeed.expert_parallel_size,
        loss_chunk=train.loss_chunk_tokens,
        device=device,
        product_bytes=product_bytes,
        plain_linear=zero.stage != 3,
        fused_loss=device == "cuda" and train.may_fuse_loss and not config.data.sources,
        load=expert_load or ExpertLoad(),
    )


def _states(config: RunConfig, zero: ZeroSettings, world_size: int, precision: str) -> StateBytes:
    experts = config.deepspeed.expert_parallel_size
    parameter_bytes = PARAMETER_BYTES[precision]
    # Under autocast DeepSpeed reduces matrices in bf16 and the rest in fp32, each in a bucket of its own.
    bucket_bytes = parameter_bytes
    if precision == "mixed_bf16":
        # Stages 1 and 2 make both as wide as the gradients (stage_1_and_2.py, setup_buckets).
        bucket_bytes = 6 if zero.stage == 3 else 8
    if world_size == 1 and _keeps_gradients_in_place(config, zero, parameter_bytes):
        zero = replace(zero, contiguous_gradients=False, reduce_bucket_size=0)
    return state_bytes(
        optimizer_groups(config.model, world_size, experts, config.train.optimizer),
        zero,
        parameter_bytes,
        bucket_bytes,
        config.train.gradient_accumulation_steps,
    )


def _keeps_gradients_in_place(config: RunConfig, zero: ZeroSettings, parameter_bytes: int) -> bool:
    """Whether a single rank makes no buckets (engine/deepspeed/one_rank.py)."""
    in_own_type = zero.gradient_bytes == parameter_bytes and zero.offload_optimizer == "none"
    return zero.stage in (1, 2) and in_own_type and not OPTIMIZERS[config.train.optimizer].own_kinds


def _step_peaks(states: StateBytes) -> Iterator[Peak]:
    """Between two micro-batches, and the optimizer's step."""
    waiting = {"gradients": states.resident_gradients, "buckets": states.resident_bucket}
    yield Peak("between", waiting | {"parameters": states.parameters})
    stepping = {"gradients": states.step_gradients, "buckets": states.step_bucket, "step temporaries": states.step}
    yield Peak("step", stepping | {"parameters": states.parameters - states.released})


def _highest(moments: Iterator[Peak], always: dict[str, int]) -> Peak:
    return max(moments, key=lambda moment: sum((always | moment.parts).values()))


def _components(moment: Peak, always: dict[str, int], fixed: int) -> dict[str, int]:
    """Every component at a moment, the margin last."""
    parts = dict.fromkeys(COMPONENTS, 0) | always | moment.parts
    parts["margin"] = round(MARGIN * sum(parts.values()))
    parts["CUDA context and NCCL"] = fixed
    return parts


def _growing(config: RunConfig, zero: ZeroSettings, precision: str) -> GrowingGradients:
    """Gradients beside the buckets: at stages 0 and 1 all that were made, else none but a head that waits."""
    model, size = config.model, PARAMETER_BYTES[precision]
    numels = _block_numels(model, config.deepspeed.expert_parallel_size)
    stay = size * (zero.stage < 2 and zero.offload_optimizer == "none")
    head = size * model.vocab_size * model.hidden_size
    down = stay * model.hidden_size * (model.intermediate_size or 0)
    return GrowingGradients(
        head=head,
        waiting=head if model.tie_word_embeddings or stay else 0,
        tied=model.tie_word_embeddings,
        last_matrix=tuple(0 if model.is_moe_layer(layer) else down for layer in range(len(numels))),
        block=tuple(stay * numel for numel in numels),
    )


@cached_by_model
def _block_numels(model: ModelConfig, expert_parallel_size: int) -> tuple[int, ...]:
    """Elements of every block on one rank."""
    blocks = [0] * model.num_hidden_layers
    for tensor in parameter_tensors(model):
        if tensor.name.startswith("model.layers."):
            share = expert_parallel_size if tensor.kind == "experts" else 1
            blocks[int(tensor.name.split(".")[2])] += tensor.numel // share
    return tuple(blocks)


def _gathered(config: RunConfig, zero: ZeroSettings, world_size: int, precision: str) -> Gathered:
    """What stage 3 holds of the parameters; a single rank's partition is the whole tensor, unless it is on the host."""
    on_host = zero.offload_param != "none"
    if zero.stage != 3 or (world_size == 1 and not on_host):
        return Gathered()
    experts = config.deepspeed.expert_parallel_size
    width = PARAMETER_BYTES[precision]
    return gathered_bytes(
        config.model,
        experts,
        zero.persistence_threshold,
        on_host or world_size > experts,
        Widths(width, 2 if precision == "mixed_bf16" else width),
        Limits(zero.prefetch_bucket_size, zero.max_live_parameters, zero.max_reuse_distance),
    )


def _cuda_overhead(world_size: int, expert_parallel_size: int) -> int:
    if world_size == 1:
        return CUDA_CONTEXT
    return CUDA_CONTEXT + _NCCL_WORLD + (_NCCL_EXPERTS if expert_parallel_size > 1 else 0)
