"""Which numbers of ranks an elastic run may have, and what each makes of its steps."""

import pytest

from lumina_ds.config.checks import world_faults
from lumina_ds.config.elastic import describe_layout, elastic_faults, for_ranks, layout_fault, possible_ranks
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.errors import ConfigError


def make(elastic="2:4", *, micro=2, accumulation=1, experts=8, expert_parallel=1, sharing=1, rows=None):
    model = {"num_experts": experts, "moe_intermediate_size": 64} if experts else {"intermediate_size": 64}
    train = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "global_batch_size": rows}
    deepspeed = {"expert_parallel_size": expert_parallel, "sequence_parallel_size": sharing}
    settings = {"model": model, "train": train, "deepspeed": deepspeed, "run": {"elastic": elastic}}
    return RunConfig.model_validate(settings)


# (elastic, accumulation, experts, expert parallel, sequence parallel) -> (ranks, accumulation, expert parallel)
LAYOUTS = [
    (("2:4", 1, 8, 4, 1), [(4, 1, 4), (2, 2, 2)]),
    (("1:4", 1, 8, 2, 1), [(4, 1, 2), (2, 2, 2), (1, 4, 1)]),
    (("1:4", 3, 8, 1, 1), [(4, 3, 1), (3, 4, 1), (2, 6, 1), (1, 12, 1)]),
    (("2:6", 2, 8, 4, 1), [(6, 2, 2), (4, 3, 4), (3, 4, 1), (2, 6, 2)]),
    (("4:12", 1, 6, 6, 1), [(12, 1, 6), (6, 2, 6), (4, 3, 2)]),
    (("2:8", 1, 0, 1, 2), [(8, 1, 1), (4, 2, 1), (2, 4, 1)]),
    (("7:7", 5, 7, 7, 1), [(7, 5, 7)]),
    (("512:1024", 1, 128, 128, 1), [(1024, 1, 128), (512, 2, 128)]),
]


@pytest.mark.parametrize(("settings", "expected"), LAYOUTS)
def test_the_table_of_layouts(settings, expected):
    elastic, accumulation, experts, expert_parallel, sharing = settings
    config = make(elastic, accumulation=accumulation, experts=experts, expert_parallel=expert_parallel, sharing=sharing)
    assert elastic_faults(config) == []
    found = []
    for number in possible_ranks(config, config.run.elastic_range[0]):
        layout = for_ranks(config, number)
        assert world_faults(layout, number) == [] and layout.run.elastic is None
        found.append((number, layout.train.gradient_accumulation_steps, layout.deepspeed.expert_parallel_size))
    assert found == expected
    # A layout is an ordinary configuration; nothing is divided twice.
    assert for_ranks(layout, 99) is layout


def test_every_number_of_ranks_trains_the_same_micro_batches():
    config, order = make("1:6", micro=3, accumulation=2), TrainingOrder(500, seed=1)
    trained = set()
    for number in possible_ranks(config, 1):
        accumulation = for_ranks(config, number).train.gradient_accumulation_steps
        parts = [
            tuple(order.step_rows(7, micro, rank, number, 3, accumulation))
            for micro in range(accumulation)
            for rank in range(number)
        ]
        trained.add(tuple(parts))
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"elastic": "4:2"}, "asks for at least 4 and at most 2 ranks; exchange the two"),
        ({"elastic": "3:4"}, "3 ranks cannot share the 4 micro-batches of a step equally"),
        ({"elastic": "3:4"}, "; 1, 2 or 4 can"),
        ({"elastic": "2:5", "experts": 0, "sharing": 2}, "5 ranks, the most of --elastic, are not divisible"),
        ({"elastic": "3:8", "experts": 0, "sharing": 2}, "3 ranks are not divisible by --sequence-parallel 2"),
        ({"experts": 6, "expert_parallel": 4}, "model.num_experts 6 is not divisible by --expert-parallel 4"),
        ({"experts": 0, "expert_parallel": 2}, "--expert-parallel 2 needs experts"),
        (
            {"rows": 16},
            "train.global_batch_size 16 is not micro_batch_size 2 x gradient_accumulation_steps 1 x 4 ranks",
        ),
    ],
)
def test_what_no_number_of_ranks_mends_is_refused_at_once(settings, says):
    [fault] = elastic_faults(make(**settings))
    assert says in fault


def test_the_micro_batch_is_not_left_open():
    config = make()
    config.train.auto_micro_batch = True
    assert "would choose one for each; give --batch-size a number" in elastic_faults(config)[0]


def test_a_number_of_ranks_that_does_not_fit_is_refused_with_the_reason():
    config = make("1:4")
    assert "5 ranks are outside of --elastic 1:4" in layout_fault(config, 5)
    with pytest.raises(ConfigError, match="3 ranks cannot share the 4 micro-batches"):
        for_ranks(config, 3)
    assert describe_layout(config, 1) == "1 rank (--grad-accum 4, --expert-parallel 1)"
    assert describe_layout(make("1:4", experts=0), 2) == "2 ranks (--grad-accum 2)"


@pytest.mark.parametrize("value", ["4", "2:", "0:4", "a:b", "2:4:6", "2-4", " 2:4", "٢:٤", 124, "1:1000000", True])
def test_a_range_is_two_numbers(value):
    with pytest.raises(ConfigError, match="write the fewest and the most ranks as MIN:MAX"):
        load_config("debug", [Override("run.elastic", value, "--elastic")])


def test_yaml_needs_quotes_and_the_error_says_so(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: debug\nrun:\n  elastic: 2:4\n")
    with pytest.raises(ConfigError, match="in YAML with the quotes"):
        load_config(str(tmp_path / "run.yaml"))
    (tmp_path / "run.yaml").write_text('preset: debug\nrun:\n  elastic: "2:4"\n')
    assert load_config(str(tmp_path / "run.yaml")).config.run.elastic_range == (2, 4)
