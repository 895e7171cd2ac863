"""From the settings of the sources and their sizes to the weights of a mixture, and to how long a pass of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lumina_ds.config.mixtures import SourceConfig


class Weights(NamedTuple):
    """By source: its weight, in any unit. `pass_tokens`: tokens of all sources in one pass of the mixture."""

    by_source: dict[str, float]
    pass_tokens: float


def mixture_weights(
    sources: Sequence[SourceConfig], num_tokens: Mapping[str, int], temperature: float | None
) -> Weights:
    """Weights by name, the names in alphabetical order. `num_tokens`: what each source's rows hold.

    With weights or a temperature, a pass has as many tokens as all sources hold together; else as many as `tokens` and
    `repeats` ask for, where a source without either is seen once.
    """
    by_name = {source.name: source for source in sorted(sources, key=lambda source: source.name)}
    if temperature is not None:
        # By the largest, since a small temperature would leave the range of a float.
        largest = max(num_tokens.values())
        bent = {name: (num_tokens[name] / largest) ** (1 / temperature) for name in by_name}
        return Weights(bent, float(sum(num_tokens.values())))
    if any(source.weight is not None for source in sources):
        given = {name: source.weight or 0.0 for name, source in by_name.items()}
        return Weights(given, float(sum(num_tokens.values())))
    amounts = {
        name: float(source.tokens) if source.tokens is not None else (source.repeats or 1.0) * num_tokens[name]
        for name, source in by_name.items()
    }
    return Weights(amounts, sum(amounts.values()))
