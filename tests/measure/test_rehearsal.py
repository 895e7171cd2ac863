"""Rehearsed ranks: DeepSpeed's set-up without memory, beside real ranks and beside the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.cli.plan.rehearse import rehearsal_checks
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.measure.rehearsal import RankRehearsal, rehearse, substituted
from lumina_ds.plan import plan_memory

# Odd sizes, so that partitions need padding.
MODEL = {
    "vocab_size": 33, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 6, "max_position_embeddings": 8, "intermediate_size": 19, "num_experts": 4, "moe_intermediate_size": 7,
    "first_k_dense_layers": 1, "num_shared_experts": 1,
}  # fmt: skip
CASES = [
    {"config": {"model": MODEL, "deepspeed": {"zero_stage": stage, "expert_parallel_size": 2}}, "precision": precision}
    for stage, precision in ((2, "bf16"), (3, "fp32"))
]


def test_rehearsed_checkpoints_equal_those_of_two_ranks(run_ranks, tmp_path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(CASES))
    real = run_ranks(Path(__file__).parent / "rehearsal_worker.py", str(path))
    for case, written in zip(CASES, real, strict=True):
        config = RunConfig.model_validate(case["config"])
        composed = compose_deepspeed(config, 2, case["precision"])
        ranks = rehearse(config, 2, case["precision"], composed, [0, 1])
        checks = rehearsal_checks(config, plan_memory(config, 2, case["precision"], "cuda", composed), composed, ranks)
        assert [check for check in checks if not check.ok] == []
        assert [rank.experts for rank in ranks] == [[0, 1], [2, 3]]
        rehearsed = dict(ranks[0].files) | dict(ranks[1].files)
        assert rehearsed == written and len(written) == 2


@pytest.mark.slow
def test_what_deepspeed_refuses_is_the_finding():
    config = RunConfig.model_validate({"model": MODEL, "deepspeed": {"zero_stage": 2}})
    composed = compose_deepspeed(config, 4, "bf16")
    composed["train_batch_size"] = 7
    (rank,) = rehearse(config, 4, "bf16", composed, [3])
    assert rank.rank == 3 and "train_batch" in rank.error
    plan = plan_memory(config, 4, "bf16", "cuda", composed)
    (check,) = rehearsal_checks(config, plan, composed, [rank])
    assert not check.ok and check.detail.startswith("as rank 3: ")


def test_checks_find_a_wrong_partition():
    config = RunConfig.model_validate({"model": MODEL, "deepspeed": {"zero_stage": 1, "expert_parallel_size": 2}})
    composed = compose_deepspeed(config, 4, "bf16")
    plan = plan_memory(config, 4, "bf16", "cuda", composed)
    wrong = RankRehearsal(0, 1, 2, 3, held_elements=5, experts=[0, 2], expert_group=[0, 1], replica_group=[0, 2])
    last = RankRehearsal(3, 1, 2, 3, held_elements=5, experts=[2, 3], expert_group=[2, 3], replica_group=[1, 3])
    between = RankRehearsal(1, 1, 2, 3, held_elements=5, experts=[2, 3], expert_group=[0, 1], replica_group=[1, 3])
    failed = [check for check in rehearsal_checks(config, plan, composed, [wrong, between, last]) if not check.ok]
    assert [check.name for check in failed] == [
        "groups divide, every expert has a rank",
        "the ranks' partitions sum to the model",
        "rank 0 holds what is planned",
        "rank 1 holds what is planned",
        "rank 3 holds what is planned",
    ]
    assert "experts [0, 2]" in failed[0].detail and "5 elements" in failed[1].detail


def test_substitutes_keep_bytes_and_are_named():
    json_, notes = substituted(
        {
            "fp16": {"enabled": True},
            "optimizer": {"params": {}},
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}},
        }
    )
    assert json_["bf16"] == {"enabled": True} and "fp16" not in json_
    assert json_["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert len(notes) == 3


@pytest.mark.slow
def test_b300_on_256_ranks_from_the_command_line(capsys):
    words = ["plan", "rehearse", "--config", "b300", "--nodes", "32", "--gpus", "8", "--zero", "3"]
    assert run_command(cli, [*words, "--expert-parallel", "16", "--gpu", "l4-24", "--json"]) == 2
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert "would fail on the cluster" in printed.err
    assert all(check["ok"] for check in record["checks"])
    assert [rank["rank"] for rank in record["ranks"]] == [0, 255]
    # 144 experts over 16 ranks.
    assert record["ranks"][1]["experts"] == list(range(135, 144))
    assert {rank["held_elements"] for rank in record["ranks"]} == {301_472_031_744}
    assert record["faults"][0].startswith("out of memory: a rank peaks at")
    assert any("reach over nodes of 8 GPUs" in warning for warning in record["warnings"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpus", "13", "--expert-parallel", "8"), "13 ranks are not divisible by --expert-parallel 8; use 8 or 16"),
        (("--gpu", "h100-8"), "did you mean h100-80?"),
        (("--seq-length", "9000"), "above the context of 4096"),
    ],
)
def test_impossible_requests(args, message, capsys):
    assert run_command(cli, ["plan", "rehearse", "--config", "b7", *args]) == 2
    assert message in capsys.readouterr().err
