"""Choosing the next token: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina_ds.errors import ConfigError


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0 is greedy; top_p 1 and top_k 0 leave all tokens in; repetition_penalty 1 changes nothing.

    `stop`: texts before which a reply ends.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError naming the first value out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature} is no number from 0 on; use 0 for greedy")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} is outside (0, 1]; use 1 to keep all tokens")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} is negative; use 0 to keep all tokens")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens} is below 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"--repetition-penalty {self.repetition_penalty} is not above 0; use 1 for none")
        if "" in self.stop:
            raise ConfigError("--stop is empty; give the text before which a reply ends")


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Logits [V] with the tokens of `seen_V` (bool [V]) made less likely (CTRL, arXiv 1909.05858, section 4.1).

    Positive ones are divided by the penalty and negative ones multiplied by it, so that both move down.
    """
    if penalty == 1:
        return logits_V
    logits_V = logits_V.float()
    lowered_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(seen_V, lowered_V, logits_V)


def sample(logits_V: Tensor, settings: SamplingSettings, generator: torch.Generator) -> int:
    """One token id from logits [V]."""
    # Below this the division overflows, and the likeliest token has all the mass anyway.
    if settings.temperature < 1e-5:
        return int(logits_V.argmax())
    probabilities_V = (logits_V.float() / settings.temperature).softmax(dim=-1)
    sorted_V, ids_V = probabilities_V.sort(descending=True)
    if settings.top_k:
        sorted_V[settings.top_k :] = 0
    # Nucleus (Holtzman et al., arXiv 1904.09751): keep tokens until the mass before one reaches top_p.
    sorted_V[sorted_V.cumsum(dim=-1) - sorted_V >= settings.top_p] = 0
    return int(ids_V[torch.multinomial(sorted_V, 1, generator=generator)])
