"""Composition of the DeepSpeed JSON: the run's settings over the user's file, contradictions refused."""

from __future__ import annotations

import json
import re

import pytest

from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.compose import compose_deepspeed, resolve_zero_stage
from lumina_ds.config.deepspeed.tree import deepspeed_config_names, load_deepspeed_json
from lumina_ds.config.load import load_config
from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError

SHIPPED = [
    "moe_zero1",
    "moe_zero2",
    "moe_zero3",
    "zero0",
    "zero1",
    "zero2",
    "zero2_offload",
    "zero3",
    "zero3_nvme",
    "zero3_offload",
]


@pytest.fixture
def debug():
    return load_config("debug").config


@pytest.fixture
def with_file(debug, tmp_path):
    def build(settings):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(settings))
        debug.deepspeed.config = str(path)
        return debug

    return build


def test_the_shipped_list():
    assert deepspeed_config_names() == SHIPPED


def test_an_installed_package_carries_them_inside(tmp_path, monkeypatch):
    installed = tmp_path / "ds_configs"
    installed.mkdir()
    (installed / "only.json").write_text('{"steps_per_print": 7}')
    monkeypatch.setattr("lumina_ds.config.deepspeed.tree._FOLDERS", (installed, tmp_path / "absent"))
    assert deepspeed_config_names() == ["only"]
    assert load_deepspeed_json("only") == {"steps_per_print": 7}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_json_passes_and_composes(debug, name):
    shipped = load_deepspeed_json(name)
    assert deepspeed_faults(shipped) == []
    debug.deepspeed.config = name
    composed = compose_deepspeed(debug, 2, "fp32")
    assert deepspeed_faults(composed) == []
    kept = {key: value for key, value in shipped["zero_optimization"].items() if value != "auto"}
    assert composed["zero_optimization"].items() >= kept.items()
    assert '"auto"' not in json.dumps(composed)


def test_debug_on_two_ranks(debug):
    composed = compose_deepspeed(debug, 2, "fp32")
    assert composed["train_batch_size"] == 16
    assert composed["train_micro_batch_size_per_gpu"] == 8
    assert composed["gradient_accumulation_steps"] == 1
    assert composed["gradient_clipping"] == 1.0
    assert composed["optimizer"] == {
        "type": "AdamW",
        "params": {
            "lr": 3e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "torch_adam": True,
            "fused": True,
        },
    }
    # Experts: contiguous gradients stay at DeepSpeed's default, the only path it tests with them.
    assert composed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 501_376, "overlap_comm": False}
    assert "bf16" not in composed and "fp16" not in composed and "torch_autocast" not in composed


def test_experts_are_named_exactly(debug):
    debug.model = ModelConfig(
        num_hidden_layers=4, num_experts=4, first_k_dense_layers=1, moe_intermediate_size=8, intermediate_size=8
    )
    section = compose_deepspeed(debug, 2, "fp32")["expert_parallel"]
    pattern = section["moe_layer_pattern"]
    matched = [layer for layer in range(20) if re.fullmatch(pattern, f"model.layers.{layer}.mlp")]
    assert matched == [1, 2, 3]
    assert not re.fullmatch(pattern, "model.layers.1.mlp.experts")
    assert section["enabled"] is True
    assert (section["router_pattern"], section["expert_pattern"]) == ("router", "experts")
    assert (section["expert_w1"], section["expert_w2"], section["expert_w3"]) == ("w1", "w2", "w3")
    assert (section["num_experts_attr"], section["top_k_attr"]) == ("num_experts", "num_experts_per_tok")
    assert "has_shared_experts" not in section


def test_shared_experts_are_named(debug):
    debug.model.num_shared_experts = 1
    section = compose_deepspeed(debug, 1, "fp32")["expert_parallel"]
    assert section["has_shared_experts"] is True
    assert section["shared_experts_pattern"] == "shared_experts"


def test_a_dense_model_has_no_expert_section(debug):
    debug.model = ModelConfig(intermediate_size=64, hidden_size=32, num_hidden_layers=1)
    composed = compose_deepspeed(debug, 2, "fp32")
    assert "expert_parallel" not in composed
    assert composed["zero_optimization"]["contiguous_gradients"] is False


@pytest.mark.parametrize(
    ("precision", "section"),
    [
        ("bf16", {"bf16": {"enabled": True}}),
        ("fp16", {"fp16": {"enabled": True}}),
        ("mixed_bf16", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    ],
)
def test_precision_sections(debug, precision, section):
    composed = compose_deepspeed(debug, 2, precision)
    for name, values in section.items():
        assert composed[name].items() >= values.items()


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
def test_stage_0_leaves_clipping_to_the_trainer(debug, precision):
    assert compose_deepspeed(debug, 1, precision)["gradient_clipping"] == 0.0
    debug.deepspeed.zero_stage = 1
    assert compose_deepspeed(debug, 1, precision)["gradient_clipping"] == 1.0


def test_zero_clipping_is_written_out(debug):
    debug.train.max_grad_norm = 0.0
    assert compose_deepspeed(debug, 2, "bf16")["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("flag", "file", "world_size", "precision", "stage"),
    [
        (None, None, 1, "fp32", 0),
        (None, None, 2, "fp32", 1),
        (None, None, 1, "bf16", 1),
        (None, None, 1, "mixed_bf16", 0),
        (None, "zero2", 1, "fp32", 2),
        (3, "zero2", 1, "fp32", 3),
        (0, "zero2", 4, "fp32", 0),
        (2, None, 1, "bf16", 2),
    ],
)
def test_order_of_the_stage(debug, flag, file, world_size, precision, stage):
    debug.deepspeed.zero_stage = flag
    debug.deepspeed.config = file
    assert resolve_zero_stage(debug, world_size, precision) == stage
    assert compose_deepspeed(debug, world_size, precision)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("file", [None, "zero0"])
def test_pure_bf16_at_stage_0_is_refused(debug, file):
    debug.deepspeed.config = file
    debug.deepspeed.zero_stage = None if file else 0
    with pytest.raises(ConfigError, match=r"stage 0 with bf16.*use --zero 1, or --precision mixed_bf16"):
        compose_deepspeed(debug, 2, "bf16")


def test_buckets_are_sized_to_the_model():
    b7 = load_config("b7").config
    assert compose_deepspeed(b7, 8, "bf16")["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 200_000_000}
    debug = load_config("debug").config
    # debug: 270,336 parameters in experts, 501,376 in all; two ranks hold two experts each.
    debug.deepspeed.expert_parallel_size = 2
    assert compose_deepspeed(debug, 2, "fp32")["zero_optimization"]["reduce_bucket_size"] == 501_376 - 135_168


def test_auto_is_resolved_everywhere(with_file):
    config = with_file(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        }
    )
    composed = compose_deepspeed(config, 2, "bf16")
    assert composed["train_batch_size"] == 16
    assert composed["optimizer"]["params"]["lr"] == 3e-3
    assert composed["bf16"] == {"enabled": True}
    assert composed["fp16"] == {"enabled": False, "loss_scale": 0}
    assert composed["zero_optimization"]["reduce_bucket_size"] == 501_376
    assert "stage3_prefetch_bucket_size" not in composed["zero_optimization"]


def test_a_file_may_leave_the_stage_open(with_file):
    composed = compose_deepspeed(with_file({"bf16": {"enabled": True, "check_grad_overflow": False}}), 1, "bf16")
    assert composed["zero_optimization"]["stage"] == 1
    assert composed["bf16"] == {"enabled": True, "check_grad_overflow": False}


def test_equal_numbers_are_no_contradiction(with_file):
    config = with_file({"train_batch_size": 16, "gradient_clipping": 1, "optimizer": {"type": "adamw", "params": {}}})
    assert compose_deepspeed(config, 2, "fp32")["train_batch_size"] == 16


def test_a_contradicting_batch_shows_the_equation(with_file):
    config = with_file({"train_batch_size": 64})
    with pytest.raises(ConfigError, match=r"train_batch_size is 64, but the run has 16 .*8 x 1 x 2 ranks = 16"):
        compose_deepspeed(config, 2, "fp32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type is 'Lamb', but the run has 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, r"params\.lr is 1\.0, but the run has 0\.003"),
        ({"gradient_clipping": 5}, "gradient_clipping is 5, but the run has 1.0"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled is True, but the run has False \(--precision fp32\)"),
        ({"zero_optimization": True}, r'old form; write {"stage": 1}'),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, r"scheduler: .*set train\.lr_scheduler_type"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 4}}, r"autoep_size is 4, but the run has 1"),
        ({"zero_optimization": {"stgae": 2}}, r"zero_optimization\.stgae; did you mean stage\?"),
    ],
)
def test_contradictions_of_a_file(with_file, settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_deepspeed(with_file(settings), 2, "fp32")


def test_every_fault_is_reported_at_once(with_file):
    config = with_file({"gradient_cliping": 1.0, "zero_optimization": {"stage": 5}})
    config.deepspeed.expert_parallel_size = 3
    with pytest.raises(ConfigError) as error:
        compose_deepspeed(config, 2, "fp32")
    message = str(error.value)
    assert "gradient_cliping; did you mean gradient_clipping?" in message
    assert "zero_optimization.stage is 5" in message
    assert "num_experts 4 is not divisible by --expert-parallel 3" in message
    assert "2 ranks are not divisible by --expert-parallel 3; use 3 ranks, or --expert-parallel 2" in message


def test_experts_in_a_file_for_a_dense_model(debug):
    debug.model = ModelConfig(intermediate_size=64, hidden_size=32, num_hidden_layers=1)
    debug.deepspeed.config = "moe_zero2"
    with pytest.raises(ConfigError, match=r"expert_parallel is enabled, but model\.num_experts is 0"):
        compose_deepspeed(debug, 2, "fp32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps_per_print": 1, "steps_per_print": 2}', "'steps_per_print' stands twice"),
        ("[1]", "holds a list, not an object"),
        ("{", "is not valid JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_deepspeed_json(str(path))


def test_an_unknown_name_lists_the_shipped():
    with pytest.raises(ConfigError, match=r"--deepspeed_config zero4 is neither .* did you mean zero\d\? \(shipped: "):
        load_deepspeed_json("zero4")
