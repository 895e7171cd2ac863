"""An optimizer, an attention backend, a router's score and a schedule are added by one entry each, and then used."""

from pathlib import Path

import added_entries
import pytest
import torch

from lumina_ds.config.checks import attention_faults
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.optimizers import OPTIMIZERS, Optimizer
from lumina_ds.config.schema import ModelConfig, RunConfig, TrainConfig
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.export.hugging_face import hugging_face_family
from lumina_ds.model.attention_backends import choose_attention
from lumina_ds.model.router import Router
from lumina_ds.plan import plan_memory


@pytest.fixture
def toys(monkeypatch):
    for table, name, entry in added_entries.ENTRIES:
        monkeypatch.setitem(table, name, entry)


def configured(**values):
    return load_config(
        "debug", [Override(name.replace("__", "."), value, name) for name, value in values.items()]
    ).config


def test_toys_train_in_real_engines_and_are_planned_to_the_byte(run_ranks):
    found = run_ranks(Path(__file__).parent / "added_entries_worker.py", timeout=400)
    assert found.pop("attention calls") > 0
    assert sorted(found) == ["0", "1", "2", "3"]
    for stage, run in found.items():
        assert run["optimizer"] == "RMSprop", stage
        assert run["untested"] == (None if stage == "0" else True), stage
        assert run["keys"] == ["square_avg", "weight"], stage
        assert run["held"] == run["planned"] > 0, stage
        assert run["rates"] == [6e-3, 0.0], "(1 - 0)^2 and (1 - 1)^2 of the peak"
        assert run["losses"] == pytest.approx(found["0"]["losses"], rel=1e-4), stage
        assert run["losses"][1] != run["losses"][0], stage


def test_a_plan_counts_an_added_optimizers_states(toys):
    plan = plan_memory(configured(train__optimizer="rmsprop"), 1, "fp32", "cpu")
    assert plan.states["moments"] == 4 * plan.parameters.total
    assert plan_memory(configured(), 1, "fp32", "cpu").states["moments"] == 8 * plan.parameters.total


def test_an_added_backend_says_where_it_can_run(toys):
    config = configured(train__attention_backend="halved")
    assert choose_attention(config, "cpu", "fp32").backend == "halved"
    with pytest.raises(MachineError, match="attention_backend halved is not possible: it is a toy"):
        choose_attention(config, "cuda", "bf16")
    config.train.flash_attention = "on"
    assert "contradict each other" in attention_faults(config)[0]


def test_an_added_score_is_what_the_router_computes(toys):
    model = ModelConfig(
        hidden_size=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, norm_topk_prob=False,
        scoring_func="softplus",
    )  # fmt: skip
    router = Router(model, 0)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(2, 8))
    weights, indices, _ = router(torch.tensor([[0.0, 1.0, 0, 0, 0, 0, 0, 0]]))
    assert indices.tolist() == [[1]] and weights.item() == pytest.approx(1.3132617)  # log(1 + e)
    shares = router.statistics.measured[2:4].tolist()
    assert shares == pytest.approx([0.6931472 / 2.0064089, 1.3132617 / 2.0064089])  # over log 2 + log(1 + e)
    with pytest.raises(ConfigError, match="scoring_func softplus: no published shape"):
        hugging_face_family(model)


def test_an_added_schedule_is_followed(toys):
    train = TrainConfig(learning_rate=1.0, lr_scheduler_type="square", warmup_ratio=0.2)
    assert [learning_rate(step, 6, train) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 4 / 9, 1 / 9, 0.0])


@pytest.mark.parametrize(
    ("field", "mistyped", "expected"),
    [
        ("train.optimizer", "adam", "'adamw', 'cpu_adam' or 'muon'; did you mean adamw?"),
        ("train.attention_backend", "flesh", "'auto', 'flash', 'varlen', 'flex', 'sdpa' or 'reference'; did you mean flash?"),
        ("model.scoring_func", "softmin", "'softmax' or 'sigmoid'; did you mean softmax?"),
        ("train.lr_scheduler_type", "cos", "'cosine', 'linear', 'onecycle', 'wsd' or 'constant'; did you mean cosine?"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_all_names_and_the_nearest(field, mistyped, expected):
    with pytest.raises(ConfigError) as error:
        load_config("debug", [Override(field, mistyped, "--x")])
    assert str(error.value) == f"{field} is {mistyped!r} (command line --x): input should be {expected}"
    with pytest.raises(ConfigError, match=r"input should be"):
        load_config("debug", [Override(field, 3, "--x")])


def test_names_stand_in_the_schema_and_are_checked_when_assigned(toys):
    properties = RunConfig.model_json_schema()["$defs"]["TrainConfig"]["properties"]
    assert properties["optimizer"]["enum"] == ["adamw", "cpu_adam", "muon", "rmsprop"]
    assert properties["lr_scheduler_type"]["enum"][-1] == "square"
    config = configured()
    with pytest.raises(ValueError, match="did you mean muon"):
        config.train.optimizer = "muoon"


def test_no_optimizer_is_named_outside_of_its_entry():
    """Whoever compares names has a second place to change."""
    package = Path(__file__).parents[2] / "lumina_ds"
    for name in OPTIMIZERS:
        comparing = [path for path in package.rglob("*.py") if f'== "{name}"' in path.read_text(encoding="utf-8")]
        assert comparing == [], name
    assert all(isinstance(entry, Optimizer) for entry in OPTIMIZERS.values())
