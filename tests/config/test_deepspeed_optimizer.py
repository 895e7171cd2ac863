"""The optimizer section and offload by option: what is composed, and what is refused with its reason."""

import pytest

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError


def composed(world_size=2, precision="fp32", **fields):
    overrides = [Override(name.replace("__", "."), value, f"--{name}") for name, value in fields.items()]
    return compose_deepspeed(load_config("debug", overrides).config, world_size, precision)


def test_adamw_is_torchs_fused_one_also_on_offloaded_states():
    json = composed(deepspeed__zero_stage=2, deepspeed__offload="optimizer")
    assert json["optimizer"]["type"] == "AdamW"
    assert json["optimizer"]["params"]["torch_adam"] and json["optimizer"]["params"]["fused"]
    assert json["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert json["zero_optimization"]["contiguous_gradients"]
    assert "offload_param" not in json["zero_optimization"]


def test_parameters_are_offloaded_at_stage_3():
    zero = composed(deepspeed__zero_stage=3, deepspeed__offload="optimizer+params")["zero_optimization"]
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"


def test_cpu_adam_is_deepspeeds_kernel():
    params = composed(train__optimizer="cpu_adam", deepspeed__zero_stage=2, deepspeed__offload="optimizer")
    assert params["optimizer"]["params"]["torch_adam"] is False and "fused" not in params["optimizer"]["params"]


def test_muon_takes_stage_1_by_itself_and_does_not_clip():
    json = composed(world_size=1, train__optimizer="muon", train__muon_learning_rate=0.01)
    assert json["zero_optimization"]["stage"] == 1 and json["gradient_clipping"] == 0.0
    assert json["optimizer"]["type"] == "Muon"
    params = json["optimizer"]["params"]
    assert (params["muon_lr"], params["lr"], params["momentum"]) == (0.01, 3e-3, 0.95)


REFUSED = {
    "muon at 0": ({"train__optimizer": "muon", "deepspeed__zero_stage": 0}, "muon with ZeRO-0.*--zero 1 or --zero 2"),
    "muon at 3": ({"train__optimizer": "muon", "deepspeed__zero_stage": 3}, "muon with ZeRO-3.*reduce_scatter"),
    "muon offloaded": (
        {"train__optimizer": "muon", "deepspeed__zero_stage": 2, "deepspeed__offload": "optimizer"}, "untested"
    ),
    "cpu_adam on the device": ({"train__optimizer": "cpu_adam"}, "add --offload optimizer"),
    "offload at 0": ({"deepspeed__zero_stage": 0, "deepspeed__offload": "optimizer"}, "needs ZeRO-1 or above, not 0"),
    "parameters at 2": ({"deepspeed__zero_stage": 2, "deepspeed__offload": "optimizer+params"}, "add --zero 3"),
    "a file that offloads": (
        {"deepspeed__config": "zero3_offload", "deepspeed__offload": "none"}, "offload_param is set.*--offload none"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        composed(**fields)


def test_cpu_adam_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler.*--optimizer adamw"):
        composed(train__optimizer="cpu_adam", deepspeed__zero_stage=2, deepspeed__offload="optimizer")


@pytest.mark.parametrize("vocabulary, expected", [(1000, 0.1), (1_000_000, 0.05), (10_000_000, 0.03)])
def test_warmup_is_chosen_by_size(tmp_path, vocabulary, expected):
    # 128 wide, tied: 1000 ids give 0.5M parameters, a million 128M, ten millions 1.3B.
    path = tmp_path / "own.yaml"
    path.write_text(
        f"model: {{vocab_size: {vocabulary}, hidden_size: 128, num_hidden_layers: 2, intermediate_size: 256, "
        "tie_word_embeddings: true}"
    )
    resolved = load_config(str(path))
    assert resolved.config.train.warmup_ratio == expected
    assert resolved.origins["train.warmup_ratio"] == "by the model's size"
    given = load_config(str(path), [Override("train.warmup_ratio", 0.2, "--warmup-ratio")])
    assert given.config.train.warmup_ratio == 0.2
