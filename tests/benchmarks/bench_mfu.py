"""Model FLOPs utilisation of training steps on one GPU, and where a step's time goes.

    python tests/benchmarks/bench_mfu.py
    python tests/benchmarks/bench_mfu.py --model moe-e64 --rows 8 --flash on
    python tests/benchmarks/bench_mfu.py --dry          # tiny models on the CPU: shows that the program works

The engine is `build_engine` in bf16 on full rows. MFU is FLOPs of the model (lumina_ds/plan/flops.py) over time and the
card's nominal dense bf16 rate. Steps are timed alone first; then, in further steps, the parts: hooks of the modules
mark the stream (CUDA events) where a part's forward and backward begin and end. `communication` is the time of NCCL's
kernels in a profiled step; it may overlap the other parts, and one GPU has none.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import click

# (layers, width, heads, key heads, feed-forward or expert width, experts)
MODELS = {
    "dense-1b": (16, 2048, 16, 8, 8192, 0),
    "dense-3b": (28, 3072, 24, 8, 8192, 0),
    "moe-e8": (12, 1024, 16, 4, 3072, 8),
    "moe-e64": (12, 1024, 16, 4, 512, 64),
}
DRY = {"dense-1b": (2, 64, 4, 2, 128, 0), "moe-e8": (2, 64, 4, 2, 64, 4)}
PARTS = ("attention", "feed-forward", "experts", "router+dispatch", "head+loss", "optimizer", "other")
TRIAL_STEPS = 3


def model_settings(shape: tuple[int, ...], vocabulary: int, length: int) -> dict[str, Any]:
    layers, hidden, heads, key_heads, width, experts = shape
    settings = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "qk_norm": True, "max_position_embeddings": length,
    }  # fmt: skip
    if not experts:
        return settings | {"intermediate_size": width, "num_experts": 0}
    return settings | {"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": 2}


class Marks:
    """Begin and end of every part, as CUDA events, or as wall-clock times without a GPU."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[Any, Any] = {}

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, key: Any) -> None:
        self._open[key] = self.now()

    def end(self, part: str, key: Any) -> None:
        self.pairs[part].append((self._open.pop(key), self.now()))

    def seconds(self) -> dict[str, float]:
        """Of each part, in total; waits for the GPU."""
        if not self.cuda:
            return {part: sum(end - begin for begin, end in pairs) for part, pairs in self.pairs.items()}
        import torch

        torch.cuda.synchronize()
        return {part: sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 for part, pairs in self.pairs.items()}


def watch(module: Any, part: str, marks: Marks) -> None:
    """Mark forward and backward of `module` as `part`."""
    forward, backward = (id(module), "forward"), (id(module), "backward")
    module.register_forward_pre_hook(lambda *_: marks.begin(forward))
    module.register_forward_hook(lambda *_: marks.end(part, forward))
    module.register_full_backward_pre_hook(lambda *_: marks.begin(backward))
    module.register_full_backward_hook(lambda *_: marks.end(part, backward))


def watch_parts(network: Any, marks: Marks) -> None:
    for block in network.model.layers:
        watch(block.self_attn, "attention", marks)
        watch(block.mlp, "whole MoE layer" if block.is_moe else "feed-forward", marks)
        if block.is_moe:
            watch(block.mlp.experts, "experts", marks)
    # Its gradients are computed in its forward pass.
    watch(network.lm_head, "head+loss", marks)


def build_step(
    settings: dict[str, Any], rows: int, length: int, documents: int, flash: str, fused: str, cuda: bool
) -> tuple[Any, Callable[[Marks | None], None]]:
    """An engine and its training step on fixed random tokens."""
    import torch

    from lumina_ds.config.deepspeed.compose import compose_deepspeed
    from lumina_ds.config.schema import RunConfig
    from lumina_ds.engine.build import build_engine, clip_gradients, clips_by_itself
    from lumina_ds.engine.world import start
    from lumina_ds.model.attention_backends import DocumentLayout

    train = {"micro_batch_size": rows, "flash_attention": flash, "fused_kernels": fused}
    config = RunConfig.model_validate({"model": settings, "train": train})
    world = start()
    engine = build_engine(config, world, "bf16", compose_deepspeed(config, 1, "bf16"))
    device, each = world.torch_device, length // documents
    ids = torch.randint(settings["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(length, device=device).remainder(each).expand(rows, length),
        "documents": DocumentLayout.from_lengths((each,) * (documents * rows), device),
        "padding_mask": torch.ones(rows, length, dtype=torch.bool, device=device),
    }

    def step(marks: Marks | None = None) -> None:
        loss, balance = engine(**inputs)[:2]
        engine.backward((loss + 0.01 * balance) / (rows * length))
        if marks is not None:
            marks.begin("optimizer")
        if not clips_by_itself(engine):
            clip_gradients(engine, 1.0)
        engine.step()
        if marks is not None:
            marks.end("optimizer", "optimizer")

    return engine, step


def time_steps(step: Callable[[], None], steps: int, cuda: bool) -> float:
    """Seconds of one step, after warm-up."""
    import torch

    for _ in range(TRIAL_STEPS):
        step()
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def part_shares(engine: Any, step: Callable[[Marks], None], steps: int, cuda: bool) -> dict[str, float]:
    """Share of the step's time of every part; they add up to 1."""
    marks = Marks(cuda)
    watch_parts(engine.module, marks)
    for _ in range(steps):
        marks.begin("step")
        step(marks)
        marks.end("step", "step")
    found = marks.seconds()
    total = found.pop("step")
    layer = found.pop("whole MoE layer", None)
    if layer is not None:
        found["router+dispatch"] = layer - found["experts"]
    found["other"] = total - sum(found.values())
    return {part: found[part] / total for part in PARTS if part in found}


def communication_seconds(step: Callable[[], None]) -> float:
    """Of NCCL's kernels in one step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    return sum(event.self_device_time_total for event in events if "nccl" in event.key.lower()) / 1e6


def nominal_tflops(given: float | None, name: str, memory_bytes: int) -> float:
    """Of a card by the name that CUDA gives it, such as NVIDIA H100 80GB HBM3, and of its sizes the nearest."""
    from lumina_ds.plan.hardware import GPUS

    if given is not None:
        return given
    words = name.lower().replace("-", " ").split()
    sizes = [gpu for gpu in GPUS if gpu.name.rpartition("-")[0] in ("".join(words[1:3]), *words)]
    if not sizes:
        raise click.ClickException(f"{name} is no known card; give its dense bf16 rate with --tflops")
    return min(sizes, key=lambda gpu: abs(gpu.memory_gb * 1e9 - memory_bytes)).tflops


@click.command()
@click.option("--model", "name", type=click.Choice([*MODELS]), default="moe-e8", show_default=True)
@click.option("--vocabulary", default=32768, show_default=True)
@click.option("--rows", default=8, show_default=True)
@click.option("--length", default=2048, show_default=True)
@click.option("--documents", default=4, show_default=True, help="Of a row.")
@click.option("--steps", default=10, show_default=True)
@click.option("--flash", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--fused-kernels", "fused", default="auto", show_default=True, help="As train.fused_kernels.")
@click.option("--tflops", type=float, help="Nominal dense bf16 rate of the card; known cards need none.")
@click.option("--dry", is_flag=True, help="A tiny model on the CPU: no MFU, but everything else.")
@click.option("--json", "as_json", is_flag=True)
def main(
    name: str, vocabulary: int, rows: int, length: int, documents: int, steps: int, flash: str, fused: str, tflops: float | None,
    dry: bool, as_json: bool,
) -> None:  # fmt: skip
    import torch

    from lumina_ds.config.schema import ModelConfig
    from lumina_ds.plan.flops import flops_per_token

    cuda = torch.cuda.is_available() and not dry
    if not cuda and not dry:
        raise click.ClickException("no CUDA GPU: MFU is not measured on a CPU; --dry runs a tiny model")
    if dry and torch.cuda.is_available():
        raise click.ClickException("--dry is for a machine without a GPU; hide it with CUDA_VISIBLE_DEVICES=''")
    if dry:
        shape, vocabulary, rows, length = DRY["moe-e8" if "moe" in name else "dense-1b"], 256, 1, 64
    else:
        shape, rate = (
            MODELS[name],
            nominal_tflops(tflops, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory),
        )
    settings = model_settings(shape, vocabulary, length)
    engine, step = build_step(settings, rows, length, documents, flash, fused, cuda)
    seconds = time_steps(lambda: step(None), steps, cuda)
    # A document sees itself alone.
    work = flops_per_token(ModelConfig.model_validate(settings), length // documents) * rows * length
    result: dict[str, Any] = {
        "model": name,
        "device": torch.cuda.get_device_name() if cuda else "CPU, tiny model",
        "tokens_per_second": rows * length / seconds,
        "mfu": work / seconds / (rate * 1e12) if cuda else None,
        "communication": communication_seconds(lambda: step(None)) / seconds if cuda else 0.0,
        "parts": part_shares(engine, step, steps, cuda),
    }
    if as_json:
        print(json.dumps(result))
        return
    mfu = "no MFU on a CPU" if result["mfu"] is None else f"{result['mfu']:.1%} MFU"
    print(
        f"{name} on {result['device']}: {result['tokens_per_second']:,.0f} tokens/s, {mfu}\n| part | share |\n|---|---|"
    )
    for part, share in [*result["parts"].items(), ("communication, overlapping", result["communication"])]:
        print(f"| {part} | {share:.1%} |")


if __name__ == "__main__":
    main()
