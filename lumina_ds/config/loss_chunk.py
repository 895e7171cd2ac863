"""How many tokens the output head takes at a time."""

from __future__ import annotations

# 2^25 logits are 128 MiB in fp32. Fewer than 1024 tokens make poor matrix products on a GPU, and add the weight's
# gradient up too often.
_CHUNK_LOGITS = 1 << 25
_MIN_CHUNK_TOKENS = 1024


def loss_chunk_tokens(requested: int | None, vocab_size: int) -> int:
    """Tokens of a chunk: `requested`, where 0 stands for all at once, or by the vocabulary when None."""
    return max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size) if requested is None else requested
