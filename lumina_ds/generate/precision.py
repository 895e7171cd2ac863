"""Precision of inference: fp32, fp16, bf16, or `dynamic`, int8 matrices with activations quantized as they come."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.config.precision import resolve_precision
from lumina_ds.errors import MachineError
from lumina_ds.model.device import device_and_precision
from lumina_ds.model.experts import Experts, RowPlan
from lumina_ds.model.moe import Router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed_bf16": torch.bfloat16, "fp16": torch.float16}
DYNAMIC = "dynamic"

Network = TypeVar("Network", bound=nn.Module)


def inference_precision(requested: str) -> tuple[str, str, str]:
    """(cuda or cpu, precision, one sentence on why); raises MachineError for what this machine cannot do."""
    on_gpu = torch.cuda.is_available()
    if requested == DYNAMIC:
        if on_gpu:
            raise MachineError(
                "dynamic (int8) inference has CPU kernels only and this machine computes on its GPU; use bf16, or "
                "hide the GPU with CUDA_VISIBLE_DEVICES="
            )
        if not hasattr(torch.ao.quantization, "quantize_dynamic"):
            raise MachineError(f"torch {torch.__version__} has no dynamic quantization any more; use bf16 or fp32")
        return "cpu", DYNAMIC, "dynamic as requested"
    if requested == "fp16" and not on_gpu:
        # DeepSpeed does not train in it there; a forward pass is plain torch.
        return "cpu", "fp16", "fp16 as requested"
    if requested == "mixed_bf16":
        # Master weights are a matter of training.
        requested = "bf16"
    return device_and_precision(requested) if on_gpu else ("cpu", *resolve_precision(requested, "cpu", False))


def convert(network: Network, precision: str, device: torch.device) -> Network:
    """`network` on `device` in `precision`, changed in place. Routers and the head stay as they are under `dynamic`."""
    if precision != DYNAMIC:
        return network.to(device, DTYPES[precision])
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, ExpertsByOne(child))
    wanted = torch.ao.quantization.per_channel_dynamic_qconfig
    routers = [f"{name}." for name, module in network.named_modules() if isinstance(module, Router)]
    linear = {
        name: wanted
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(routers))
    }
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, whose int8 kernels for CPUs were eight times slower than fp32 here.
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(network, linear, inplace=True)
    return network


class ExpertsByOne(nn.Module):
    """The experts as one Linear per expert and matrix, the form that quantization knows."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate, self.down, self.up = (_linears(stack) for stack in (experts.w1, experts.w2, experts.w3))

    def forward(self, x_TD: Tensor, counts_E: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Tokens [T, D] to the weighted sums [T, D] of their experts, given a router's output."""
        plan = RowPlan.of(indices_TK, counts_E)
        rows = x_TD[plan.token_N].split(counts_E.tolist())
        out_ND = torch.cat(
            [
                down(F.silu(gate(x)) * up(x)) if len(x) else x
                for x, gate, down, up in zip(rows, self.gate, self.down, self.up, strict=True)
            ]
        )
        # The weighted sum in fp32.
        return (out_ND[plan.row_TK] * weights_TK.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)


def _linears(stack_EFD: Tensor) -> nn.ModuleList:
    linears = nn.ModuleList()
    for weight_FD in stack_EFD.detach():
        with torch.device("meta"):
            linear = nn.Linear(weight_FD.shape[1], weight_FD.shape[0], bias=False)
        linear.weight = nn.Parameter(weight_FD, requires_grad=False)
        linears.append(linear)
    return linears
