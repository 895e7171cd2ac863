"""A whole training step beside stock transformers Qwen3-MoE of the same shape, and our engine beside plain torch.

    python tests/benchmarks/bench_step.py --precision bf16
    python tests/benchmarks/bench_step.py --precision fp32

Each contender trains in a process of its own, on the same packed rows, with torch's fused AdamW, for the same steps;
rounds of processes alternate. The seconds are CPU time of a step after warm-up, the memory the process' peak (VmHWM)
above what it held before the model was built.

All start from the same weights and compute the same: the mean loss of the trained tokens, a load-balancing loss, and
attention within documents. Their losses of the first step must agree, or the comparison ends with an error.

`lumina engine` is `build_engine` with the defaults of one rank, `lumina plain` the same model in a torch loop. In bf16
the engine updates fp32 copies of the weights; `lumina plain, fp32 masters` is the loop that does so too.
`transformers` has the settings that its Trainer takes by itself with this torch: grouped_mm for the experts, SDPA, the
full logits, fused AdamW, clipping at 1. It gets what its packing collators give: position ids that start again with
every document, and no attention mask, from which it makes the mask of the documents; given a mask of ones as well, it
would see across them, which the losses show.
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

MASTERS = "lumina plain, fp32 masters"
CONTENDERS = ("lumina plain", MASTERS, "lumina engine", "transformers")
SEED = 0


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


def our_loss(outputs: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What is trained, and the part of it that is the tokens' mean loss."""
    loss, balance = outputs[:2]
    mean = loss / (inputs["labels"] != -100).sum()
    return mean + 0.01 * balance / inputs["labels"].numel(), mean


def lumina_plain(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], Any]:
    network = initial_network(model, precision)
    return _torch_step(network, lambda: our_loss(network(**inputs), inputs))


def lumina_with_masters(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], Any]:
    """A torch loop whose optimizer and clipping work on fp32 copies of the weights and gradients."""
    import torch

    network = initial_network(model, precision)
    weights = list(network.parameters())
    masters = [torch.nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def step() -> Any:
        total, mean = our_loss(network(**inputs), inputs)
        total.backward()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        return mean

    return step


def initial_network(model: dict[str, Any], precision: str) -> Any:
    """Our model with the weights that every contender starts from."""
    import torch

    from lumina_ds.config.schema import ModelConfig
    from lumina_ds.model.init import initialize
    from lumina_ds.model.transformer import CausalLM

    config = ModelConfig.model_validate(model)
    network = CausalLM(config)
    initialize(network, config, SEED)
    return network.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def lumina_engine(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], Any]:
    from lumina_ds.config.deepspeed.compose import compose_deepspeed
    from lumina_ds.config.schema import RunConfig
    from lumina_ds.engine.build import build_engine
    from lumina_ds.engine.world import start
    from lumina_ds.train.step import clip_gradients, clips_by_itself

    rows = len(inputs["input_ids"])
    config = RunConfig.model_validate({"model": model, "train": {"micro_batch_size": rows, "seed": SEED}})
    world = start()
    engine = build_engine(config, world, precision, compose_deepspeed(config, 1, precision))

    def step() -> Any:
        total, mean = our_loss(engine(**inputs), inputs)
        engine.backward(total)
        if not clips_by_itself(engine):
            clip_gradients(engine, 1.0)
        engine.step()
        return mean

    return step


def transformers(model: dict[str, Any], inputs: dict[str, Any], precision: str) -> Callable[[], Any]:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    known = {name: value for name, value in model.items() if name != "qk_norm"}
    config = Qwen3MoeConfig(**known, norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01)
    network = Qwen3MoeForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    network.load_state_dict(published_weights(initial_network(model, precision).state_dict()))
    labels = inputs["labels"].roll(1, 1)  # transformers shifts them itself
    wanted = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "labels": labels}

    def loss() -> tuple[Any, Any]:
        outputs = network(**wanted, use_cache=False)
        return outputs.loss, outputs.loss - 0.01 * outputs.aux_loss

    return _torch_step(network, loss)


def published_weights(ours: dict[str, Any]) -> dict[str, Any]:
    """Our state under the names that transformers has in memory, where gate and up of all experts are one tensor."""
    import torch

    theirs = {}
    for name, tensor in ours.items():
        if name.endswith("experts.w1"):
            gate_and_up = torch.cat([tensor, ours[name.removesuffix("w1") + "w3"]], dim=1)
            theirs[name.replace("w1", "gate_up_proj")] = gate_and_up
        elif not name.endswith(("experts.w3", "router.load")):
            theirs[name.replace("experts.w2", "experts.down_proj").replace("router.gate", "gate")] = tensor
    return theirs


def _torch_step(network: Any, loss: Callable[[], tuple[Any, Any]]) -> Callable[[], Any]:
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> Any:
        total, mean = loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return mean

    return step


def measure(
    name: str, model: dict[str, Any], rows: int, length: int, documents: int, precision: str, steps: int
) -> None:
    """Train in this process and print {"seconds", "peak_bytes", "first_loss"} as the last line."""
    builders = {
        "lumina plain": lumina_plain,
        MASTERS: lumina_with_masters,
        "lumina engine": lumina_engine,
        "transformers": transformers,
    }
    inputs = batch(model["vocab_size"], rows, length, documents)
    builders_imports(name)
    before = _memory("VmRSS")
    step = builders[name](model, inputs, precision)
    first = float(step())
    step()
    seconds = []
    for _ in range(steps):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    found = {"seconds": statistics.median(seconds), "peak_bytes": _memory("VmHWM") - before, "first_loss": first}
    print(json.dumps(found), flush=True)


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
    contenders = [name for name in CONTENDERS if precision == "bf16" or name != MASTERS]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise click.ClickException(f"{name} ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
            found[name].append(json.loads(ran.stdout.splitlines()[-1]))
    table = {
        name: {key: min(run[key] for run in runs) for key in ("seconds", "peak_bytes", "first_loss")}
        for name, runs in found.items()
    }
    losses = {name: result["first_loss"] for name, result in table.items()}
    if max(losses.values()) - min(losses.values()) > (2e-3 if precision == "bf16" else 1e-5) * max(losses.values()):
        raise click.ClickException(f"the contenders do not compute the same, losses of the first step: {losses}")
    ratios = {
        "transformers / lumina plain": table["transformers"]["seconds"] / table["lumina plain"]["seconds"],
        "transformers / lumina engine": table["transformers"]["seconds"] / table["lumina engine"]["seconds"],
        "lumina engine / lumina plain": table["lumina engine"]["seconds"] / table["lumina plain"]["seconds"],
    }
    if MASTERS in table:
        ratios[f"lumina engine / {MASTERS}"] = table["lumina engine"]["seconds"] / table[MASTERS]["seconds"]
    if as_json:
        print(json.dumps({"precision": precision, "contenders": table, "ratios": ratios}))
        return
    print(
        f"{precision}, {rows} rows of {length} tokens\n| contender | CPU seconds a step | peak MB | first loss |\n|---|---|---|---|"
    )
    for name, result in table.items():
        print(f"| {name} | {result['seconds']:.2f} | {result['peak_bytes'] / 1e6:.0f} | {result['first_loss']:.5f} |")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
