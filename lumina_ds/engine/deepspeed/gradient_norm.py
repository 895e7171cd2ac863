"""DeepSpeed's global gradient norm: faster on a CPU, and with a say in whether the gradient is applied.

DeepSpeed skips a step, on all ranks alike and with everything cleaned up, when the global norm that it has just
computed is not finite (step() of runtime/zero/stage_1_and_2.py and stage3.py). A norm that is refused here is
handed to it as infinite, so that no second way of skipping is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lumina_ds.engine.deepspeed.changes import Need, replace
from lumina_ds.errors import ConfigError

_STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
NEEDS = (
    Need(f"{_STAGE_1_AND_2}.get_grad_norm_direct", "self gradients params norm_type"),
    Need(f"{_STAGE_1_AND_2}.scaled_global_norm", "self norm_type"),
    Need(f"{_STAGE_1_AND_2}.step", contains="self.scaled_global_norm()"),
    Need(f"{_STAGE_3}._get_norm_groups"),
    Need(_STAGE_3, contains="norm_groups = self._get_norm_groups()"),
    Need(f"{_STAGE_1_AND_2}.loss_scale"),
    Need(f"{_STAGE_3}.loss_scale"),
)

# Elements whose double-precision copy stays in a core's cache.
_BLOCK = 1 << 15


def measure_in_blocks(engine: Any) -> bool:
    """Let a ZeRO 1 or 2 engine on a CPU convert its gradients to double precision, for their norm, block by block.

    DeepSpeed converts each gradient as a whole, which writes and reads four times the memory of a bf16 one. The sum is
    in double precision either way.
    """
    if not _is_of_stages_1_and_2(engine.optimizer):
        return False

    def in_blocks(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pairs = [
            (block, param)
            for gradient, param in zip(real, params, strict=False)
            for block in gradient.detach().flatten().split(_BLOCK)
        ]
        return whole([block for block, _ in pairs], [param for _, param in pairs], norm_type)

    whole = replace(engine.optimizer, "get_grad_norm_direct", in_blocks)
    return True


class NormGate:
    """Asks `refuses(norm)` about every finite global gradient norm of a ZeRO 1 to 3 engine.

    At stage 0 the norm is ours (engine/build.py, clip_gradients), and nothing is changed. Raises ConfigError for the
    one optimizer of DeepSpeed's whose norm has no function of its own.
    """

    def __init__(self, engine: Any, refuses: Callable[[float], bool]) -> None:
        self._refuses = refuses
        self.refused: float | None = None
        self._optimizer = engine.optimizer
        stage = engine.zero_optimization_stage()
        if stage == 3:
            self._norm = replace(self._optimizer, "_get_norm_groups", self._of_stage_3)
        elif _is_of_stages_1_and_2(self._optimizer):
            # Stages 1 and 2 have one function for the norm of everything; stage 3 has one for its parts.
            self._norm = replace(self._optimizer, "scaled_global_norm", self._of_stages_1_and_2)
        elif stage > 0:
            raise ConfigError(
                f"health.spike_policy skip: {type(self._optimizer).__name__}, which DeepSpeed takes for ZeRO-{stage} "
                "in bf16 with fp32 gradients, applies every finite gradient; use --zero 2, or spike_policy warn"
            )

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


def _is_of_stages_1_and_2(optimizer: Any) -> bool:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return isinstance(optimizer, DeepSpeedZeroOptimizer)
