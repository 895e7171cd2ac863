"""The cheapest plan that fits: its order, its batch, its communication, its explanation, and the files it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.communication import communication_bytes
from lumina_ds.plan.explain import explain
from lumina_ds.plan.hardware import GPUS, find_gpu
from lumina_ds.plan.layout import Composer, Fixed, apply_layout, layout_json, layouts
from lumina_ds.plan.memory import PHASES, plan_memory
from lumina_ds.plan.search import find_cheapest
from lumina_ds.plan.states import OptimizerGroup, ZeroSettings
from lumina_ds.text import format_bytes

H100 = find_gpu("h100-80").usable_bytes


def preset(name, **fields):
    return load_config(name, [Override(key.replace("__", "."), value, key) for key, value in fields.items()]).config


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("h100-80", "h100-80"),
        ("H100", "h100-80"),
        ("h100 80GB", "h100-80"),
        ("RTX 4090", "rtx4090-24"),
        ("4090", "rtx4090-24"),
        ("l4", "l4-24"),
    ],
)
def test_cards_by_name(typed, name):
    assert find_gpu(typed).name == name


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("a100", "comes in several sizes; use a100-40 or a100-80"),
        ("h100-96", "did you mean h100-80?"),
        ("b100", "did you mean"),
        ("rtx4091", "did you mean rtx4090-24?"),
    ],
)
def test_unknown_cards_name_the_nearest(typed, message):
    with pytest.raises(ConfigError) as error:
        find_gpu(typed)
    assert message in str(error.value)


def test_every_size_has_a_named_card():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert all(gpu.name.endswith(f"-{gpu.memory_gb}") for gpu in GPUS)


# 100 elements on 4 ranks and 40 elements of experts on 2 pairs; two micro-batches of 10 tokens in bf16.
TINY = ModelConfig(hidden_size=8, num_hidden_layers=3, num_experts=4, moe_intermediate_size=8, first_k_dense_layers=1)
GROUPS = [OptimizerGroup("decay", (60, 40), 4), OptimizerGroup("experts", (40,), 2)]


def sent(stage, size=1, checkpointing=False, **zero):
    settings = ZeroSettings.from_json({"zero_optimization": {"stage": stage, **zero}}, 2)
    return communication_bytes(TINY, GROUPS, settings, 2, 10, 2, size, checkpointing, 2)


def test_communication_by_hand():
    # A ring of 4 moves 3/4, of 2 half of a buffer; an all-reduce twice that. N: 100 -> 104, 40 -> 40.
    reduced = 2 * 0.75 * 2 * 100 + 2 * 0.5 * 2 * 40
    assert sent(0).all_reduce == reduced and sent(0).all_gather == 0
    assert (sent(1).all_reduce, sent(1).all_gather) == (reduced, 0.75 * 2 * 104 + 0.5 * 2 * 40)
    assert sent(2).all_reduce == 2 * reduced
    third = sent(3, stage3_param_persistence_threshold=40)
    # Only the 60 is above the threshold; twice for each of two micro-batches. Gradients of everything, twice.
    assert third.all_gather == 2 * 2 * 0.75 * 2 * 60
    assert third.reduce_scatter == reduced and third.all_reduce == 0
    assert sent(0, 2).all_to_all == 2 * (2 * 4 * 10 * 2 * 0.5 * 8 * 2)  # 2 layers, 4 exchanges, k 2, width 8, bf16
    assert sent(0, 2, True).all_to_all == 1.5 * sent(0, 2).all_to_all
    assert sent(2, offload_optimizer={"device": "cpu"}).host == (2 * 2 + 2) * (26 + 20)


@pytest.mark.parametrize(("name", "gpus"), [("b7", 8), ("b14", 8), ("b50", 64)])
def test_the_choice_is_the_first_that_fits(name, gpus):
    config = preset(name)
    result = find_cheapest(config, gpus, "bf16", H100, 8)
    assert result.choice is not None and result.choice.plan.peak_bytes <= H100
    batch = (config.train.micro_batch_size, config.train.gradient_accumulation_steps)
    for layout in layouts(config, gpus, 8, "bf16", Fixed()):
        run = apply_layout(config, layout, *batch)
        plan = plan_memory(run, gpus, "bf16", deepspeed_json=layout_json(run, layout, gpus, Composer(run, "bf16")))
        if plan.peak_bytes <= H100:
            assert layout == result.choice.layout
            break


def test_costs_come_in_order():
    labels = [layout.label for layout in layouts(preset("debug"), 2, 2, "bf16", Fixed())]
    order = [
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-1, activation checkpointing full",
        "ZeRO-1, buckets of 50,000,000 elements",
        "ZeRO-1, expert parallel 2",
        "ZeRO-3",
        "ZeRO-2, offload of optimizer",
        "ZeRO-3, offload of optimizer and params",
    ]
    assert [labels.index(label) for label in order] == sorted(labels.index(label) for label in order)
    assert len(set(labels)) == len(labels)


def test_what_the_user_decided_stays():
    fixed = Fixed(zero_stage=3, activation_checkpointing="full", offload="none")
    assert {
        (x.zero_stage, x.activation_checkpointing, x.offload) for x in layouts(preset("b7"), 8, 8, "bf16", fixed)
    } == {(3, "full", "none")}


def test_a_users_json_decides_stage_and_offload():
    config = preset("b7", deepspeed__config="zero3_offload")
    choice = find_cheapest(config, 8, "bf16", H100, 8).choice
    assert (choice.plan.zero_stage, choice.plan.host_bytes > 0) == (3, True)
    assert choice.layout.label == "as configured"
    config = preset("b7", deepspeed__config="zero3", deepspeed__zero_stage=2)
    assert {layout.zero_stage for layout in layouts(config, 8, 8, "bf16", Fixed())} == {2}


def test_the_batch_reaches_the_budget_with_the_largest_micro_batch():
    config = preset("b7")
    result = find_cheapest(config, 8, "bf16", H100, 8, None, 4_000_000)
    choice = result.choice
    assert choice.tokens_per_step == pytest.approx(4_000_000, rel=0.02)
    assert choice.plan.peak_bytes <= H100
    larger = choice.plan.micro_batch_size + 1
    run = apply_layout(config, choice.layout, larger, choice.plan.gradient_accumulation_steps)
    plan = plan_memory(run, 8, "bf16", deepspeed_json=layout_json(run, choice.layout, 8, Composer(run, "bf16")))
    assert plan.peak_bytes > H100
    assert result.binding.startswith(f"memory: a micro-batch of {larger} peaks at {format_bytes(plan.peak_bytes)} in")
    assert result.advice[0].startswith(f"a micro-batch of {larger} fits with ZeRO-")


def test_advice_names_the_layout_that_communicates_less():
    config = preset("b300")
    result = find_cheapest(config, 128, "bf16", find_gpu("b200").usable_bytes, 8)
    assert (result.choice.layout.zero_stage, result.choice.layout.expert_parallel_size) == (3, 1)
    [advice] = [line for line in result.advice if "between the GPUs" in line]
    kept = result.choice.layout.activation_checkpointing
    spread = find_cheapest(config, 128, "bf16", find_gpu("b200").usable_bytes, 8, Fixed(3, 8, kept, "none"))
    sent = [found.choice.communication.network_bytes for found in (spread, result)]
    assert sent[0] < 0.5 * sent[1]
    assert not any("offload" in line for line in result.advice)
    assert f"{format_bytes(sent[1])} between the GPUs: ZeRO-3, expert parallel" in advice


def test_a_small_budget_binds_before_memory():
    result = find_cheapest(preset("b1"), 8, "bf16", H100, 8, None, 8 * 2048 * 4)
    assert (result.choice.plan.micro_batch_size, result.choice.plan.gradient_accumulation_steps) == (4, 1)
    assert result.binding == "the token budget: all 4 rows of a GPU fit one micro-batch"


def test_nothing_fits_says_what_would():
    result = find_cheapest(preset("b300"), 8, "bf16", find_gpu("l4").usable_bytes, 8)
    assert result.choice is None
    assert "offload of optimizer and params" in result.smallest.layout.label
    assert result.binding.startswith("memory: the smallest layout") and result.advice


def test_a_budget_below_one_row_is_refused():
    with pytest.raises(ConfigError, match="below one row of 4096 tokens on each of 8 GPUs; use at least 32768"):
        find_cheapest(preset("b7"), 8, "bf16", H100, 8, None, 30_000)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_explanations_evaluate_to_the_bytes(stage, size, offload, precision):
    if stage == 0 and (precision == "bf16" or offload != "none"):
        return
    fields = {"zero_stage": stage, "expert_parallel_size": size, "offload": offload}
    config = preset("debug", **{f"deepspeed__{name}": value for name, value in fields.items()})
    composed = compose_deepspeed(config, 2, precision)
    plan = plan_memory(config, 2, precision, deepspeed_json=composed)
    lines = explain(plan, config, composed)
    assert sum(line.num_bytes for line in lines[:-4]) == plan.peak_bytes
    assert [line.component for line in lines[-4:]] == [f"total of {phase}" for phase in PHASES] + ["peak"]
    assert explained_as_planned(lines, plan)


SHAPES = {
    "experts": {},
    "spread": {"deepspeed__expert_parallel_size": 2},
    "shared": {"model__num_shared_experts": 1, "model__first_k_dense_layers": 1, "model__intermediate_size": 96},
    "dense": {
        "model__num_experts": 0,
        "model__moe_intermediate_size": None,
        "model__intermediate_size": 352,
        "model__qk_norm": True,
    },
}


@pytest.mark.parametrize("precision", ["bf16", "fp32", "mixed_bf16"])
@pytest.mark.parametrize("chunk", [0, 700])
@pytest.mark.parametrize("mode, interval", [("none", 1), ("attention", 1), ("experts", 2), ("full", 2)])
@pytest.mark.parametrize("shape", ["experts", "spread", "shared", "dense"])
def test_explanations_of_activations_evaluate(precision, chunk, mode, interval, shape):
    changes = {"loss_chunk_tokens": chunk, "activation_checkpointing": mode, "checkpoint_interval": interval}
    changes = {f"train__{name}": value for name, value in changes.items()} | SHAPES[shape]
    config = preset("debug", **changes)
    composed = compose_deepspeed(config, 2, precision)
    for device in ("cuda", "cpu"):
        plan = plan_memory(config, 2, precision, device, composed)
        # Not the peak's alone: each phase in turn as if it were.
        for phase in PHASES:
            peaking = _peaking(plan, phase)
            assert explained_as_planned(explain(peaking, config, composed), peaking)


def _peaking(plan, phase):
    others = {name: dict.fromkeys(plan.phases[name], 0) for name in PHASES if name != phase}
    return replace(plan, phases={phase: plan.phases[phase], **others})


def explained_as_planned(lines, plan):
    """Whether every component is there with the plan's bytes, and its numbers give them by Python's arithmetic too."""
    expected = {name: size for name, size in plan.breakdown.items() if size}
    expected |= {f"total of {phase}": plan.phase_bytes(phase) for phase in PHASES} | {"peak": plan.peak_bytes}
    assert {line.component: line.num_bytes for line in lines} == expected
    assert all(evaluated(line) == line.num_bytes and line.formula for line in lines)
    return True


def evaluated(line):
    return eval(re.sub(r"(?<=\d),(?=\d)", "", line.filled).replace(" x ", " * "))


@pytest.mark.parametrize(
    ("stage", "offload", "message"),
    [(2, "optimizer+params", r"needs ZeRO-3, not 2; add --zero 3"), (0, "optimizer", "needs ZeRO-1 or above, not 0")],
)
def test_offload_needs_its_stage(stage, offload, message):
    config = preset("debug", deepspeed__zero_stage=stage, deepspeed__offload=offload)
    with pytest.raises(ConfigError, match=message):
        compose_deepspeed(config, 2, "fp32")


def test_command_as_json(run_cli):
    words = "plan --config b7 --gpu H100 --gpus 8 --nodes 2 --global-batch-tokens 2000000 --explain --json"
    code, out, _ = run_cli(*words.split())
    record = json.loads(out)
    assert code == 0
    assert (record["world_size"], record["gpu_memory_gb"]) == (16, 80)
    cheapest = record["cheapest"]
    assert cheapest["fits"] and cheapest["layout"]["zero_stage"] == 1
    assert cheapest["peak_bytes"] == sum(cheapest["breakdown"].values()) <= H100
    assert cheapest["communication"]["all_reduce"] > 0
    assert record["explain"][-1]["component"] == "peak" and record["explain"][-1]["num_bytes"] == record["peak_bytes"]
    assert sum(line["num_bytes"] for line in record["explain"][:-4]) == record["peak_bytes"]


def test_a_card_without_bf16_is_planned_in_fp16(run_cli):
    record = json.loads(run_cli("plan", "--config", "b1", "--gpu", "v100-32", "--json")[1])
    assert record["precision"] == "fp16"
    code, _, err = run_cli("plan", "--config", "b1", "--gpu", "v100-32", "--precision", "bf16")
    assert code == 4 and "bf16 needs a GPU of compute capability 8.0" in err


def test_command_as_text(run_cli):
    code, out, _ = run_cli("plan", "--config", "b7", "--gpu", "h100-80", "--gpus", "8", "--explain")
    assert code == 0
    assert "Cheapest plan that fits h100-80: ZeRO-1" in out and "each GPU moves in a step: all-reduce" in out
    assert "    2 x 7,055,632,384 = 13.14 GiB" in out
    code, out, _ = run_cli("plan", "--config", "b300", "--gpu", "l4", "--gpus", "8")
    assert code == 0 and "Nothing fits l4-24" in out


def test_written_files_train(run_cli, corpus, tmp_path):
    folder = tmp_path / "planned"
    words = ["plan", "--config", "debug", "--gpu", "l4", "--gpus", 2, "--offload", "optimizer", "--seq-length", 64]
    code, out, _ = run_cli(*words, "--global-batch-tokens", 1024, "--write", folder)
    assert code == 0 and "Written; train with: lumina train --config" in out
    files = ["--config", folder / "run.yaml", "--deepspeed_config", folder / "ds.json"]
    code, out, err = run_cli("train", *files, "--data", corpus.shards, "--dry-run", "--json", "--", "--num_gpus", 2)
    assert code == 0, err
    record = json.loads(out)
    assert record["deepspeed"]["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert record["deepspeed"]["train_batch_size"] == 16  # 1024 tokens of 64 a row
    assert record["plan"]["precision"] == "mixed_bf16"  # a small model
    assert record["config"]["model.num_experts"]["value"] == 4
    assert run_cli("plan", "check", folder / "ds.json", "--config", folder / "run.yaml", "--gpus", 2)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config b7 --gpu h101", "is no known card; did you mean h100-80?"),
        ("--config b7 --device cpu --gpu h100", "plan for GPUs"),
        ("--config b300 --gpus 8 --gpu l4 --write x", "nothing fits, so nothing was written"),
        ("--config b7 --gpus 8 --zero 2 --offload optimizer+params", "needs ZeRO-3, not 2"),
        ("--gpus 8", "--config is missing"),
    ],
)
def test_errors(run_cli, words, message):
    code, out, err = run_cli("plan", *words.split())
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_the_search_keeps_the_offload_that_the_run_asks_for():
    config = load_config("b1").config
    config.deepspeed.offload = "optimizer"
    found = find_cheapest(config, 8, "bf16", 1 << 50)
    assert found.choice.layout.offload == "optimizer"
    assert found.choice.config.deepspeed.offload == "optimizer"
    assert found.choice.deepspeed_json["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    config.deepspeed.offload = "none"
    assert find_cheapest(config, 8, "bf16", 1 << 50).choice.layout.offload == "none"
    config.deepspeed.offload = "optimizer"
    one = find_cheapest(config, 8, "bf16", 1 << 50, fixed=Fixed(zero_stage=1))
    assert (one.choice.layout.zero_stage, one.choice.layout.offload) == (1, "optimizer")
