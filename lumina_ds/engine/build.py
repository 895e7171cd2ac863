"""From a configuration to a DeepSpeed engine whose experts are spread over ranks and whose routers are ours."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.precision import choose_compile
from lumina_ds.config.schema import RunConfig, TrainConfig
from lumina_ds.engine.allocate import allocate
from lumina_ds.engine.deepspeed.expert_parallel import fuse_combination, install_cpu_experts, install_routers
from lumina_ds.engine.deepspeed.gradient_norm import measure_in_blocks
from lumina_ds.engine.deepspeed.log_level import deepspeed_log_level
from lumina_ds.engine.deepspeed.meta_parameters import without_storage
from lumina_ds.engine.deepspeed.muon import muon_groups, use_plain_kernels
from lumina_ds.engine.deepspeed.one_rank import skip_reduction
from lumina_ds.engine.deepspeed.sequence_parallel import share_rows
from lumina_ds.engine.kernel_choice import choose_kernels
from lumina_ds.engine.weights import WeightSource, drawn_weights, fill_parameters, load_selection_biases, stored_weights
from lumina_ds.engine.world import World
from lumina_ds.model.attention_backends import choose_attention
from lumina_ds.model.balancing import selection_biases
from lumina_ds.model.transformer import CausalLM

log = logging.getLogger(__name__)

PARAMETER_DTYPES = {
    "fp32": torch.float32,
    "mixed_bf16": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Leave what is alive now, mostly imported modules, out of collections.

    DeepSpeed collects after each layer whose experts it spreads (DeepSpeedEngine._partition_autoep_zero3_experts), and
    each time Python would go through every imported module: half of the start of a model with 64 layers.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@imports_uncollected()
def build_engine(
    config: RunConfig, world: World, precision: str, deepspeed_json: dict[str, Any], fresh: bool = True
) -> Any:
    """A deepspeed.DeepSpeedEngine around CausalLM, freshly initialised from the configuration's seed or init_from.

    Every rank draws or reads its own part of the same weights, so a run starts alike under every layout and no rank
    holds more than its part. `fresh` is false where a checkpoint will replace them: then they are zeros, and the
    folder init_from need not be there any more.
    """
    import deepspeed

    attention = choose_attention(config, world.device, precision)
    log.info("attention: %s", attention.reason)
    fused = choose_kernels(config, world.device, precision)
    log.info("fused kernels: %s", fused.reason)
    with without_storage():
        model = CausalLM(
            config.model,
            backend=attention.backend,
            activation_checkpointing=config.train.activation_checkpointing,
            checkpoint_interval=config.train.checkpoint_interval,
            loss_chunk_tokens=config.train.loss_chunk_tokens,
            kernels=fused.kernels,
        )
    if world.sequence_parallel_size > 1:
        share_rows(model, world)
    weights = initial_weights(model, config) if fresh else None
    allocate(model, PARAMETER_DTYPES[precision], world.torch_device, deepspeed_json)
    if OPTIMIZERS[config.train.optimizer].own_kinds:
        use_plain_kernels(world.device)
    # AutoEP warns that its router has no z-loss; ours, which replaces it below, has.
    with deepspeed_log_level():
        engine, _, _, _ = deepspeed.initialize(
            model=model, model_parameters=_filled_groups(model, weights, config.train), config=deepspeed_json
        )
    skip_reduction(engine)
    if world.device == "cpu":
        measure_in_blocks(engine)
    if config.model.num_experts:
        install_routers(engine.module, config.model)
        if config.train.init_from is not None and fresh:
            load_selection_biases(engine.module, Path(config.train.init_from))
        if "combine" in fused.names:
            fuse_combination(engine.module)
        if world.device == "cpu":
            install_cpu_experts(engine.module, config.deepspeed.expert_parallel_size)
    compiles, reason = choose_compile(config, world.device)
    if config.train.compile != "off":
        log.info("%s", reason)
    if compiles:
        engine.compile()
    return engine


def release(engine: Any) -> None:
    """Destroy an engine and give its memory back, on the device too, even where something still refers to it.

    DeepSpeed's destroy() leaves parameters, gradients and moments to whoever holds the engine, in cycles. At ZeRO-3 the
    parameters stay alive all the same: something besides the engine holds them, as it did without this function.
    """
    engine.destroy()
    engine.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def initial_weights(model: nn.Module, config: RunConfig) -> WeightSource:
    """What a fresh run starts from: the folder train.init_from, or values drawn from train.seed."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.train.init_from is not None:
        biases = {name: tuple(bias.shape) for name, bias in selection_biases(model).items()}
        return stored_weights(shapes, Path(config.train.init_from), biases)
    return drawn_weights(shapes, config.model, config.train.seed)


def _filled_groups(model: CausalLM, weights: WeightSource | None, train: TrainConfig) -> Iterator[dict[str, Any]]:
    """The optimizer's groups, whose parameters are filled when DeepSpeed asks for them.

    It asks after it has cast, moved and partitioned the parameters and AutoEP has put its experts in, and before
    the optimizer takes its fp32 copy (deepspeed/runtime/engine.py, DeepSpeedEngine.__init__).
    """
    if weights is not None:
        fill_parameters(model, weights)
    yield from muon_groups(model, train) if OPTIMIZERS[train.optimizer].own_kinds else parameter_groups(model)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; norms do not. Names are needed by DeepSpeed, which splits the experts off by itself."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        # A ZeRO-3 partition is flat; ds_shape is what the parameter was.
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        (decay if is_matrix else no_decay).append(parameter)
    return [{"name": "decay", "params": decay}, {"name": "no_decay", "params": no_decay, "weight_decay": 0.0}]


def set_learning_rate(engine: Any, value: float, muon_factor: float = 1.0) -> None:
    """Set every group's rate for the coming step; Muon's groups get `muon_factor` times as much."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * muon_factor if group.get("use_muon") else value


def clips_by_itself(engine: Any) -> bool:
    """Whether DeepSpeed clips and reports the gradient norm: true for its ZeRO and 16-bit optimizers.

    ZeRO-0 in fp32 hands back the plain torch optimizer, reports no norm and would apply non-finite gradients.
    """
    return engine.zero_optimization_stage() > 0 or hasattr(engine.optimizer, "fp16_groups")


@torch.no_grad()
def clip_gradients(
    engine: Any, max_norm: float, refuses: Callable[[float], bool] = lambda norm: False
) -> tuple[float, bool]:
    """Clip the reduced gradients of a ZeRO-0 engine; return (norm, whether the step is sound).

    Expert gradients differ among the ranks of an expert-parallel group, so their squares are summed over it.
    A norm that is not finite, or that `refuses`, drops all gradients, which makes the optimizer's step do nothing
    on every rank.
    """
    import torch.distributed as dist
    from deepspeed.utils import groups

    dense, expert = [], []
    group_name = None
    for parameter in engine.module.parameters():
        if parameter.grad is None:
            continue
        if getattr(parameter, "allreduce", True):
            dense.append(parameter.grad)
        else:
            expert.append(parameter.grad)
            group_name = parameter.group_name
    device = next(engine.module.parameters()).device
    squares = torch.stack([_sum_of_squares(gradients).to(device) for gradients in (dense, expert)])
    if group_name is not None:
        expert_square = squares[1:].clone()
        dist.all_reduce(expert_square, group=groups._get_expert_parallel_group(group_name))
        squares[1:] = expert_square
    norm = squares.sum().sqrt()
    sound = bool(torch.isfinite(norm)) and not refuses(float(norm))
    if not sound:
        engine.module.zero_grad(set_to_none=True)
    elif max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # A product with one would only cost its pass over all gradients.
        for gradient in dense + expert if float(scale) < 1 else ():
            gradient.mul_(scale.to(gradient.dtype))
    return float(norm), sound


def _sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    if not gradients:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum().float()
