"""A memory plan as formulas with this run's numbers in them.

The bytes of a line are what its numbers give, and a test holds them equal to the plan's. Symbols: n elements of the parameters on
this rank, N the same padded to 2 per rank and group, P this rank's share, w bytes of a parameter, g of a gradient; the
rest is in explain_activations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lumina_ds.config.optimizers import OPTIMIZERS, Optimizer
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan.activations import activation_bytes
from lumina_ds.plan.explain_activations import activation_formulas
from lumina_ds.plan.formula import Formula, number
from lumina_ds.plan.memory import CUDA_CONTEXT, MARGIN, PHASES, MemoryPlan
from lumina_ds.plan.shape import PARAMETER_BYTES
from lumina_ds.plan.states import ZeroSettings, moment_elements, momentum_bytes, optimizer_groups


@dataclass(frozen=True)
class Explanation:
    """One component, or a sum of them: its formula, the same with numbers, and what it gives."""

    component: str
    formula: str
    filled: str
    num_bytes: int

    @classmethod
    def of(cls, component: str, formula: Formula) -> Explanation:
        """The bytes are those that the formula's numbers give."""
        return cls(component, formula.symbols, formula.filled, formula.value)


def explain(plan: MemoryPlan, config: RunConfig, deepspeed_json: Mapping[str, Any]) -> list[Explanation]:
    """The components of `plan`'s peak phase, largest first, then the phases' totals and the peak; `config` and
    `deepspeed_json` are what the plan was made of."""
    zero = ZeroSettings.from_json(deepspeed_json, PARAMETER_BYTES[plan.precision])
    moment, shape = plan.peaks[plan.peak_phase], plan.shape
    known = _state_formulas(plan, config, zero)
    known |= activation_formulas(config.model, shape, activation_bytes(config.model, shape), moment, plan.breakdown)
    lines = [
        Explanation.of(component, known[component])
        for component, size in sorted(plan.breakdown.items(), key=lambda item: -item[1])
        if size
    ]
    for phase in PHASES:
        sizes = [size for size in plan.phases[phase].values() if size]
        formula = f"the sum of what is alive at its highest moment, the {plan.peaks[phase].label}"
        filled = " + ".join(map(number, sorted(sizes, reverse=True))) or "0"
        lines.append(Explanation.of(f"total of {phase}", Formula(formula, filled)))
    totals = ", ".join(number(plan.phase_bytes(phase)) for phase in PHASES)
    lines.append(Explanation.of("peak", Formula("max(forward, backward, step)", f"max({totals})")))
    return lines


def _state_formulas(plan: MemoryPlan, config: RunConfig, zero: ZeroSettings) -> dict[str, Formula]:
    width = PARAMETER_BYTES[plan.precision]
    groups = optimizer_groups(config.model, plan.world_size, plan.expert_parallel_size, config.train.optimizer)
    optimizer = OPTIMIZERS[config.train.optimizer]
    n = sum(group.numel for group in groups)
    share = sum(group.shards if zero.stage == 3 else group.partition for group in groups)
    symbol, states = ("n", n) if zero.stage == 0 else ("P", share)
    rest = plan.peak_bytes - plan.breakdown["margin"] - plan.breakdown["CUDA context and NCCL"]
    known = {
        "parameters": _parameters(plan, zero, width, n, sum(group.padded for group in groups), share),
        "master weights": Formula(f"4 {symbol}", f"4 x {number(states)}"),
        "moments": Formula(f"{optimizer.moment_bytes} {symbol}", f"{optimizer.moment_bytes} x {number(states)}"),
        "gradients": _gradients(plan, zero, width),
        "buckets": _buckets(plan, zero),
        "step temporaries": _step(plan, zero, width, optimizer),
        "offloaded states": _offloaded(plan, zero, width, share, optimizer),
        "CUDA context and NCCL": _overhead(plan),
        "margin": Formula(f"{MARGIN} of the rest, for fragmentation", f"round({MARGIN} x {number(rest)})"),
    }
    if optimizer.own_kinds:
        adam, muon = moment_elements(groups)
        known["moments"] = Formula(
            "8 x AdamW's part of P + one momentum, as wide as a gradient, of every Muon matrix that touches P",
            f"8 x {number(adam)} + {momentum_bytes(zero, width)} x {number(muon)}",
        )
    return known


def _parameters(plan: MemoryPlan, zero: ZeroSettings, width: int, n: int, padded: int, share: int) -> Formula:
    if zero.stage < 3:
        return (
            Formula("w n", f"{width} x {number(n)}")
            if zero.stage == 0
            else Formula("w N", f"{width} x {number(padded)}")
        )
    on_host = zero.offload_param != "none"
    kept = plan.breakdown["parameters"] // width - (0 if on_host else share)
    if on_host:
        return Formula("w x elements of the small parameters, which stay gathered", f"{width} x {number(kept)}")
    return Formula(
        "w (P + elements of the small parameters, which stay gathered)", f"{width} x ({number(share)} + {number(kept)})"
    )


def _gradients(plan: MemoryPlan, zero: ZeroSettings, width: int) -> Formula:
    size, g = plan.breakdown["gradients"], zero.gradient_bytes
    meaning = {
        0: "g x elements whose gradients are there",
        1: "g x elements whose gradients are there, all of them until the step, then those of tensors that touch P",
        2: "g x elements of the tensors that touch P",
        3: "g P",
    }[zero.stage]
    for unit in (g, width):
        if size % unit == 0:
            return Formula(meaning, f"{unit} x {number(size // unit)}")
    return Formula(meaning, number(size))


def _buckets(plan: MemoryPlan, zero: ZeroSettings) -> Formula:
    size = plan.breakdown["buckets"]
    buffers = 2 if zero.overlap_comm and zero.stage in (1, 2) else 1
    one = zero.reduce_bucket_size * buffers
    if zero.stage and one and size % one == 0:
        filled = f"{buffers} x {number(zero.reduce_bucket_size)} x {size // one}"
        return Formula("buffers x reduce_bucket_size x bytes an element", filled)
    if zero.stage and one and size > one and plan.peaks[plan.peak_phase].kind == "reduction":
        width = 8 if plan.precision == "mixed_bf16" and zero.stage < 3 else PARAMETER_BYTES[plan.precision]
        buffer = width * one if zero.contiguous_gradients else 0
        filled = f"{buffers} x {number(zero.reduce_bucket_size)} x {width} + {number(size - buffer)}"
        return Formula("buffers x reduce_bucket_size x bytes an element + the copy that one reduction flattens", filled)
    return Formula("what one reduction flattens", number(size))


def _step(plan: MemoryPlan, zero: ZeroSettings, width: int, optimizer: Optimizer) -> Formula:
    """As in states.py: a flattened copy, its cast to fp32, and more of an optimizer that is not fused."""
    an_element = (4 if width == 4 else 4 + width) + (0 if zero.fused_optimizer else optimizer.step_bytes)
    size = plan.breakdown["step temporaries"]
    if size % an_element:
        return Formula("copies of the largest group's gradients", number(size))
    return Formula(
        "bytes of the copies an element makes x P of the largest group", f"{an_element} x {number(size // an_element)}"
    )


def _offloaded(plan: MemoryPlan, zero: ZeroSettings, width: int, share: int, optimizer: Optimizer) -> Formula:
    size, states = plan.host_bytes, 8 + optimizer.moment_bytes
    if zero.stage == 3:
        parameters = width if zero.offload_param != "none" else 0
        an_element = states + zero.gradient_bytes + parameters
        return Formula(f"({states} + g, and w where parameters are offloaded) P", f"{an_element} x {number(share)}")
    filled = f"{states + width} x {number(share)} + {number(size - (states + width) * share)}"
    return Formula(f"({states} + w) P + the largest tensor, and gradients that accumulate", filled)


def _overhead(plan: MemoryPlan) -> Formula:
    buffers = plan.breakdown["CUDA context and NCCL"] - CUDA_CONTEXT
    return Formula(
        "allowances, not measured: a CUDA context + NCCL's buffers", f"{number(CUDA_CONTEXT)} + {number(buffers)}"
    )
