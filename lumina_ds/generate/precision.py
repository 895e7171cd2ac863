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
from lumina_ds.model.loss import IGNORED, LanguageHead
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
    """`network` on `device` in `precision`, changed in place. Routers and a tied head stay as they are under `dynamic`.

    A tied head shares the embedding's memory, which looks values up in fp32; in int8 it would be a second copy.
    """
    if precision != DYNAMIC:
        return network.to(device, DTYPES[precision])
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, ExpertsByOne(child))
            elif isinstance(child, LanguageHead) and id(child.weight) not in embeddings:
                setattr(module, name, PlainHead(child))
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


class PlainHead(nn.Module):
    """The head around a Linear, the form that quantization knows."""

    def __init__(self, head: LanguageHead) -> None:
        super().__init__()
        self.chunk_tokens = head.chunk_tokens
        self.linear = _linear(head.weight.detach())

    def forward(self, hidden_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """As of LanguageHead: logits [B, S, V], or the summed loss of the labels [B, S], an fp32 scalar."""
        if labels_BS is None:
            return self.linear(hidden_BSD)
        trained_BS = labels_BS != IGNORED
        hidden_ND, labels_N = hidden_BSD[trained_BS], labels_BS[trained_BS]
        loss = hidden_ND.new_zeros(())
        chunk = self.chunk_tokens or max(len(labels_N), 1)
        for start in range(0, len(labels_N), chunk):
            logits_CV = self.linear(hidden_ND[start : start + chunk])
            loss += F.cross_entropy(logits_CV, labels_N[start : start + chunk], reduction="sum")
        return loss


def _linears(stack_EFD: Tensor) -> nn.ModuleList:
    return nn.ModuleList(_linear(weight_FD) for weight_FD in stack_EFD.detach())


def _linear(weight_FD: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight_FD.shape[1], weight_FD.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_FD, requires_grad=False)
    return linear
