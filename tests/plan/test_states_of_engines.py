"""Model states of the plan, and what offloading puts into host memory, against the live tensors of real engines on two
ranks: equal to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan import plan_memory

# Odd sizes, so that groups need padding; a layer without experts, a shared expert, untied and tied heads.
SHAPE = {
    "vocab_size": 33, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 6, "max_position_embeddings": 8, "intermediate_size": 19, "qk_norm": True,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 7, "first_k_dense_layers": 1, "num_shared_experts": 1}
MODELS = {
    "dense": (SHAPE, 1),
    "experts": (SHAPE | EXPERTS, 1),
    "experts spread": (SHAPE | EXPERTS | {"tie_word_embeddings": True}, 2),
}


def cases():
    for name, (model, size) in MODELS.items():
        for precision in ("fp32", "mixed_bf16", "bf16"):
            for stage in (0, 1, 2, 3):
                if precision != "bf16" or stage:
                    yield case(name, model, size, precision, stage)
    yield case("dense", SHAPE, 1, "bf16", 1, "fp32")
    yield case("dense", SHAPE, 1, "bf16", 2, "fp32")
    yield case("experts spread", *MODELS["experts spread"], "bf16", 2, "fp32")
    yield case("dense", SHAPE, 1, "bf16", 3, "fp32")
    for name, (model, size) in MODELS.items():
        for stage in (1, 2):
            yield case(name, model, size, "fp32", stage, optimizer="muon")
    yield case("experts spread", *MODELS["experts spread"], "bf16", 1, optimizer="muon")
    yield case("experts spread", *MODELS["experts spread"], "bf16", 2, optimizer="muon")

    for name, (model, size) in MODELS.items():
        for stage, precision in ((1, "fp32"), (2, "bf16"), (3, "bf16")):
            yield case(name, model, size, precision, stage, offload="optimizer")
        yield case(name, model, size, "bf16", 3, offload="optimizer+params")
    yield case("dense", SHAPE, 1, "fp32", 3, offload="optimizer+params")
    yield case("dense", SHAPE, 1, "bf16", 2, offload="optimizer", accumulation=2)
    yield case("experts spread", *MODELS["experts spread"], "fp32", 1, offload="optimizer", accumulation=2)
    yield case("dense", SHAPE, 1, "fp32", 3, offload="optimizer", accumulation=2)


def case(name, model, size, precision, stage, gradients=None, optimizer="adamw", offload=None, accumulation=1):
    parts = [name, optimizer, precision, f"ZeRO-{stage}"]
    parts += [f"gradients {gradients}"] if gradients else []
    parts += [f"offload {offload} x {accumulation}"] if offload else []
    return {
        "name": " ".join(parts),
        "config": {
            "model": model,
            "train": {"optimizer": optimizer, "gradient_accumulation_steps": accumulation},
            "deepspeed": {"zero_stage": stage, "expert_parallel_size": size, "offload": offload},
        },
        "precision": precision,
        "gradients": gradients,
    }


def test_states_equal_the_live_tensors_of_two_ranks(run_ranks, tmp_path):
    pytest.importorskip("deepspeed")
    listed = list(cases())
    assert len(listed) >= 24
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(listed))
    measured = run_ranks(Path(__file__).parent / "states_worker.py", str(path), timeout=400)
    wrong = {}
    for entry, found in zip(listed, measured, strict=True):
        config = RunConfig.model_validate(entry["config"])
        composed = compose_deepspeed(config, 2, entry["precision"])
        if entry["gradients"]:
            composed["data_types"] = {"grad_accum_dtype": entry["gradients"]}
        plan = plan_memory(config, 2, entry["precision"], "cpu", composed)
        states = {**plan.states, "host": plan.host_bytes}
        planned = {component: states[component] for component in found}
        if planned != found:
            wrong[entry["name"]] = {key: (planned[key], found[key]) for key in found if planned[key] != found[key]}
    assert wrong == {}, "\n".join(f"{name}: {parts}" for name, parts in wrong.items())
