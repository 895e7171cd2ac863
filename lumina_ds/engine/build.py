"""From a configuration to a DeepSpeed engine whose experts are spread over ranks and whose routers are ours."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.distributed import World
from lumina_ds.engine.expert_parallel import install_routers
from lumina_ds.errors import CheckpointError
from lumina_ds.model.attention_choice import choose_attention
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

log = logging.getLogger(__name__)


def build_engine(
    config: RunConfig, world: World, precision: str, deepspeed_json: dict[str, Any], fresh: bool = True
) -> Any:
    """A deepspeed.DeepSpeedEngine around CausalLM, freshly initialised from the configuration's seed or init_from.

    Every rank draws or reads the same weights, so a run starts alike under every layout. `fresh` is false where a
    checkpoint will replace them: then the folder init_from need not be there any more.
    """
    import deepspeed

    attention = choose_attention(config, world.device, precision)
    log.info("attention: %s", attention.reason)
    model = CausalLM(
        config.model,
        backend=attention.backend,
        activation_checkpointing=config.train.activation_checkpointing,
        checkpoint_interval=config.train.checkpoint_interval,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
    )
    if config.train.init_from is None or not fresh:
        initialize(model, config.model, config.train.seed)
    else:
        load_initial_weights(model, Path(config.train.init_from))
    level = deepspeed.utils.logger.level
    # AutoEP warns that its router has no z-loss; ours, which replaces it below, has.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=deepspeed_json)
    deepspeed.utils.logger.setLevel(level)
    if config.model.num_experts:
        install_routers(engine.module, config.model)
    if config.train.compile:
        engine.compile()
    return engine


@torch.no_grad()
def load_initial_weights(model: nn.Module, folder: Path) -> None:
    """Fill `model` from the safetensors files that the folder's index names, in our names, one tensor at a time.

    Raises CheckpointError, before a value is changed, when the folder has no such files or their names and
    shapes are not exactly the model's.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, list[int]] = {}
    try:
        names = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values()
        files = [safe_open(folder / name, framework="pt") for name in sorted(set(names))]
        for file in files:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"train.init_from {folder} holds no whole weights ({error}); `lumina import` makes such a folder"
        ) from error
    faults = [f"{name} is missing" for name in parameters if name not in found]
    faults += [f"{name} is not part of the configured model" for name in found if name not in parameters]
    faults += [
        f"{name} has shape {found[name]}, the configuration {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in found and list(parameter.shape) != found[name]
    ]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"train.init_from {folder} does not fit the section `model`: {'; '.join(faults[:8])}{more}; "
            "use the config.yaml of that folder"
        )
    for file in files:
        for name in file.keys():  # noqa: SIM118 - no mapping
            parameters[name].copy_(file.get_tensor(name))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; norms do not. Names are needed by DeepSpeed, which splits the experts off by itself."""
    parameters = list(model.parameters())
    return [
        {"name": "decay", "params": [p for p in parameters if p.dim() > 1]},
        {"name": "no_decay", "params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def set_learning_rate(engine: Any, value: float) -> None:
    """Set every group's rate for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def clips_by_itself(engine: Any) -> bool:
    """Whether DeepSpeed clips and reports the gradient norm: true for its ZeRO and 16-bit optimizers.

    ZeRO-0 in fp32 hands back the plain torch optimizer, reports no norm and would apply non-finite gradients.
    """
    return engine.zero_optimization_stage() > 0 or hasattr(engine.optimizer, "fp16_groups")


@torch.no_grad()
def clip_gradients(engine: Any, max_norm: float) -> tuple[float, bool]:
    """Clip the reduced gradients of a ZeRO-0 engine; return (norm, whether the step is sound).

    Expert gradients differ among the ranks of an expert-parallel group, so their squares are summed over it.
    A non-finite norm drops all gradients, which makes the optimizer's step do nothing on every rank.
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
    sound = bool(torch.isfinite(norm))
    if not sound:
        engine.module.zero_grad(set_to_none=True)
    elif max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in dense + expert:
            gradient.mul_(scale.to(gradient.dtype))
    return float(norm), sound


def _sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    if not gradients:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum().float()
