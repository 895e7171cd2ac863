"""What each precision of inference costs and gives: time, memory, and perplexity against fp32, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lumina_ds.data.loader import PackedRows
from lumina_ds.engine.world import World
from lumina_ds.errors import MachineError
from lumina_ds.generate.chat import generate_ids
from lumina_ds.generate.load import LoadedModel
from lumina_ds.generate.precision import DYNAMIC, inference_precision
from lumina_ds.generate.sampling import SamplingSettings
from lumina_ds.train.evaluate import evaluate

COMPARED = ("fp32", "fp16", "bf16", DYNAMIC)


@dataclass(frozen=True)
class PrecisionResult:
    """One row of the table. Tokens per second: of reading whole rows, and of writing a reply one token at a time.

    `weight_bytes` is what the parameters occupy; `peak_bytes` what a GPU allocated at most, None on a CPU.
    `perplexity_change` is relative to fp32. `missing` says why a precision was not measured; all else is then None.
    """

    precision: str
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    reading_tokens_per_second: float | None = None
    writing_tokens_per_second: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    perplexity_change: float | None = None
    missing: str | None = None


def compare_precisions(
    load: Callable[[str], LoadedModel],
    open_rows: Callable[[LoadedModel], PackedRows],
    precisions: Sequence[str] = COMPARED,
    max_rows: int = 64,
    num_new_tokens: int = 64,
) -> Iterator[PrecisionResult]:
    """A result per precision, fp32 first, as each is measured. `load` reads the model anew for each of them."""
    reference: float | None = None
    for precision in ["fp32", *(name for name in precisions if name != "fp32")]:
        try:
            inference_precision(precision)
        except MachineError as error:
            yield PrecisionResult(precision, missing=str(error))
            continue
        result = _measure(load(precision), open_rows, max_rows, num_new_tokens, reference)
        reference = result.perplexity if precision == "fp32" else reference
        yield result


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters, int8 matrices with their scales included; a tied head counts once."""
    tensors: dict[int, int] = {}
    for module in network.modules():
        quantized = getattr(module, "weight", None)
        if callable(quantized):
            # A dynamically quantized Linear: one byte per value, and scale and zero point per row as doubles.
            weight = quantized()
            tensors[id(module)] = weight.numel() + 16 * weight.shape[0]
    for parameter in network.parameters():
        tensors[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
    return sum(tensors.values())


def _measure(
    loaded: LoadedModel,
    open_rows: Callable[[LoadedModel], PackedRows],
    max_rows: int,
    num_new_tokens: int,
    reference: float | None,
) -> PrecisionResult:
    rows, on_gpu = open_rows(loaded), loaded.device.type == "cuda"
    num_rows = min(max_rows, rows.num_rows)
    world = World(0, 0, 1, loaded.device.type)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    evaluate(loaded.model, rows, 8, world, min(num_rows, 8))  # the first pass compiles and allocates
    reading = _Seconds(on_gpu)
    with reading:
        quality = evaluate(loaded.model, rows, 8, world, num_rows)
    writing = _Seconds(on_gpu)
    settings = SamplingSettings(temperature=0, max_new_tokens=num_new_tokens)
    with writing:
        # A model that ends its turn at once would otherwise be measured on nothing.
        num_written = sum(1 for _ in generate_ids(loaded, [1], settings, stop_at_end=False))
    perplexity = quality["perplexity"]
    return PrecisionResult(
        loaded.precision,
        weight_bytes(loaded.model),
        torch.cuda.max_memory_allocated() if on_gpu else None,
        num_rows * rows.seq_length / reading.seconds,
        num_written / writing.seconds,
        quality["loss"],
        perplexity,
        0.0 if reference is None else perplexity / reference - 1,
    )


class _Seconds:
    """Wall time of a block, with the GPU's work finished."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds = 0.0
        self._on_gpu = on_gpu

    def __enter__(self) -> None:
        self._wait()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._began

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
