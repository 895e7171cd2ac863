"""What ZeRO-3 holds of the parameters it has gathered, module by module, as its coordinator fetches and releases them.

Follows deepspeed/runtime/zero/partitioned_param_coordinator.py and partition_parameters.py (0.19.8). A fetch gathers
several tensors into one flat buffer; when the first of them is used all are copied out of it, and the buffer stays
until the last of them is used, so that both are alive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import cached_by_model, parameter_tensors


class Tensor(NamedTuple):
    """One that has to be gathered: `flat_bytes` an element while it is under way, `bytes` afterwards."""

    number: int
    numel: int
    flat_bytes: int
    bytes: int

    @property
    def flat(self) -> int:
        return self.numel * self.flat_bytes

    @property
    def whole(self) -> int:
        return self.numel * self.bytes


@dataclass(frozen=True)
class Gathered:
    """Bytes alive, flat buffers included: at the most in the decoder, at its end, in the head, where the gradient leaves
    the head, and at the most where the backward pass is in the decoder."""

    highest: int = 0
    decoder_end: int = 0
    head: int = 0
    backward: int = 0
    decoder: int = 0


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's stage3_prefetch_bucket_size, stage3_max_live_parameters and stage3_max_reuse_distance, in elements."""

    prefetch: int
    live: int
    reuse: int


@cached_by_model
def gathered_bytes(
    model: ModelConfig,
    expert_parallel_size: int,
    persistence_threshold: int,
    copies_experts: bool,
    widths: Widths,
    limits: Limits,
) -> Gathered:
    """What one rank holds of `model`; the arguments are those of `module_tensors` and `follow`."""
    return follow(module_tensors(model, expert_parallel_size, persistence_threshold, copies_experts, widths), limits)


def follow(modules: Sequence[Sequence[Tensor]], limits: Limits) -> Gathered:
    """Follow one forward pass over `modules` in the order of their use, the head last.

    What it lets go the backward pass fetches again, in the same way from the other end.
    """
    fetcher = _Fetcher(modules, limits)
    decoder_end = head = highest = 0
    let_go = False
    for step in range(len(modules)):
        decoder_end, highest = fetcher.alive, max(highest, head)
        fetcher.use(step)
        head = fetcher.alive
        fetcher.release(step)
        let_go = let_go or fetcher.alive < head
    backward = fetcher.alive
    decoder = max(highest, backward) if let_go else backward - fetcher.held(modules[-1])
    return Gathered(highest, decoder_end, head, backward, decoder)


class _Fetcher:
    """The forward half of PartitionedParameterCoordinator."""

    def __init__(self, modules: Sequence[Sequence[Tensor]], limits: Limits) -> None:
        self.modules, self.limits = modules, limits
        self.queue = deque(tensor for tensors in modules for tensor in tensors)
        self.whole: set[int] = set()
        # Of a tensor under way: the fetch that brings it.
        self.under_way: dict[int, _Fetch] = {}
        # `alive` in bytes, `available` in elements.
        self.alive = self.available = 0
        # Elements used before each module, and in all: the way back is as long.
        self.before = [0]
        for tensors in modules:
            self.before.append(self.before[-1] + sum(tensor.numel for tensor in tensors))

    def use(self, step: int) -> None:
        tensors = self.modules[step]
        self._fetch([tensor for tensor in tensors if self._is_missing(tensor)])
        for tensor in tensors:
            self._wait(tensor.number)
        named = {tensor.number for tensor in tensors}
        while self.queue and self.queue[0].number in named:
            self.queue.popleft()
        self._prefetch()

    def release(self, step: int) -> None:
        """Let go what the way back does not use again within the reuse distance."""
        if 2 * (self.before[-1] - self.before[step + 1]) < self.limits.reuse:
            return
        for tensor in self.modules[step]:
            if tensor.number in self.whole:
                self.whole.remove(tensor.number)
                self.alive -= tensor.whole
                self.available -= tensor.numel

    def held(self, tensors: Sequence[Tensor]) -> int:
        """Bytes of those that are whole."""
        return sum(tensor.whole for tensor in tensors if tensor.number in self.whole)

    def _is_missing(self, tensor: Tensor) -> bool:
        return tensor.number not in self.whole and tensor.number not in self.under_way

    def _prefetch(self) -> None:
        room = min(self.limits.live - self.available, self.limits.prefetch)
        chosen: list[Tensor] = []
        while self.queue and sum(tensor.numel for tensor in chosen) < room:
            tensor = self.queue.popleft()
            if self._is_missing(tensor) and tensor not in chosen:
                chosen.append(tensor)
        self._fetch(chosen)

    def _fetch(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        fetch = _Fetch(tensors, waiting=len(tensors))
        self.alive += fetch.flat
        self.available += sum(tensor.numel for tensor in tensors)
        self.under_way |= {tensor.number: fetch for tensor in tensors}

    def _wait(self, number: int) -> None:
        fetch = self.under_way.pop(number, None)
        if fetch is None:
            return
        if not fetch.arrived:
            fetch.arrived = True
            self.whole |= {tensor.number for tensor in fetch.tensors}
            self.alive += sum(tensor.whole for tensor in fetch.tensors)
        fetch.waiting -= 1
        if fetch.waiting == 0:
            self.alive -= fetch.flat


@dataclass
class _Fetch:
    """One gathering; `waiting` counts its tensors that have not been used. A single tensor is gathered in place."""

    tensors: list[Tensor]
    waiting: int
    arrived: bool = False

    @property
    def flat(self) -> int:
        return sum(tensor.flat for tensor in self.tensors)


def module_tensors(
    model: ModelConfig, expert_parallel_size: int, persistence_threshold: int, copies_experts: bool, widths: Widths
) -> list[list[Tensor]]:
    """The tensors of every module, in the order of use; tensors up to the threshold stay gathered, and experts that no
    other rank holds need no copy. Modules without any prefetch too."""
    modules: list[list[Tensor]] = [[], []]
    previous = ""
    for number, tensor in enumerate(parameter_tensors(model)):
        module = tensor.name.rsplit(".", 1)[0]
        if module != previous:
            modules.append([])
        previous = module
        numel = tensor.numel // (expert_parallel_size if tensor.kind == "experts" else 1)
        if numel > persistence_threshold and (copies_experts or tensor.kind != "experts"):
            modules[-1].append(Tensor(number, numel, widths.flat(tensor.kind), widths.whole))
    if model.tie_word_embeddings:
        modules.append(list(modules[2]))
    return modules


@dataclass(frozen=True)
class Widths:
    """Bytes of an element: autocast gathers the weights of linear layers in 16 bits."""

    whole: int
    linear: int

    def flat(self, kind: str) -> int:
        return self.linear if kind in ("attention", "shared_experts", "dense_feed_forward", "head") else self.whole
