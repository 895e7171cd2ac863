"""`lumina plan check`: combinations, warnings, "auto", the batch equation, exit codes."""

from __future__ import annotations

import json

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.combinations import combination_warnings
from lumina_ds.config.deepspeed.report import batch_equation

NVME = {"device": "nvme"}


@pytest.fixture
def check(capsys, tmp_path):
    def run(settings, *args):
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        code = run_command(cli, ["plan", "check", str(path), *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, "nvme_path must name a folder"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ratio below 1 needs stage 3",
        ),
        ({"zero_optimization": {"stage": 3, "compute_grad_norm": False}}, "compute_grad_norm false needs stage 1 or 2"),
        ({"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"}, "refused with ZeRO-3; use mean"),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": 8}}, "mics_shard_size was removed from DeepSpeed"),
        (
            {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "'fp32' with fp16 needs ZeRO-1 or above",
        ),
        ({"bf16": {"bf16_optimizer_states": True}}, "needs bf16.bf16_master_weights_and_grads true"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "needs ZeRO stage 1, 2 or 3"),
        (
            {"torch_autocast": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "torch_autocast excludes",
        ),
        ({"optimizer": {"type": "AdamWW"}}, "is no optimizer of DeepSpeed or torch; did you mean AdamW?"),
        ({"optimizer": {"type": "OneBitAdam"}}, "is no optimizer of DeepSpeed or torch"),
        ({"scheduler": {"type": "WarmupDecayRL"}}, "did you mean WarmupDecayLR?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 5}}}, "did you mean warmup_num_steps?"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "use one of none, cpu, nvme"),
        ({"torch_autocast": {"dtype": "bfloat61"}}, "did you mean bfloat16?"),
        (
            {
                "expert_parallel": {"enabled": True, "expert_tensor_parallel_size": 2},
                "zero_optimization": {"stage": 3},
            },
            "expert_tensor_parallel_size above 1 is refused with ZeRO-3",
        ),
        (
            {
                "expert_parallel": {"enabled": True},
                "compile": {"autoep_non_moe": True},
                "zero_optimization": {"stage": 3},
            },
            "autoep_non_moe is refused with ZeRO-3",
        ),
    ],
)
def test_combinations(settings, message):
    assert any(message in fault for fault in deepspeed_faults(settings)), deepspeed_faults(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}}, "ZeRO-2 does not read stage3_max_live"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is deprecated"),
        ({"zero_optimization": True}, "an old form"),
        (
            {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "ZeRO-1 with bf16 and fp32 gradients keeps them whole",
        ),
        (
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 16},
            "more than 8 micro-batches are summed in bf16",
        ),
        ({"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1}}}, "max_grad_norm is not read"),
        (
            {
                "expert_parallel": {"enabled": True},
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}},
            },
            "cannot be saved",
        ),
    ],
)
def test_warnings_are_no_faults(settings, message):
    assert deepspeed_faults(settings) == []
    [warning] = combination_warnings(settings)
    assert message in warning


def test_offload_without_a_compiler(monkeypatch):
    settings = {
        "optimizer": {"type": "AdamW", "params": {}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    monkeypatch.setattr("shutil.which", lambda name: None)
    [warning] = combination_warnings(settings)
    assert "no C++ compiler" in warning and "torch_adam true" in warning
    settings["optimizer"]["params"]["torch_adam"] = True
    assert combination_warnings(settings) == []
    settings["optimizer"]["params"] = {}
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert combination_warnings(settings) == []


@pytest.mark.parametrize(
    ("numbers", "ranks", "expected"),
    [
        ((32, 2, 4), 4, "32 = 2 per GPU x 4 accumulated x 4 ranks"),
        ((32, 2, 4), None, "32 = 2 per GPU x 4 accumulated x 4 ranks"),
        ((32, 2, None), 4, "32 = 2 per GPU x 4 accumulated x 4 ranks"),
        ((32, None, 4), 4, "32 = 2 per GPU x 4 accumulated x 4 ranks"),
        ((None, 2, 4), 4, "32 = 2 per GPU x 4 accumulated x 4 ranks"),
        ((32, None, None), 4, "32 = 8 per GPU x 1 accumulated x 4 ranks"),
        ((None, 2, None), 4, "8 = 2 per GPU x 1 accumulated x 4 ranks"),
        ((32, "auto", "auto"), None, None),
        ((None, None, 4), 4, None),
    ],
)
def test_the_batch_equation_is_solved(numbers, ranks, expected):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    equation, fault = batch_equation({k: v for k, v in zip(names, numbers, strict=True) if v is not None}, ranks)
    assert fault is None
    assert equation == (f"train_batch_size {expected}" if expected else None)


def test_a_broken_batch_equation_names_what_holds(check):
    settings = {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    code, out, err = check(settings, "--gpus", "4")
    assert code == 2
    assert (
        "does not hold on 4 ranks: train_batch_size 30 is not micro-batch 2 x accumulation 3 x 4 = 24; set it to 24"
        in out
    )
    assert err.endswith("has 1 fault; nothing was started\n")


def test_auto_is_resolved_with_a_run(check):
    settings = {"train_batch_size": "auto", "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}}
    code, out, _ = check(settings, "--config", "b7", "--gpus", "8", "--json")
    record = json.loads(out)
    assert (code, record["ok"], record["faults"]) == (0, True, [])
    # b7: 2 rows x 16 micro-batches x 8 ranks.
    assert record["auto"] == {
        "train_batch_size": 256,
        "zero_optimization.stage3_prefetch_bucket_size": "DeepSpeed's default",
    }
    assert record["batch"] == "train_batch_size 256 = 2 per GPU x 16 accumulated x 8 ranks"
    assert record["composed"]["zero_optimization"]["stage"] == 3  # the file's, not the preset's


def test_contradictions_with_a_run_come_one_by_one(check):
    code, out, _ = check({"train_batch_size": 7, "gradient_clipping": 9}, "--config", "debug", "--json")
    record = json.loads(out)
    assert (code, record["ok"], len(record["faults"])) == (2, False, 2)


def test_the_text_form(check):
    code, out, _ = check({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert code == 0
    assert 'zero_optimization.reduce_bucket_size: "auto" -> set by the run' in out and "can be used" in out


@pytest.mark.parametrize(
    ("settings", "args", "message"),
    [
        ("{", (), "is not valid JSON"),
        ({}, ("--precision", "bf16"), "--precision goes with --config"),
        ({}, ("--config", "b77"), "did you mean b7?"),
    ],
)
def test_errors(check, settings, args, message):
    code, out, err = check(settings, *args)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
