"""One MoE layer beside its peers: forward and backward on a CPU, as a fraction of a dense layer's speed.

    python tests/benchmarks/bench_moe_layer.py --experts 8 --experts 64 --tokens 2048

Every contender gets the same shape and input; the dense layer does the same active FLOPs (width top-k x F). Rounds of
all contenders alternate, CPU time of the process counts, and the ratio is taken within each round; the table has its
median.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor, nn

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import start, stop
from lumina_ds.model.feed_forward import SwiGLU
from lumina_ds.model.init import initialize
from lumina_ds.model.moe import MoE
from lumina_ds.model.transformer import CausalLM

Contender = Callable[[Tensor], Tensor]
OURS, DENSE = "lumina", "dense"


def run_config(experts: int, hidden: int, width: int, top_k: int) -> RunConfig:
    model = {
        "vocab_size": 64, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "num_experts": experts, "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
    }  # fmt: skip
    return RunConfig.model_validate({"model": model})


def build(experts: int, hidden: int, width: int, top_k: int, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Any]]:
    """Modules by name, each with the function that picks the hidden states out of what it returns."""
    config = run_config(experts, hidden, width, top_k)
    modules: dict[str, tuple[nn.Module, Any]] = {
        DENSE: (SwiGLU(hidden, top_k * width), None),
        OURS: (MoE(config.model), None),
    }
    for grouped in (True, False):
        modules[f"AutoEP {'grouped' if grouped else 'loop'}"] = (_autoep(config, grouped), None)
        implementation = "grouped_mm" if grouped else "eager"
        modules[f"transformers {implementation}"] = (_transformers(config, implementation), None)
    for name, options in {"cf 1.25": {"capacity_factor": 1.25}, "dropless": {"drop_tokens": False}}.items():
        modules[f"deepspeed.moe {name}"] = (_deepspeed_moe(config, options), lambda output: output[0])
    for module, _ in modules.values():
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.05, generator=generator)
        module.to(dtype)
    return modules


def _autoep(config: RunConfig, grouped: bool) -> nn.Module:
    """The layer as DeepSpeed makes it, with its own router."""
    import deepspeed

    composed = compose_deepspeed(config, 1, "fp32")
    composed["expert_parallel"]["use_grouped_mm"] = grouped
    model = CausalLM(config.model)
    initialize(model, config.model, 0)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=composed)
    return engine.module.model.layers[0].mlp


def _transformers(config: RunConfig, implementation: str) -> nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    model = config.model
    foreign = Qwen3MoeConfig(
        hidden_size=model.hidden_size, moe_intermediate_size=model.moe_intermediate_size,
        num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok, norm_topk_prob=True,
        num_hidden_layers=1,
    )  # fmt: skip
    foreign._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(foreign)


def _deepspeed_moe(config: RunConfig, options: dict[str, Any]) -> nn.Module:
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    model = config.model
    assert model.moe_intermediate_size is not None
    layer = DeepSpeedMoE(
        model.hidden_size, SwiGLU(model.hidden_size, model.moe_intermediate_size), num_experts=model.num_experts,
        k=model.num_experts_per_tok, use_rts=False, **options,
    )  # fmt: skip
    layer.set_deepspeed_parallelism()
    return layer


def measure(modules: dict[str, tuple[nn.Module, Any]], x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """{name: {"milliseconds", "of_dense"}}, medians over the rounds."""
    upstream = torch.randn_like(x)
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for index in range(rounds + 1):
        for name, (module, pick) in modules.items():
            hidden = x.detach().requires_grad_()
            begin = time.process_time()
            output = module(hidden)
            (output if pick is None else pick(output)).backward(upstream)
            elapsed = time.process_time() - begin
            module.zero_grad(set_to_none=True)
            if index:  # the first round warms up
                seconds[name].append(elapsed)
    return {
        name: {
            "milliseconds": 1000 * statistics.median(found),
            "of_dense": statistics.median(d / s for d, s in zip(seconds[DENSE], found, strict=True)),
        }
        for name, found in seconds.items()
    }


@click.command()
@click.option("--experts", multiple=True, type=int, default=(8, 64), show_default=True)
@click.option("--tokens", multiple=True, type=int, default=(2048,), show_default=True)
@click.option("--hidden", default=512, show_default=True)
@click.option("--width", default=512, show_default=True, help="Of one expert.")
@click.option("--top-k", default=2, show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    experts: tuple[int, ...], tokens: tuple[int, ...], hidden: int, width: int, top_k: int, precision: str,
    rounds: int, as_json: bool,
) -> None:  # fmt: skip
    start()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results = []
    for num_experts in experts:
        modules = build(num_experts, hidden, width, top_k, dtype)
        for num_tokens in tokens:
            x = torch.randn(1, num_tokens, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
            found = measure(modules, x, rounds)
            results.append({"experts": num_experts, "tokens": num_tokens, "precision": precision, "layers": found})
            if not as_json:
                _print(results[-1])
    if as_json:
        print(json.dumps(results))
    sys.stdout.flush()
    stop(0, clean=True)


def _print(result: dict[str, Any]) -> None:
    print(f"\n{result['experts']} experts, {result['tokens']} tokens, {result['precision']}")
    print("| layer | ms | of dense |\n|---|---|---|")
    for name, found in sorted(result["layers"].items(), key=lambda item: -item[1]["of_dense"]):
        print(f"| {name} | {found['milliseconds']:.0f} | {found['of_dense']:.2f} |")


if __name__ == "__main__":
    main()
