"""What a run will have taken of each source when it ends: arithmetic on the weights, without walking through the rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lumina_ds.data.mixture.order import MixtureOrder


class SourceForecast(NamedTuple):
    """Of one source: what it holds, its share of the tokens while it lasts, and what the run takes of it, to a row."""

    name: str
    tokens: int
    rows: int
    share: float
    tokens_in_run: float
    epochs: float
    reaches_cap: bool

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict()


def forecast(order: MixtureOrder, num_rows: int) -> list[SourceForecast]:
    """For the first `num_rows` rows of an order that has one set of weights."""
    shares = order.shares_at(0)
    rates = {each.name: shares[each.name] * each.num_rows / each.num_tokens for each in order.streams}
    taken = _dealt(num_rows, rates, order.caps)
    return [
        SourceForecast(
            name=each.name,
            tokens=each.num_tokens,
            rows=each.num_rows,
            share=shares[each.name],
            tokens_in_run=taken[each.name] * each.num_tokens / each.num_rows,
            epochs=taken[each.name] / each.num_rows,
            reaches_cap=(cap := order.caps[each.name]) is not None and taken[each.name] >= cap,
        )
        for each in order.streams
    ]


def _dealt(num_rows: int, rates: dict[str, float], caps: dict[str, int | None]) -> dict[str, float]:
    """Rows by source, in proportion to the rates; what a cap takes away goes to the others."""
    limits = {name: math.inf if cap is None else float(cap) for name, cap in caps.items()}
    taken = dict.fromkeys(rates, 0.0)
    open_names, left = {name for name, rate in rates.items() if rate}, float(num_rows)
    while open_names and left > 0:
        total = sum(rates[name] for name in open_names)
        # As far as the first cap.
        time = min(left / total, *((limits[name] - taken[name]) / rates[name] for name in open_names))
        for name in open_names:
            taken[name] += rates[name] * time
        left -= total * time
        open_names = {name for name in open_names if taken[name] < limits[name] - 1e-9}
    return taken
