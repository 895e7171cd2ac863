"""The layouts that `lumina selftest` trains, and the pairs of them that must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

ROWS_PER_RANK = 4  # rows of a global batch per rank: what accumulation 1, 2 and 4 can share
_CHUNK_TOKENS = 7  # far fewer than a micro-batch trains, so that the chunked loss has several chunks

FP32 = "fp32"
# Half precision at ZeRO-0 would take DeepSpeed's unfused optimizer, which training refuses.
STAGES = {"fp32": (0, 1, 2, 3), "mixed_bf16": (0, 1, 2, 3), "bf16": (1, 2, 3), "fp16": (1, 2, 3)}


@dataclass(frozen=True)
class Layout:
    """One way to train the same rows. `zero` None: plain PyTorch in one process, each conversation by itself.

    `starved`: a part of the experts, all of the last expert-parallel rank's among them, gets no token.
    """

    num_ranks: int = 1
    zero: int | None = None
    expert_parallel: int = 1
    accumulation: int = 1
    packed: bool = True
    checkpointing: str = "none"
    loss_chunk_tokens: int = 0
    starved: bool = False
    precision: str = FP32

    def __str__(self) -> str:
        if self.zero is None:
            return "plain PyTorch" + ", starved experts" * self.starved
        words = [f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}", f"ZeRO {self.zero}"]
        words += [f"EP {self.expert_parallel}", f"accumulation {self.accumulation}"]
        words += ["unpacked"] * (not self.packed) + ["chunked loss"] * bool(self.loss_chunk_tokens)
        words += ["starved experts"] * self.starved
        words += [f"checkpointing {self.checkpointing}"] * (self.checkpointing != "none")
        return ", ".join(words)


PLAIN = Layout()


@dataclass(frozen=True)
class Pair:
    """Two layouts whose training must be the same, and what their difference is about."""

    topic: str
    left: Layout
    right: Layout


def pairs_for(num_ranks: int, num_experts: int, precision: str) -> list[Pair]:
    """Every comparison on up to `num_ranks` ranks in a precision; what needs more ranks or experts is left out.

    Plain PyTorch trains in fp32 always: it is what other precisions are measured against.
    """
    size = expert_parallel_size(num_ranks, num_experts)
    stages = STAGES[precision]
    base = Layout(num_ranks, 2, size, accumulation=2, precision=precision)
    first = replace(base, zero=stages[0], expert_parallel=1)
    pairs = [Pair("plain PyTorch", PLAIN, first)]
    if num_ranks > 1:
        alone = [replace(base, num_ranks=1, zero=stage, expert_parallel=1) for stage in (stages[0], stages[-1])]
        pairs += [Pair("number of ranks", one, replace(one, num_ranks=num_ranks)) for one in alone]
    sizes = (1, size) if size > 1 else (1,)
    for each in sizes:
        lowest = replace(first, expert_parallel=each)
        pairs += [Pair("ZeRO", lowest, replace(lowest, zero=stage)) for stage in stages[1:]]
    if size > 1:
        spread = [replace(first, zero=stage) for stage in stages]
        pairs += [Pair("expert parallelism", one, replace(one, expert_parallel=size)) for one in spread]
    pairs += [Pair("accumulation", replace(base, accumulation=count), base) for count in (1, 4)]
    pairs += [
        Pair("packing", replace(base, packed=False), base),
        Pair("checkpointing", replace(base, zero=3), replace(base, zero=3, checkpointing="full")),
        *(Pair("checkpointing", base, replace(base, checkpointing=part)) for part in ("attention", "experts")),
        Pair("chunked loss", base, replace(base, loss_chunk_tokens=_CHUNK_TOKENS)),
    ]
    if num_experts:
        starved = replace(PLAIN, starved=True)
        for each in sizes:
            pairs.append(Pair("starved experts", starved, replace(base, zero=3, expert_parallel=each, starved=True)))
    return pairs


def layouts_of(pairs: Sequence[Pair]) -> list[Layout]:
    """Every layout once, in the order in which the pairs name them."""
    return list(dict.fromkeys(layout for pair in pairs for layout in (pair.left, pair.right)))


def expert_parallel_size(num_ranks: int, num_experts: int) -> int:
    """The most ranks that can share one set of experts."""
    if not num_experts:
        return 1
    return max(size for size in range(1, num_ranks + 1) if num_ranks % size == 0 and num_experts % size == 0)
