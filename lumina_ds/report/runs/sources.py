"""The sources of a mixture in a run's report: their losses, what was taken of each, and where the shares changed; and the
loss on every evaluation set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lumina_ds.monitor.records import StepRecord
from lumina_ds.report.line_plot import Line, LinePlot, line_figure
from lumina_ds.report.page import escape, table
from lumina_ds.report.runs.series import Series
from lumina_ds.report.scale import Point

Values = dict[str, float]


@dataclass
class SourceCurves:
    """By source: the loss over the steps, and the last values recorded. `shares` are those of each stretch of steps,
    with the first of them."""

    loss: dict[str, Series] = field(default_factory=dict)
    tokens: Values = field(default_factory=dict)
    epochs: Values = field(default_factory=dict)
    shares: list[tuple[int, Values]] = field(default_factory=list)

    def take(self, record: StepRecord) -> None:
        """Add a step's values; nothing where the run has no mixture."""
        for name, loss in (record.source_loss or {}).items():
            series = self.loss.setdefault(name, Series())
            if loss is not None:
                series.add(record.step, loss)
        self.tokens = dict(record.source_tokens or self.tokens)
        self.epochs = dict(record.source_epochs or self.epochs)
        shares = record.source_shares
        # A damaged value is no number, and differs from itself.
        if shares and all(map(math.isfinite, shares.values())) and (not self.shares or self.shares[-1][1] != shares):
            self.shares.append((record.step, shares))


def source_section(curves: SourceCurves, run_name: str) -> str:
    """A plot for every source, a table, and the steps where shares changed; empty without a mixture."""
    if not curves.loss:
        return ""
    figures = [
        line_figure(LinePlot(f"Loss of {name}", [Line(name, series.points)], "label tokens", is_wide=False))
        for name, series in curves.loss.items()
    ]
    changes = "".join(
        f"<p>From step {step:,} on, the shares are {escape(_shares(shares))}.</p>" for step, shares in curves.shares[1:]
    )
    return f'<div class="plots">{"".join(figures)}</div>{_table(curves, run_name)}{changes}'


def _table(curves: SourceCurves, run_name: str) -> str:
    total = sum(curves.tokens.values())
    shares = curves.shares[-1][1] if curves.shares else {}
    rows = [
        (
            name,
            _percent(shares.get(name)),
            _percent(curves.tokens.get(name, 0.0) / total if total else None),
            f"{curves.tokens.get(name, 0.0):,.0f}",
            f"{curves.epochs[name]:.3g}" if name in curves.epochs else "unknown",
            "none" if series.last is None else f"{series.last:.4f}",
        )
        for name, series in curves.loss.items()
    ]
    headings = ("source", "its share now", "share of the tokens read", "tokens read", "epochs", "last loss")
    return table(headings, rows, f"Sources of {run_name}")


def evaluation_plots(sets: dict[str, list[Point]]) -> str:
    """A plot for every evaluation set, and for the mean of all; empty where the only one has no name."""
    figures = [
        line_figure(LinePlot(f"Loss on {name}", [Line(name, points, 1, dots=True)], is_wide=False))
        for name, points in sets.items()
    ]
    return f'<h3>Evaluation sets</h3><div class="plots">{"".join(figures)}</div>' if figures else ""


def judged_points(sets: dict[str | None, list[Point]], best_by: object) -> Sequence[Point]:
    """Those of the set that chooses the best checkpoint: the only one, the one named, or the mean."""
    if len(sets) == 1:
        [only] = sets.values()
        return only
    return sets.get(best_by if isinstance(best_by, str) else "mean") or sets.get(None) or []


def _shares(shares: Values) -> str:
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
