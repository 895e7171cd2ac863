"""Resolution of a configuration: layers, origins, and faults that are all reported at once."""

from __future__ import annotations

import pytest

from lumina_ds.config.checks import model_faults
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.yaml_file import MAX_YAML_BYTES
from lumina_ds.errors import ConfigError


def write(path, text):
    path.write_text(text)
    return str(path)


def test_command_line_beats_yaml_beats_preset_beats_default(tmp_path):
    source = write(
        tmp_path / "run.yaml", "preset: debug\ntrain:\n  learning_rate: 1.0e-3\n  seed: 7\n  weight_decay: 0.2\n"
    )
    resolved = load_config(source, [Override("train.seed", "9", "--seed")])
    train = resolved.config.train
    assert (train.seed, train.learning_rate, train.micro_batch_size, train.adam_beta1) == (9, 1e-3, 8, 0.9)
    assert resolved.origins["train.seed"] == "command line --seed"
    assert resolved.origins["train.learning_rate"] == f"file {source}"
    assert resolved.origins["train.micro_batch_size"] == "preset debug"
    assert resolved.origins["train.adam_beta1"] == "default"


def test_all_faults_are_reported_together(tmp_path):
    source = write(tmp_path / "run.yaml", "preset: debug\nmodle:\n  x: 1\ntrain:\n  learning_rat: 1\n  seed: -1\n")
    with pytest.raises(ConfigError) as error:
        load_config(source)
    message = str(error.value)
    assert message.startswith("3 faults:")
    assert f"unknown field modle (file {source}, line 2, column 1: 'modle:'); did you mean model?" in message
    wrong = f"unknown field train.learning_rat (file {source}, line 5, column 3: '  learning_rat: 1')"
    assert f"{wrong}; did you mean train.learning_rate?" in message
    assert f"train.seed is -1 (file {source}, line 6, column 3: '  seed: -1'): input should be greater" in message


def test_shape_faults_are_reported_together():
    overrides = [
        Override("model.num_attention_heads", 3, "--heads"),
        Override("model.num_key_value_heads", 2, "--kv"),
        Override("data.seq_length", 512, "--seq-length"),
    ]
    with pytest.raises(ConfigError) as error:
        load_config("debug", overrides)
    message = str(error.value)
    assert "hidden_size 128 is not divisible by model.num_attention_heads 3" in message
    assert "num_attention_heads 3 is not divisible by model.num_key_value_heads 2" in message
    assert "data.seq_length 512 is above the context of 256 tokens" in message


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        (
            {"router_bias_update_rate": 0.001},
            ["router_bias_update_rate 0.001 and model.router_aux_loss_coef 0.01 balance the same load twice"],
        ),
        ({"router_bias_update_rate": 0.001, "router_aux_loss_coef": 0.0}, []),
        ({"router_bias_update_rate": 0.001, "router_aux_loss_scope": "sequence"}, []),
        ({"router_bias_update_rate": 0.0}, []),
        ({"min_capacity_factor": 1.0, "overflow_policy": "drop"}, ["set both or neither"]),
        ({"min_capacity_factor": 1.0, "max_capacity_factor": 2.0}, ["no meaning where nothing overflows"]),
        (
            {"min_capacity_factor": 1.5, "max_capacity_factor": 1.0, "overflow_policy": "drop"},
            ["capacity_factor 1.25 starts outside of model.min_capacity_factor 1.5"],
        ),
        ({"min_capacity_factor": 1.0, "max_capacity_factor": 2.0, "overflow_policy": "reroute"}, []),
        (
            {"num_experts": 0, "intermediate_size": 8, "overflow_policy": "drop", "expert_dropout": 0.1},
            ["expert_dropout 0.1 needs routed experts", "overflow_policy drop needs routed experts"],
        ),
    ],
)
def test_routing_settings_that_contradict_each_other(settings, faults):
    config = RunConfig.model_validate({"model": {"num_experts": 4, "moe_intermediate_size": 8} | settings})
    found = model_faults(config)
    assert len(found) == len(faults)
    for message, expected in zip(found, faults, strict=True):
        assert expected in message and ("set " in message or "move " in message), message


def test_a_duplicate_yaml_key_is_refused(tmp_path):
    source = write(tmp_path / "run.yaml", "train:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML.*'seed' stands twice"):
        load_config(source)


def test_a_mistyped_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"--config debgu is neither a preset nor a file; did you mean debug\?"):
        load_config("debgu")


def test_a_mistyped_preset_inside_a_file_names_the_nearest(tmp_path):
    source = write(tmp_path / "run.yaml", "preset: b6_qualty\n")
    with pytest.raises(ConfigError, match=r"preset 'b6_qualty' does not exist; did you mean b6_quality\?"):
        load_config(source)


def test_a_chosen_deepspeed_json_replaces_the_presets_stage():
    resolved = load_config("b50", [Override("deepspeed.config", "zero2_offload", "--deepspeed_config")])
    assert resolved.config.deepspeed.zero_stage is None
    assert resolved.origins["deepspeed.zero_stage"] == "left to zero2_offload"


def test_an_asked_stage_stays_beside_a_deepspeed_json():
    overrides = [
        Override("deepspeed.zero_stage", 3, "--zero"),
        Override("deepspeed.config", "zero2", "--deepspeed_config"),
    ]
    assert load_config("b50", overrides).config.deepspeed.zero_stage == 3


def test_a_section_that_is_no_mapping_is_a_fault_not_a_crash(tmp_path):
    source = write(tmp_path / "run.yaml", "preset: b50\ndeepspeed: zero3\n")
    with pytest.raises(ConfigError, match="deepspeed is 'zero3'"):
        load_config(source)


def test_row_35_python_tags_are_not_run(tmp_path):
    marker = tmp_path / "executed"
    text = f"train: !!python/object/apply:os.mkdir ['{marker}']\n"
    with pytest.raises(ConfigError, match=r"is not valid YAML: tag !!python.object.apply:os.mkdir"):
        load_config(write(tmp_path / "run.yaml", text))
    assert not marker.exists()


@pytest.mark.parametrize("ending", ["data: {train_data: *a8}\n", "data: &me {train_data: [*me]}\n"])
def test_row_35_an_alias_bomb_is_refused_at_once(tmp_path, ending):
    """Nine aliases of nine aliases, nine times over: 43 million values in 500 bytes. And one that holds itself."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="holds above 20000 values once its aliases are written out"):
        load_config(write(tmp_path / "run.yaml", "\n".join(lines) + "\n" + ending))


def test_row_35_a_file_too_large_for_a_configuration_is_not_read(tmp_path):
    with pytest.raises(ConfigError, match="is larger than 1,048,576 bytes"):
        load_config(write(tmp_path / "run.yaml", "#" * (MAX_YAML_BYTES + 1)))


@pytest.mark.parametrize("what", ["log", "eval", "save"])
def test_names_in_steps_are_those_in_batches(tmp_path, what):
    old, new = f"train.{what}_every_n_batches", f"train.{what}_every_n_steps"
    found = load_config("debug", [Override(new, "7", f"--{new}")])
    assert getattr(found.config.train, f"{what}_every_n_batches") == 7
    assert found.origins[old] == f"command line --{new}"
    file = write(tmp_path / "run.yaml", f"preset: debug\ntrain: {{{what}_every_n_steps: 9}}\n")
    assert getattr(load_config(file).config.train, f"{what}_every_n_batches") == 9
    assert getattr(load_config(file, [Override(old, "8", "x")]).config.train, f"{what}_every_n_batches") == 8
    same = [Override(new, "7", f"--{new}"), Override(old, "7", f"--{old}")]
    assert getattr(load_config("debug", same).config.train, f"{what}_every_n_batches") == 7
    with pytest.raises(ConfigError, match=f"--{new} 7 and --{old} 8 set the same; leave one of them out"):
        load_config("debug", [same[0], Override(old, "8", f"--{old}")])
    both = write(
        tmp_path / "both.yaml", f"preset: debug\ntrain: {{{what}_every_n_steps: 9, {what}_every_n_batches: 8}}\n"
    )
    with pytest.raises(ConfigError, match=f"{old} is 8, and its other name says 9; keep one of them"):
        load_config(both)
    with pytest.raises(ConfigError, match=f"{old} is 'x'"):
        load_config("debug", [Override(new, "x", f"--{new}")])


def test_a_field_of_several_types_is_named_once(tmp_path):
    source = write(tmp_path / "run.yaml", 'preset: debug\ntrain:\n  fused_kernels: 0\n  "a\\nb": 1\n')
    with pytest.raises(ConfigError) as error:
        load_config(source)
    first, fused, unknown = str(error.value).splitlines()
    assert first == "2 faults:" and "train.fused_kernels is 0" in fused and "literal[" not in fused
    assert fused.endswith("input should be 'auto', 'on' or 'off', or a valid list")
    assert "unknown field train.a\\nb" in unknown
