"""How a router turns its logits into scores of the experts.

To add one, add an entry to ROUTER_SCORES; `model.scoring_func` then takes its name. The functions call methods of their
tensors alone: nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RouterScore:
    """`function` takes logits [T, E] in fp32 and gives scores [T, E], not below zero, of which the largest are chosen.

    `sums_to_one`: whether a token's scores are probabilities. Where they are not, the load-balancing loss and the
    entropy take them divided by their sum.
    """

    function: Callable[[Any], Any]
    sums_to_one: bool


def _softmax(logits_TE: Any) -> Any:
    return logits_TE.softmax(dim=-1)


def _sigmoid(logits_TE: Any) -> Any:
    """DeepSeek-V3's (arXiv 2412.19437, eq. 15): an expert's score does not depend on the others'."""
    return logits_TE.sigmoid()


ROUTER_SCORES: dict[str, RouterScore] = {
    "softmax": RouterScore(_softmax, sums_to_one=True),
    "sigmoid": RouterScore(_sigmoid, sums_to_one=False),
}
