"""What a layout's training left behind, and how far two layouts are apart. numpy only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lumina_ds.measure.selftest.layouts import Pair
from lumina_ds.text import counted

# Largest relative differences that are rounding: of loss and gradient norm, of gradients. In fp32 a hundred times what
# was seen; 16-bit types keep 8 or 11 bits, and a token between two experts may change sides.
TOLERANCES = {"fp32": (1e-4, 1e-4), "mixed_bf16": (0.02, 0.1), "bf16": (0.02, 0.1), "fp16": (0.02, 0.1)}
# Gradients of a parameter are compared relative to their own norm, but not below this share of the largest one.
_NEGLIGIBLE = 1e-4
_SCALARS = "scalars"


@dataclass
class Curve:
    """Per step: trained tokens and loss of the global batch, norm of the gradient before clipping.

    routing: what the routers measured in each step; state: what they had learnt at the end.
    gradients: whole tensors by `first/NAME` (what the optimizer got in the first step) and `all/NAME` (its average
    over all steps, Adam's first moment).
    """

    trained_tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    routing: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        scalars = {name: value for name, value in vars(self).items() if name != "gradients"}
        np.savez(path, **{_SCALARS: np.array(json.dumps(scalars)), **self.gradients})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Curve:
        with np.load(path) as file:
            gradients = {name: file[name] for name in file.files if name != _SCALARS}
            return cls(**json.loads(str(file[_SCALARS])), gradients=gradients)


@dataclass(frozen=True)
class Comparison:
    """Largest relative differences of a pair; `parameter` has that of the gradients. `fault` says why it fails."""

    topic: str
    precision: str
    left: str
    right: str
    loss: float
    grad_norm: float
    gradients: float
    parameter: str
    tolerance: float
    gradient_tolerance: float
    fault: str | None

    @property
    def name(self) -> str:
        return f"{self.topic} ({self.left} / {self.right}, {self.precision})"


def compare(pair: Pair, left: Curve, right: Curve) -> Comparison:
    """`right` against `left`, with the tolerances of right's precision."""
    scalars, of_gradients = TOLERANCES[pair.right.precision]
    loss, norm = (_largest(a, b) for a, b in ((left.losses, right.losses), (left.norms, right.norms)))
    gradients, parameter = _farthest_gradient(left.gradients, right.gradients)
    found = {"loss": (loss, scalars), "gradient norm": (norm, scalars)}
    found[f"gradient of {parameter}"] = (gradients, of_gradients)
    return Comparison(
        pair.topic, pair.right.precision, str(pair.left), str(pair.right), loss, norm, gradients, parameter,
        scalars, of_gradients, _fault(left, right, found),
    )  # fmt: skip


def _fault(left: Curve, right: Curve, found: Mapping[str, tuple[float, float]]) -> str | None:
    if left.trained_tokens != right.trained_tokens:
        a, b = next((a, b) for a, b in zip(left.trained_tokens, right.trained_tokens, strict=True) if a != b)
        return f"they train {a} and {b} tokens of the same conversations"
    if skipped := max(left.skipped, right.skipped):
        return f"{counted(skipped, 'step was', 'steps were')} skipped because their gradient was not finite"
    what, (value, tolerance) = max(found.items(), key=lambda item: item[1][0] / item[1][1])
    return f"the {what} differs by {value:.1e}, above the tolerance of {tolerance:g}" if value > tolerance else None


def _largest(expected: Sequence[float], found: Sequence[float]) -> float:
    """Largest relative difference; infinite where one is not finite."""
    a, b = np.array(expected), np.array(found)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.max(np.abs(a - b) / np.abs(a)))


def _farthest_gradient(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest |a - b| / |a| of a parameter in Euclidean norm, and its name."""
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    norms = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    floors = {
        when: _NEGLIGIBLE * max(norm for name, norm in norms.items() if name.startswith(when))
        for when in ("first", "all")
    }
    differences = {name.partition("/")[2]: 0.0 for name in norms}
    for name, value in expected.items():
        when, _, parameter = name.partition("/")
        difference = float(np.linalg.norm(value - found[name])) / max(norms[name], floors[when], 1e-30)
        differences[parameter] = max(differences[parameter], difference if np.isfinite(difference) else float("inf"))
    parameter = max(differences, key=lambda name: differences[name])
    return differences[parameter], parameter
