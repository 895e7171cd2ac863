"""A whole training step beside stock transformers Qwen3-MoE of the same shape, and our engine beside plain torch.

    python tests/benchmarks/bench_step.py --precision bf16
    python tests/benchmarks/bench_step.py --precision fp32

Each contender trains in a process of its own, on the same packed rows, with torch's fused AdamW, for the same steps;
rounds of processes alternate. The seconds are CPU time of a step after warm-up, the memory the process' peak (VmHWM)
above what it held before the model was built.

`lumina engine` is `build_engine` with the defaults of one rank, `lumina plain` the same model in a torch loop;
`transformers` is what Trainer would run: grouped experts, SDPA, the full logits. It gets the rows' documents as
position ids and no mask, which lets it see across them: less work for it, not more.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CONTENDERS = ("lumina plain", "lumina engine", "transformers")


def shape(hidden: int, layers: int, experts: int, width: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256), "head_dim": 64,
        "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": width, "qk_norm": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip


def batch(vocabulary: int, rows: int, length: int, documents: int) -> dict[str, Any]:
    """Packed rows of equally long documents in which all tokens but the first are trained."""
    import torch

    from lumina_ds.model.attention_backends import DocumentLayout

    each = length // documents
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, each - 1 :: each] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(length).remainder(each).expand(rows, length),
        "documents": DocumentLayout.from_lengths((each,) * (documents * rows)),
        "padding_mask": torch.ones(rows, length, dtype=torch.bool),
    }


def our_loss(outputs: Any, inputs: dict[str, Any]) -> Any:
    loss, *router = outputs
    return loss / (inputs["labels"] != -100).sum() + 0.01 * router[0] + 0.001 * router[1]


def lumina_plain(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], None]:
    import torch

    from lumina_ds.config.schema import ModelConfig
    from lumina_ds.model.init import initialize
    from lumina_ds.model.transformer import CausalLM

    config = ModelConfig.model_validate(model)
    network = CausalLM(config)
    initialize(network, config, 0)
    network.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return _torch_step(network, lambda: our_loss(network(**inputs), inputs))


def lumina_engine(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], None]:
    from lumina_ds.config.deepspeed import compose_deepspeed
    from lumina_ds.config.schema import RunConfig
    from lumina_ds.engine.build import build_engine
    from lumina_ds.engine.distributed import start
    from lumina_ds.train.step import clip_gradients, clips_by_itself

    rows = len(inputs["input_ids"])
    config = RunConfig.model_validate({"model": model, "train": {"micro_batch_size": rows}})
    world = start()
    engine = build_engine(config, world, precision, compose_deepspeed(config, 1, precision))

    def step() -> None:
        engine.backward(our_loss(engine(**inputs), inputs))
        if not clips_by_itself(engine):
            clip_gradients(engine, 1.0)
        engine.step()

    return step


def transformers(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], None]:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    known = {name: value for name, value in model.items() if name != "qk_norm"}
    config = Qwen3MoeConfig(**known, norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01)
    network = Qwen3MoeForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    labels = inputs["labels"].roll(1, 1)  # transformers shifts them itself
    wanted = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "labels": labels}
    mask = torch.ones_like(labels)
    return _torch_step(network, lambda: network(**wanted, attention_mask=mask, use_cache=False).loss)


def _torch_step(network: Any, loss: Callable[[], Any]) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    name: str, model: dict[str, Any], rows: int, length: int, documents: int, precision: str, steps: int
) -> None:
    """Train in this process and print {"seconds", "peak_bytes"} as the last line."""
    builders = {"lumina plain": lumina_plain, "lumina engine": lumina_engine, "transformers": transformers}
    inputs = batch(model["vocab_size"], rows, length, documents)
    builders_imports(name)
    before = _memory("VmRSS")
    step = builders[name](model, inputs, precision)
    step()
    step()
    seconds = []
    for _ in range(steps):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": _memory("VmHWM") - before}), flush=True)


def builders_imports(name: str) -> None:
    """Load the libraries before memory is counted."""
    if name == "transformers":
        from transformers import Qwen3MoeForCausalLM  # noqa: F401
    if name == "lumina engine":
        import deepspeed  # noqa: F401


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@click.command()
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--hidden", default=512, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--experts", default=8, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--vocabulary", default=16384, show_default=True)
@click.option("--rows", default=2, show_default=True)
@click.option("--length", default=1024, show_default=True)
@click.option("--documents", default=4, show_default=True, help="Of a row.")
@click.option("--steps", default=4, show_default=True, help="Measured in every process.")
@click.option("--rounds", default=2, show_default=True, help="Processes of every contender.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--contender", type=click.Choice(CONTENDERS), hidden=True)
def main(
    precision: str, hidden: int, layers: int, experts: int, width: int, vocabulary: int, rows: int, length: int,
    documents: int, steps: int, rounds: int, as_json: bool, contender: str | None,
) -> None:  # fmt: skip
    if contender is not None:
        model = shape(hidden, layers, experts, width, vocabulary)
        measure(contender, model, rows, length, documents, precision, steps)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise click.ClickException(f"{name} ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
            found[name].append(json.loads(ran.stdout.splitlines()[-1]))
    table = {
        name: {key: min(run[key] for run in runs) for key in ("seconds", "peak_bytes")} for name, runs in found.items()
    }
    ratios = {
        "transformers / lumina plain": table["transformers"]["seconds"] / table["lumina plain"]["seconds"],
        "transformers / lumina engine": table["transformers"]["seconds"] / table["lumina engine"]["seconds"],
        "lumina engine / lumina plain": table["lumina engine"]["seconds"] / table["lumina plain"]["seconds"],
    }
    if as_json:
        print(json.dumps({"precision": precision, "contenders": table, "ratios": ratios}))
        return
    print(f"{precision}, {rows} rows of {length} tokens\n| contender | CPU seconds a step | peak MB |\n|---|---|---|")
    for name, result in table.items():
        print(f"| {name} | {result['seconds']:.2f} | {result['peak_bytes'] / 1e6:.0f} |")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
