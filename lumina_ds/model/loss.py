"""The output head and the cross-entropy of the next token, without ever holding the logits of all tokens.

The loss is summed, so that the caller can divide by the global token count. Loss and head are one module because
ZeRO-3 gathers a module's weight around its own call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.config.precision import loss_chunk_tokens
from lumina_ds.model.cpu_products import product_dtype
from lumina_ds.model.graph_breaks import outside_graphs

IGNORED = -100


@outside_graphs
def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[label], fp32, with at most `chunk_tokens` rows of logits alive.

    The matrix products are in autocast's type where it is on, else in the hidden states' own (on some CPUs in fp32,
    model/cpu_products.py); softmax is in fp32.
    """
    device = hidden_ND.device.type
    dtype = product_dtype(multiplied_dtype(hidden_ND), device)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk_tokens, dtype, None, 0)[0]
        weight_VD = weight_VD.to(dtype)
        losses = [
            -_log_probabilities(hidden_CD.to(dtype), weight_VD).gather(1, labels_C.unsqueeze(1)).sum()
            for hidden_CD, labels_C in zip(hidden_ND.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True)
        ]
        return torch.stack(losses).sum()


@outside_graphs
def grouped_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int, groups_N: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """As chunked_cross_entropy in training, to the bit, and beside it the sum of each group's tokens, fp64 [groups].

    The second has no gradient.
    """
    device = hidden_ND.device.type
    dtype = product_dtype(multiplied_dtype(hidden_ND), device)
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk_tokens, dtype, groups_N, num_groups)


class LanguageHead(nn.Linear):
    """Hidden states to logits, or, given labels, to the summed loss of the trained positions."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        chunk_tokens: int | None = None,
        cross_entropy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = chunked_cross_entropy,
    ) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.cross_entropy = cross_entropy
        self.chunk_tokens = loss_chunk_tokens(chunk_tokens, vocab_size)

    def forward(  # type: ignore[override]
        self, hidden_BSD: Tensor, labels_BS: Tensor | None = None, groups_B: Tensor | None = None, num_groups: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, S, V]; with labels [B, S] (-100: not trained) the sum of -log p(label), an fp32 scalar.

        With the group of every row (of one without labels it may be any number), a tuple of that sum and of those of
        each group, fp64 [groups]. Prompts and padding never reach the product with the vocabulary.
        """
        if labels_BS is None:
            return super().forward(hidden_BSD)
        trained_BS = labels_BS != IGNORED
        hidden_ND, labels_N = hidden_BSD[trained_BS], labels_BS[trained_BS]
        if groups_B is not None and len(labels_N):
            groups_N = groups_B.unsqueeze(1).expand_as(labels_BS)[trained_BS]
            chunk_tokens = self.chunk_tokens or len(labels_N)
            return grouped_cross_entropy(hidden_ND, self.weight, labels_N, chunk_tokens, groups_N, num_groups)
        if groups_B is not None:
            none = hidden_ND.new_zeros(num_groups, dtype=torch.float64)
            return F.cross_entropy(super().forward(hidden_ND).float(), labels_N, reduction="sum"), none
        if not self.chunk_tokens or len(labels_N) == 0:
            return F.cross_entropy(super().forward(hidden_ND).float(), labels_N, reduction="sum")
        return self.cross_entropy(hidden_ND, self.weight, labels_N, self.chunk_tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients of a chunk while its logits are there: three matrix products, none of them twice.

    The loss is a sum, so its gradients only wait for one factor. The weight's gradient is added up in fp32, for
    in bf16 every chunk would round it once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        groups_N: Tensor | None,
        num_groups: int,
    ) -> tuple[Tensor, Tensor]:
        weight = weight_VD.to(dtype)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        loss_G = hidden_ND.new_zeros(num_groups, dtype=torch.float64)
        hidden_gradient = torch.empty_like(hidden_ND)
        single = len(labels_N) <= chunk_tokens
        weight_gradient = None if single else torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(labels_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_CD, labels_C1 = hidden_ND[chunk].to(dtype), labels_N[chunk].unsqueeze(1)
            log_p_CV = _log_probabilities(hidden_CD, weight)
            log_p_C1 = log_p_CV.gather(1, labels_C1)
            loss -= log_p_C1.sum()
            if groups_N is not None:
                # A sum by masks: index_add on a card adds in an order of its own.
                is_in_GC = groups_N[chunk] == torch.arange(num_groups, device=groups_N.device).unsqueeze(1)
                loss_G -= (is_in_GC * log_p_C1.double().T).sum(1)
            # d loss / d logits = p - 1 at the label, in the memory of the log-probabilities.
            gradient_CV = log_p_CV.exp_().scatter_add_(
                1, labels_C1, log_p_CV.new_full((1, 1), -1.0).expand_as(labels_C1)
            )
            gradient_CV = gradient_CV.to(dtype)
            hidden_gradient[chunk] = gradient_CV @ weight
            if weight_gradient is None:
                weight_gradient = gradient_CV.T @ hidden_CD
            elif dtype == torch.float32:
                weight_gradient.addmm_(gradient_CV.T, hidden_CD)
            else:
                weight_gradient += gradient_CV.T @ hidden_CD
            del log_p_CV, gradient_CV
        assert weight_gradient is not None
        ctx.gradients = hidden_gradient, weight_gradient.to(weight_VD.dtype)
        ctx.mark_non_differentiable(loss_G)
        return loss, loss_G

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_gradient, weight_gradient = ctx.gradients
        del ctx.gradients  # scaled in place, so good for one backward
        return hidden_gradient.mul_(factor), weight_gradient.mul_(factor), None, None, None, None, None


def multiplied_dtype(x: Tensor) -> torch.dtype:
    """The type of a matrix product of x: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _log_probabilities(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """log softmax of the logits [C, V] in fp32."""
    return torch.log_softmax(hidden_CD @ weight_VD.T, dim=-1, dtype=torch.float32)
