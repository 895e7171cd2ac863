"""Cross-entropy of the next token, summed so that the caller can divide by the global token count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


def summed_cross_entropy(hidden_BSD: Tensor, head: nn.Linear, labels_BS: Tensor) -> Tensor:
    """Sum over trained positions of -log p(label), fp32 scalar.

    Logits are computed for trained positions only: prompts and padding never reach the head, which
    saves their share of the largest tensor of the step.
    """
    trained = labels_BS != IGNORED
    logits_NV = head(hidden_BSD[trained]).float()
    return F.cross_entropy(logits_NV, labels_BS[trained], reduction="sum")
