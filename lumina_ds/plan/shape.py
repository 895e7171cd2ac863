"""What a micro-batch's activations depend on beside the model."""

from __future__ import annotations

from dataclasses import dataclass

_OPERAND_BYTES = {"fp32": 4, "mixed_bf16": 2, "bf16": 2, "fp16": 2}
_RESIDUAL_BYTES = {"fp32": 4, "mixed_bf16": 4, "bf16": 2, "fp16": 2}
# Of a weight, by the precisions that can be planned.
PARAMETER_BYTES = {"fp32": 4, "mixed_bf16": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class ExpertLoad:
    """Routing is dropless, so the fullest rank and the busiest expert have more rows than an even share, which only a
    run can tell: `rank` and `expert` are their rows over it. The defaults are assumptions."""

    rank: float = 1.25
    expert: float = 2.0


@dataclass(frozen=True)
class Shape:
    """Widths are in bytes: b of a product's operand, r of the residual stream, w of a parameter, p of a product.

    `tokens` of a micro-batch; `product_bytes` p, None where products are in b; `plain_linear` is false at ZeRO-3,
    whose linear function (deepspeed/runtime/zero/linear.py) saves its input uncast. With `fused_loss` the loss may be
    Liger's: which one it is shows at the start of the run, so the larger one counts.
    """

    tokens: int
    precision: str
    checkpointing: str = "none"
    interval: int = 1
    expert_parallel_size: int = 1
    loss_chunk: int | None = None
    device: str = "cuda"
    product_bytes: int | None = None
    plain_linear: bool = True
    fused_loss: bool = False
    load: ExpertLoad = ExpertLoad()

    @property
    def b(self) -> int:
        return _OPERAND_BYTES[self.precision]

    @property
    def r(self) -> int:
        return _RESIDUAL_BYTES[self.precision]

    @property
    def w(self) -> int:
        return PARAMETER_BYTES[self.precision]

    @property
    def p(self) -> int:
        return self.product_bytes or self.b

    @property
    def casts(self) -> bool:
        """Whether autocast turns the inputs of linear layers into copies that are kept."""
        return self.r > self.b and self.plain_linear
