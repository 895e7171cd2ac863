"""DeepSpeed's global gradient norm: faster on a CPU, and with a say in whether the gradient is applied.

DeepSpeed skips a step, on all ranks alike and with everything cleaned up, when the global norm that it has just
computed is not finite (step() of runtime/zero/stage_1_and_2.py and stage3.py). A norm that is refused here is
handed to it as infinite, so that no second way of skipping is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# Elements whose double-precision copy stays in a core's cache.
_BLOCK = 1 << 15


def measure_in_blocks(engine: Any) -> bool:
    """Let a ZeRO 1 or 2 engine on a CPU convert its gradients to double precision, for their norm, block by block.

    DeepSpeed converts each gradient as a whole, which writes and reads four times the memory of a bf16 one. The sum is
    in double precision either way.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "scaled_global_norm") or not hasattr(optimizer, "get_grad_norm_direct"):
        return False
    whole = optimizer.get_grad_norm_direct

    def in_blocks(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pairs = [
            (block, param)
            for gradient, param in zip(real, params, strict=False)
            for block in gradient.detach().flatten().split(_BLOCK)
        ]
        return whole([block for block, _ in pairs], [param for _, param in pairs], norm_type)

    optimizer.get_grad_norm_direct = in_blocks
    return True


class NormGate:
    """Asks `refuses(norm)` about every finite global gradient norm of a ZeRO 1 to 3 engine."""

    def __init__(self, engine: Any, refuses: Callable[[float], bool]) -> None:
        self._refuses = refuses
        self.refused: float | None = None
        self._optimizer = engine.optimizer
        # Stages 1 and 2 have one function for the norm of everything; stage 3 has one for its parts.
        if hasattr(self._optimizer, "scaled_global_norm"):
            self._norm = self._optimizer.scaled_global_norm
            self._optimizer.scaled_global_norm = self._of_stages_1_and_2
        elif hasattr(self._optimizer, "_get_norm_groups"):
            self._norm = self._optimizer._get_norm_groups
            self._optimizer._get_norm_groups = self._of_stage_3

    def take_refused(self) -> float | None:
        """The norm that was refused since the last call."""
        refused, self.refused = self.refused, None
        return refused

    def _of_stages_1_and_2(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._norm(*args, **kwargs)
        return norm * math.inf if self._refuse(float(norm)) else norm

    def _of_stage_3(self) -> Any:
        parts = self._norm()
        norm = math.sqrt(sum(float(part) ** 2 if float(part) >= 0 else math.inf for part in parts))
        return [part * math.inf for part in parts] if self._refuse(norm) else parts

    def _refuse(self, scaled_norm: float) -> bool:
        norm = scaled_norm / float(self._optimizer.loss_scale)
        if not math.isfinite(norm) or not self._refuses(norm):
            return False
        self.refused = norm
        return True
