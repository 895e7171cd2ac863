"""Memory of a training run per rank: which components are alive in which phase, and which phase peaks.

Arithmetic only. The parts come from states.py (exact for DeepSpeed 0.19.8) and activations.py (counted
from what autograd saves); context, NCCL and margin are allowances.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lumina_ds.config.checks import world_faults
from lumina_ds.config.deepspeed import compose_deepspeed
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.config.tensors import parameter_tensors
from lumina_ds.errors import ConfigError
from lumina_ds.plan.activations import ActivationBytes, activation_bytes
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.hardware import GIB
from lumina_ds.plan.parameters import ParameterCounts, count_parameters
from lumina_ds.plan.states import StateBytes, ZeroSettings, optimizer_groups, state_bytes

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
    "logits and loss",
    "step temporaries",
    "all-to-all buffers",
    "offloaded states",
    "CUDA context and NCCL",
    "margin",
)

# Allowances, not measurements: a CUDA context with cuBLAS, then NCCL's buffers per set of communicators.
_CUDA_CONTEXT = GIB // 2
_NCCL_WORLD = GIB // 2
_NCCL_EXPERTS = GIB // 4
# Fragmentation of the caching allocator and what is not modelled, as a share of everything else.
_MARGIN = 0.05
PARAMETER_BYTES = {"fp32": 4, "mixed_bf16": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank (the fullest) by phase and component, with the layout that they hold for.

    `forward` includes the loss and its gradient; `host_bytes` is what offloading puts into the node's memory
    or onto NVMe for this rank.
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
    phases: Mapping[str, Mapping[str, int]]
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
) -> MemoryPlan:
    """Plan one rank of `world_size` in a resolved `precision` on "cuda" or "cpu".

    `deepspeed_json` is a composed configuration; without it the run's own is composed. Raises ConfigError
    for a layout that cannot run.
    """
    if precision not in PARAMETER_BYTES:
        raise ConfigError(f"precision {precision!r} cannot be planned; use one of {', '.join(PARAMETER_BYTES)}")
    faults = world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    json = compose_deepspeed(config, world_size, precision) if deepspeed_json is None else deepspeed_json
    model, experts = config.model, config.deepspeed.expert_parallel_size
    zero = ZeroSettings.from_json(json, PARAMETER_BYTES[precision])
    states = _states(config, zero, world_size, precision)
    activations = activation_bytes(
        model,
        config.train.micro_batch_size * config.seq_length // config.deepspeed.sequence_parallel_size,
        precision,
        config.train.activation_checkpointing,
        experts,
        config.train.checkpoint_interval,
        config.train.loss_chunk_tokens,
        device,
        fused_loss=device == "cuda" and config.train.may_fuse_loss,
    )
    copies = _autocast_copies(model, experts) if precision == "mixed_bf16" else 0
    fixed = _cuda_overhead(world_size, experts) if device == "cuda" else 0
    # On a CPU, offloading moves states within the same memory.
    offloaded = states.host if device == "cpu" else 0
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
        parameters=count_parameters(model),
        flops_per_token=flops_per_token(model, config.seq_length),
        phases={phase: _phase(phase, states, activations, copies, offloaded, fixed) for phase in PHASES},
        host_bytes=states.host,
    )


def _states(config: RunConfig, zero: ZeroSettings, world_size: int, precision: str) -> StateBytes:
    experts = config.deepspeed.expert_parallel_size
    parameter_bytes = PARAMETER_BYTES[precision]
    # Under autocast DeepSpeed reduces matrices in bf16 and the rest in fp32, each in a bucket of its own.
    bucket_bytes = 6 if precision == "mixed_bf16" else parameter_bytes
    return state_bytes(
        optimizer_groups(config.model, world_size, experts, config.train.optimizer),
        zero,
        parameter_bytes,
        bucket_bytes,
        config.train.gradient_accumulation_steps,
        _largest_module(config.model, experts),
    )


def _phase(
    phase: str, states: StateBytes, activations: ActivationBytes, copies: int, offloaded: int, fixed: int
) -> dict[str, int]:
    """The highest moment of a phase. In the backward pass activations go as gradients come, so that its peak is at
    its beginning, with every activation, or at its end, with every gradient."""
    parts = dict.fromkeys(COMPONENTS, 0)
    parts["parameters"] = states.parameters
    parts["master weights"] = states.master_weights
    parts["moments"] = states.moments
    parts["offloaded states"] = offloaded
    if phase == "step":
        parts["gradients"] = states.step_gradients
        parts["buckets"] = states.resident_bucket
        parts["step temporaries"] = states.step
    elif phase == "forward":
        parts |= _with_activations(states, activations, copies)
        parts["buckets"] = states.resident_bucket
        parts["logits and loss"] = activations.logits
    else:
        begins = parts | _with_activations(states, activations, copies)
        begins["buckets"] = states.early_bucket
        begins["activations: recomputed"] = activations.recomputed
        begins["activations: other"] += activations.workspace
        ends = parts | {"gradients": states.gradients, "buckets": states.bucket}
        ends["gathered parameters"] = states.gathered
        parts = max(begins, ends, key=lambda moment: sum(moment.values()))
    parts["margin"] = round(_MARGIN * sum(parts.values()))
    parts["CUDA context and NCCL"] = fixed
    return parts


def _with_activations(states: StateBytes, activations: ActivationBytes, copies: int) -> dict[str, int]:
    return {
        "gradients": states.resident_gradients,
        "gathered parameters": states.gathered + copies,
        "activations: attention": activations.attention,
        "activations: feed-forward": activations.feed_forward,
        "activations: other": activations.other,
        "all-to-all buffers": activations.all_to_all,
    }


def _autocast_copies(model: ModelConfig, expert_parallel_size: int) -> int:
    """bf16 copies of the matrices, which autocast caches in the forward pass and autograd keeps for the backward;
    AutoEP casts its own rank's experts to the input's type. The router and the embedding's look-up take no part."""
    cast = ("attention", "shared_experts", "dense_feed_forward", "head")
    tied_head = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
    tensors = list(parameter_tensors(model))
    experts = sum(tensor.numel for tensor in tensors if tensor.kind == "experts") // expert_parallel_size
    return 2 * (tied_head + experts + sum(tensor.numel for tensor in tensors if tensor.kind in cast))


def _largest_module(model: ModelConfig, expert_parallel_size: int) -> int:
    """Elements of the module that owns the most parameters; stage 3 gathers a module's tensors together."""
    modules: defaultdict[str, int] = defaultdict(int)
    for tensor in parameter_tensors(model):
        share = expert_parallel_size if tensor.kind == "experts" else 1
        modules[tensor.name.rsplit(".", 1)[0] if tensor.kind == "experts" else tensor.name] += tensor.numel // share
    return max(modules.values())


def _cuda_overhead(world_size: int, expert_parallel_size: int) -> int:
    if world_size == 1:
        return _CUDA_CONTEXT
    return _CUDA_CONTEXT + _NCCL_WORLD + (_NCCL_EXPERTS if expert_parallel_size > 1 else 0)
