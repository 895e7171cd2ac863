"""Keys of DeepSpeed's that change memory: planned, or refused in a run by name; and where a misplaced key belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.config.deepspeed.check import deepspeed_faults, unplanned_faults
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.deepspeed.keys import table
from lumina_ds.config.deepspeed.report import report_on_run
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan.memory import plan_memory
from lumina_ds.text import GIB

UNPLANNED = [
    (path, key, known.kind)
    for path, section in table().sections.items()
    for key, known in section.items()
    if known.role == "unplanned"
]
ON: dict[str, Any] = {"bool": True, "int": 2, "number": 0.5, "section": {"autotp_size": 2}, "str": "fp32"}


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("path", "key", "kind"), UNPLANNED)
def test_a_key_that_no_plan_follows_is_refused_by_name(path: str, key: str, kind: str) -> None:
    name = f"{path}.{key}" if path else key
    [fault] = unplanned_faults(nested(name, ON[kind]))
    assert fault.startswith(f"{name} is ") and "changes memory" in fault and fault.endswith("remove it")
    for off in (None, False, 0, 1, 1.0, "auto", {}, {"enabled": False}):
        assert unplanned_faults(nested(name, off)) == [], off


def test_the_faults_that_were_found_are_among_them() -> None:
    keys = {key for _, key, _ in UNPLANNED}
    assert keys >= {
        "bf16_master_weights_and_grads", "bf16_optimizer_states", "ratio", "stage3_model_persistence_threshold",
        "communication_data_type", "parameter_alignment", "tensor_parallel", "zenflow", "super_offload",
    }  # fmt: skip


def run_of(tmp_path: Path, section: dict[str, Any]) -> RunConfig:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
    overrides = [
        Override("deepspeed.config", str(tmp_path / "ds.json"), "x"),
        Override("deepspeed.zero_stage", None, "x"),
    ]
    return load_config("b7", overrides).config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"stage": 2, "cpu_offload": True}, {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        (
            {"stage": 3, "cpu_offload_param": True},
            {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}},
        ),
        ({"stage": 2, "cpu_offload": False}, {"stage": 2}),
    ],
)
def test_old_names_are_planned_as_deepspeed_reads_them(tmp_path: Path, old: Any, new: Any) -> None:
    one, other = (plan_memory(run_of(tmp_path, each), 8, "bf16") for each in (old, new))
    assert (one.peak_bytes, one.host_bytes) == (other.peak_bytes, other.host_bytes)
    without = plan_memory(run_of(tmp_path, {"stage": old["stage"]}), 8, "bf16")
    assert (without.peak_bytes - one.peak_bytes > GIB) is any(value is True for value in old.values())
    composed = compose_deepspeed(run_of(tmp_path, old), 8, "bf16")["zero_optimization"]
    assert not {"cpu_offload", "cpu_offload_param"} & composed.keys()


def test_both_names_of_a_section_are_refused(tmp_path: Path) -> None:
    config = run_of(tmp_path, {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}})
    [fault] = report_on_run(config, 8, "bf16").faults
    assert "cpu_offload is the old name of offload_optimizer, which is there too; remove cpu_offload" in fault


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"stage": 3}, "unknown DeepSpeed key stage; it belongs into zero_optimization"),
        ({"reduce_bucket_size": 1}, "it belongs into zero_optimization"),
        ({"loss_scale": 0}, "it belongs into fp16"),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, "it belongs to the top level"),
        ({"expert_parallel_size": 4}, "it is expert_parallel.autoep_size, which the run sets: --expert-parallel N"),
        ({"zero_optimization": {"reduce_buckt_size": 1}}, "did you mean reduce_bucket_size?"),
        ({"optimizer": {"type": "FusedAdam"}}, "write AdamW, which is fused on a GPU"),
        ({"optimizer": {"type": "AdamW8bit"}}, "DeepSpeed has no optimizer in 8 bits"),
        ({"expert_parallel": {"enabled": True, "comm_backend": "deepep"}}, "needs comm_max_tokens_per_rank"),
    ],
)
def test_a_hint_leads_to_the_right_place(content: dict[str, Any], says: str) -> None:
    assert any(says in fault for fault in deepspeed_faults(content)), deepspeed_faults(content)
