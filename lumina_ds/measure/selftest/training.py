"""The same few steps, once by plain PyTorch and once by a DeepSpeed engine, as curves that can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lumina_ds.checkpoint.pieces import pieces_of_rank
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.engine.build import parameter_groups, set_learning_rate
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.engine.world import World
from lumina_ds.measure.selftest.curves import Curve
from lumina_ds.model.balancing import capacity_factors, routers, routing_state, update_balance
from lumina_ds.train.routing import RoutingMetrics, RoutingTotals
from lumina_ds.train.step import agree, model_inputs, run_step

_FIRST_MOMENT = "exp_avg"


def train_plain(
    model: nn.Module, config: RunConfig, batches_of: Callable[[int], Sequence[MicroBatch]], num_steps: int
) -> Curve:
    """One process on the CPU, the plain forward, torch's own AdamW and clipping: what engines are measured against.

    `batches_of` gives all micro-batches of a step.
    """
    train, weights = config.train, config.model
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=1.0, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )  # fmt: skip
    curve = Curve()
    for step in range(num_steps):
        units = batches_of(step)
        num_trained, num_tokens = sum(u.num_trained_tokens for u in units), sum(u.num_tokens for u in units)
        loss, measured = 0.0, torch.zeros(())
        for unit in units:
            nll, balance, z_loss, parts = model(**model_inputs(unit, torch.device("cpu")))
            router = weights.router_aux_loss_coef * balance + weights.router_z_loss_coef * z_loss
            (nll / num_trained + router / num_tokens).backward()
            loss += nll.item() / num_trained
            measured = measured + parts.double()
        curve.trained_tokens.append(num_trained)
        curve.losses.append(loss)
        curve.norms.append(nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, train)
        optimizer.step()
        optimizer.zero_grad()
        totals = RoutingTotals(measured, weights.num_experts)
        if weights.num_experts:
            update_balance(model, totals.assignments_LE, totals.overflow_L)
        _add_routing(curve, totals.metrics(capacity_factors(model)), totals.load_balancing_loss)
        if step in (0, num_steps - 1):
            moments = {name: optimizer.state[p][_FIRST_MOMENT].numpy() for name, p in model.named_parameters()}
            _add_gradients(curve, moments, step, train.adam_beta1)
    curve.state = _as_lists(model)
    return curve


def train_engine(
    engine: Any, config: RunConfig, batches_of: Callable[[int], Sequence[MicroBatch]], num_steps: int, world: World
) -> Curve:
    """The same under DeepSpeed, through the trainer's own step. A collective; `batches_of` gives this rank's part."""
    curve = Curve()
    for step in range(num_steps):
        batches = batches_of(step)
        set_learning_rate(engine, learning_rate(step, num_steps, config.train), config.train.muon_rate_factor)
        counts = agree(batches, False, world)
        outcome = run_step(engine, batches, counts, config.model, config.train.max_grad_norm, world)
        curve.trained_tokens.append(counts.trained_tokens)
        curve.losses.append(outcome.loss)
        curve.norms.append(outcome.grad_norm)
        curve.skipped += outcome.skipped
        _add_routing(curve, outcome.routing, outcome.load_balancing_loss)
        if step in (0, num_steps - 1):
            _add_gradients(curve, whole_moments(engine), step, config.train.adam_beta1)
    curve.state = _as_lists(engine.module)
    return curve


def starve(model: nn.Module) -> None:
    """Bias every router so far that the second half of its experts is never chosen."""
    for router in routers(model).values():
        bias_E = router.state("e_score_correction_bias")
        assert bias_E is not None
        bias_E[max(router.config.num_experts_per_tok, len(bias_E) // 2) :] = -1e3


def whole_moments(engine: Any) -> dict[str, np.ndarray]:
    """Adam's first moment of every parameter with all experts, on every rank, from the pieces of all. A collective.

    In the first step it is the gradient that the optimizer got, times 1 - beta1: reduced, averaged and clipped.
    """
    mine = [
        (piece.name, piece.shape, piece.start, piece.tensors()[_FIRST_MOMENT].float().cpu().numpy())
        for piece in pieces_of_rank(engine, divided=True)
        if piece.numel and _FIRST_MOMENT in piece.state
    ]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    whole: dict[str, np.ndarray] = {}
    for name, shape, start, values in (piece for part in parts for piece in part):
        flat = whole.setdefault(name, np.full(shape, np.nan, np.float32)).reshape(-1)
        flat[start : start + len(values)] = values
    return whole


def _add_gradients(curve: Curve, moments: dict[str, np.ndarray], step: int, beta1: float) -> None:
    """First step: m = (1 - beta1) g. Later: Adam's own average, without its start at zero."""
    when = "all" if step else "first"
    scale = 1 / (1 - beta1 ** (step + 1))
    curve.gradients |= {f"{when}/{name}": value * scale for name, value in moments.items()}


def _add_routing(curve: Curve, metrics: RoutingMetrics, load_balancing_loss: float) -> None:
    curve.routing.append(asdict(metrics) | {"load_balancing_loss": load_balancing_loss})


def _as_lists(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in routing_state(model).items()}
