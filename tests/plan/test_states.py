"""Model states per rank: hand-worked numbers at every stage, and the live tensors of real engines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from lumina_ds.config.load import load_config
from lumina_ds.plan.states import OptimizerGroup, StateBytes, ZeroSettings, optimizer_groups, state_bytes

# 23 elements over two ranks pad to 24, 12 each; 5 pad to 8, 4 each.
GROUPS = [OptimizerGroup("decay", (10, 6, 7), 2), OptimizerGroup("no_decay", (5,), 2)]


def settings(stage, **zero):
    section = {"stage": stage, "reduce_bucket_size": 100, **zero}
    return {"zero_optimization": section, "optimizer": {"params": {"fused": True}}}


def states(json_config, parameter_bytes=4, accumulation_steps=1, groups=GROUPS):
    zero = ZeroSettings.from_json(json_config, parameter_bytes)
    return state_bytes(groups, zero, parameter_bytes, parameter_bytes, accumulation_steps)


def test_padding_and_shares():
    assert [(group.numel, group.padded, group.partition) for group in GROUPS] == [(23, 24, 12), (5, 8, 4)]
    assert [group.shards for group in GROUPS] == [5 + 3 + 4, 3]


def test_stage_0_fp32():
    assert states(settings(0)) == StateBytes(
        parameters=4 * 28,
        moments=8 * 28,
        gradients=4 * 28,
        step_gradients=4 * 28,
        bucket=4 * 23,
    )


def test_stage_1_fp32():
    # Rank 0 holds [0, 12) of decay: the 10 and the 6; of no_decay [0, 4): the 5. Rank 1 holds [12, 24): the 6,
    # the 7 and one pad; of no_decay [4, 8): the 5 and three pads. Whole tensors stay for the step.
    fullest = max(10 + 6 + 5, 6 + 7 + 1 + 5 + 3)
    assert states(settings(1)) == StateBytes(
        parameters=4 * 32,
        master_weights=4 * 16,
        moments=8 * 16,
        gradients=4 * 32,
        step_gradients=4 * fullest,
        bucket=400,
        early_bucket=400,
        # All 28 elements in one flat copy, with all gradients beside it.
        flattened=4 * 28,
        reduced_gradients=4 * 32,
        step=4 * 12,
    )


def test_stage_1_bf16_casts_in_the_step():
    found = states(settings(1), parameter_bytes=2)
    assert (found.parameters, found.master_weights, found.gradients) == (2 * 32, 4 * 16, 2 * 32)
    assert (found.bucket, found.step) == (200, (4 + 2) * 12)


def test_an_unfused_optimizer_needs_two_more_copies():
    json_config = settings(1)
    json_config["optimizer"]["params"]["fused"] = False
    assert states(json_config).step == (4 + 8) * 12


def test_stage_1_with_fp32_gradients_keeps_them_all():
    json_config = {**settings(1), "data_types": {"grad_accum_dtype": "fp32"}}
    found = states(json_config, parameter_bytes=2)
    assert found.gradients == found.resident_gradients == found.step_gradients == 4 * 32 + 2 * 28


def test_stage_2_keeps_whole_tensors():
    found = states(settings(2))
    assert found.gradients == found.step_gradients == 4 * 22


def test_stage_2_with_experts_on_several_ranks():
    # Four ranks, two sets of two expert ranks: ranks 0 and 1 share the first expert partition.
    groups = [OptimizerGroup("decay", (16,), 4), OptimizerGroup("experts", (8, 4), 2)]
    # decay: [16] touched by all four. experts pad to 12, 6 each: [0, 6) touches the 8, [6, 12) both.
    assert states(settings(2), groups=groups).gradients == 4 * (16 + 12)


def test_stage_2_with_fp32_gradients_keeps_its_share():
    json_config = {**settings(2), "data_types": {"grad_accum_dtype": "fp32"}}
    assert states(json_config, parameter_bytes=2).gradients == 4 * 16


def test_accumulation_keeps_gradients_and_bucket():
    found = states(settings(1), accumulation_steps=4)
    assert (found.resident_gradients, found.resident_bucket) == (4 * 28, 400)
    assert states(settings(1, overlap_comm=True), accumulation_steps=4).resident_bucket == 800
    # Stage 2 lets its bucket go after every backward pass.
    assert states(settings(2), accumulation_steps=4).resident_bucket == 0


def test_without_contiguous_gradients_no_buffer_stands():
    found = states(settings(1, contiguous_gradients=False))
    assert (found.bucket, found.early_bucket) == (4 * 28, 0)


def test_stage_3():
    found = states(settings(3, stage3_param_persistence_threshold=6))
    shards, persistent = 15, 2 * 3 + 2 * 3
    assert found.parameters == 4 * (shards + persistent)
    assert (found.master_weights, found.moments, found.gradients) == (4 * shards, 8 * shards, 4 * shards)
    assert found.resident_gradients == 4 * shards
    assert found.resident_bucket == found.bucket == 400
    # Small parameters are let go for the step.
    assert (found.step, found.released, found.step_bucket) == (4 * 12, 4 * persistent, 400)


def test_offloading_the_optimizer():
    found = states(settings(2, offload_optimizer={"device": "cpu"}), parameter_bytes=2)
    assert (found.parameters, found.master_weights, found.moments) == (2 * 32, 0, 0)
    assert found.host == (16 + 2) * 16 + 2 * 10
    # Accumulation keeps what touches a share: of rank 1 the 6, the 7 and the 5; stage 1 waits for the last micro-batch.
    offload = {"offload_optimizer": {"device": "cpu"}}
    assert states(settings(2, **offload), 2, accumulation_steps=2).host == found.host + 2 * max(10 + 6 + 5, 6 + 7 + 5)
    assert states(settings(1, **offload), 2, accumulation_steps=2).host == found.host
    found = states(settings(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}), 2)
    assert (found.master_weights, found.gradients) == (0, 0)
    assert found.host == (16 + 2) * 15 + 2 * 15


def test_muon_keeps_one_momentum_of_whole_matrices():
    # muon: 23 elements pad to 24; rank 0 touches the 10 and the 6, rank 1 the 6 and the 7, and one pad.
    muon = [replace(GROUPS[0], is_muon=True), GROUPS[1]]
    found = states(settings(1), groups=muon)
    assert found.moments == 8 * 4 + 4 * max(10 + 6, 6 + 7)
    assert found.master_weights == 4 * 16
    # Its updates stand beside the contiguous gradients: 16 + 5 and 16, or 13 + 1 pad + 5 + 3 pads and 13.
    assert found.step_gradients == 4 * max(16 + 5 + 16, 14 + 8 + 13)
    assert states(settings(1, contiguous_gradients=False), groups=muon).step_gradients == 4 * max(16 + 5, 14 + 8)


def test_groups_of_muon():
    model = load_config("debug").config.model
    muon, decay, no_decay, experts = optimizer_groups(model, 4, 2, "muon")
    assert (muon.numel, decay.numel, no_decay.numel, experts.numel) == (98_304, 131_072 + 1_024, 640, 270_336 // 2)
    assert [group.is_muon for group in (muon, decay, no_decay, experts)] == [True, False, False, True]


def test_groups_of_debug():
    groups = optimizer_groups(load_config("debug").config.model, world_size=4, expert_parallel_size=2)
    assert [(group.name, group.numel, group.data_parallel_size) for group in groups] == [
        ("decay", 131_072 + 98_304 + 1_024, 4),
        ("no_decay", 640, 4),
        ("experts", 270_336 // 2, 2),
    ]


def test_large_expert_groups_are_cut_as_deepspeed_does():
    utils = pytest.importorskip("deepspeed.moe.utils")
    torch = pytest.importorskip("torch")
    model = load_config("b14").config.model
    planned = [g.tensors for g in optimizer_groups(model, 4, 1) if g.name == "experts"]
    shape = (model.num_experts, model.moe_intermediate_size, model.hidden_size)
    parameters = []
    for _ in range(3 * model.num_hidden_layers):
        parameter = torch.nn.Parameter(torch.empty(shape, device="meta"))
        parameter.allreduce, parameter.group_name = False, "ep_size_1"
        parameters.append(parameter)
    cut = utils.split_params_into_different_moe_groups_for_optimizer([{"params": parameters, "name": "decay"}])
    real = [tuple(p.numel() for p in g["params"]) for g in cut if g.get("moe") and g["params"]]
    assert planned == real


ENGINE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, deepspeed
# No compiled shared-memory collective: its buffers would outlive the test.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo")

def measure(config, dtype):
    torch.manual_seed(0)
    # Odd sizes, so that every group needs padding.
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 9), torch.nn.Linear(9, 3))
    groups = [
        {"name": "decay", "params": [p for p in model.parameters() if p.ndim == 2]},
        {"name": "no_decay", "params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    tensors = [[p.numel() for p in group["params"]] for group in groups]
    engine, optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    for _ in range(2):
        loss = engine(torch.ones(1, 5, dtype=dtype)).float().square().sum()
        engine.backward(loss)
        gradients = gradient_bytes(optimizer)
        engine.step()
    return {"tensors": tensors, "gradients": gradients, **state_bytes(optimizer)}

def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

def gradient_bytes(optimizer):
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return nbytes([optimizer.grad_partitions_flat_buffer])
    # Views share storages: what counts is the memory that they keep alive.
    kept = [t for tensors in optimizer.averaged_gradients.values() if tensors for t in tensors]
    kept += [p.grad for group in optimizer.bit16_groups for p in group if p.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(storages.values())

def state_bytes(optimizer):
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    masters = optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups
    moments = [s[k] for s in optimizer.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    if stage_3:
        # A persistent parameter of a single rank is its own partition.
        kept = [optimizer.lp_param_buffer, *(p.data for p in optimizer.persistent_parameters)]
        parameters = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    else:
        parameters = nbytes(optimizer.bit16_groups_flat)
    return {"parameters": parameters, "master_weights": nbytes(masters), "moments": nbytes(moments)}

results = []
for case in json.loads(sys.argv[2]):
    results.append(measure(case, torch.bfloat16 if "bf16" in case else torch.float32))
open(sys.argv[3], "w").write(json.dumps(results))
# A gloo thread may touch Python while the interpreter shuts down.
os._exit(0)
"""


@pytest.fixture(scope="module")
def engine_cases():
    cases = []
    for stage in (1, 2, 3):
        for bf16 in (False, True):
            zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 8}
            case = {
                "train_batch_size": 1,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
                "zero_optimization": zero,
            }
            cases.append({**case, "bf16": {"enabled": True}} if bf16 else case)
    return cases


@pytest.mark.slow
def test_states_equal_the_live_tensors_of_real_engines(engine_cases, tmp_path):
    pytest.importorskip("deepspeed")
    results = run_engines(engine_cases, tmp_path)
    for case, measured in zip(engine_cases, results, strict=True):
        parameter_bytes = 2 if "bf16" in case else 4
        groups = [OptimizerGroup("", tuple(tensors), 1) for tensors in measured["tensors"]]
        zero = ZeroSettings.from_json(case, parameter_bytes)
        planned = state_bytes(groups, zero, parameter_bytes, parameter_bytes, 1)
        found = replace(planned, **{part: measured[part] for part in ("parameters", "master_weights", "moments")})
        assert planned == found, case["zero_optimization"]
        assert planned.step_gradients == measured["gradients"], case["zero_optimization"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_engines(cases, tmp_path):
    script, out = tmp_path / "engines.py", tmp_path / "out.json"
    script.write_text(ENGINE)
    environment = {
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(script), os.getcwd(), json.dumps(cases), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())
